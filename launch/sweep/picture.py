"""A sweep as a picture: its loss curves over each other, and below them the metric over each setting that varied.

Jobs that differ in their seed alone are one curve, their mean, in a band of one standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation, Transform

from launch.sweep.config import SweepConfig
from launch.sweep.jobs import Outcome
from launch.sweep.seeds import Group, Spread, grouped, is_seed
from train.track.metrics_file import read_metrics
from train.view.curves import ALARM, FAINT, GRID, INK, column, headline, save, short_rate, short_tokens, smooth

MAX_PANELS = 6
PER_ROW = 3
MAX_IN_KEY = 10
MAX_TICKS = 8
MAX_VALUE = 24  # letters of a value in the key
ENDED_WELL = ("finished", "pruned", "interrupted")

Color = str | tuple[float, ...]


def draw_sweep(outcomes: Sequence[Outcome], varied: Sequence[str], config: SweepConfig, out: Path) -> None:
    """Writes the PNG `out` of jobs that are given best first: darker is better; diverged ones are dashed and red."""
    groups = grouped(outcomes, config)
    settings = [key for key in varied if not is_seed(key)]
    keys = (settings or list(varied))[:MAX_PANELS]
    num_rows = math.ceil(len(keys) / PER_ROW)
    figure = Figure(figsize=(9.5, 4.2 + 2.7 * num_rows), dpi=160, layout="constrained")
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + num_rows, 6, height_ratios=[1.55, *([1] * num_rows)])
    colors = _colors(groups)
    _draw_curves(_axes(figure.add_subplot(grid[0, :])), groups, colors, labels_of(groups, settings))
    across = 6 // min(PER_ROW, max(len(keys), 1))
    for index, key in enumerate(keys):
        row, place = 1 + index // PER_ROW, across * (index % PER_ROW)
        _draw_setting(_axes(figure.add_subplot(grid[row, place : place + across])), groups, colors, key, config)
    save(figure, out)


def labels_of(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """What tells each group from the others, no two alike: settings that all of them share are left out."""
    differ = [key for key in keys if len({group.values[key] for group in groups}) > 1]
    lasts = [key.rpartition(".")[2] for key in differ]
    names = [last if lasts.count(last) == 1 else key.lstrip("+") for key, last in zip(differ, lasts, strict=True)]
    labels: list[str] = []
    for group in groups:
        words = [f"{name}={_brief(group.values[key])}" for name, key in zip(names, differ, strict=True)]
        label = ", ".join(words) or ("all seeds" if len(group.outcomes) > 1 else "the job")
        # Long values may begin alike.
        labels.append(label if label not in labels else f"{label} #{group.outcomes[0].proposal.number + 1}")
    return labels


def _axes(axes: Axes) -> Axes:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0, pad=5)
    return axes


def _colors(groups: Sequence[Group]) -> list[Color]:
    """From dark, the best, to light; where no job ended well, the colour of alarm."""
    good = [group for group in groups if any(each.status in ENDED_WELL for each in group.outcomes)]
    scale = colormaps["viridis"]
    shade: dict[int, Color] = {id(each): scale(0.85 * index / max(len(good) - 1, 1)) for index, each in enumerate(good)}
    return [shade.get(id(each), ALARM) for each in groups]


def _draw_curves(axes: Axes, groups: Sequence[Group], colors: Sequence[Color], labels: Sequence[str]) -> None:
    shown: list[np.ndarray] = []
    for index, (group, color, label) in reversed(list(enumerate(zip(groups, colors, labels, strict=True)))):
        width = 2.2 if index == 0 else 1.3
        for outcome in group.outcomes:
            if len(group.counted) > 1 and outcome in group.counted:
                continue
            is_good = outcome.status in ENDED_WELL
            loss = _draw_job(axes, outcome, color if is_good else ALARM, label, width, "-" if is_good else "--")
            if is_good:
                shown.append(loss[np.isfinite(loss)])
        if len(group.counted) > 1:
            shown += _draw_mean(axes, group, color, label, width)
    whole = np.concatenate(shown) if shown else np.zeros(0)
    if len(whole):
        margin = 0.06 * float(np.ptp(whole)) or 0.1
        axes.set_ylim(whole.min() - margin, whole.max() + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(short_tokens))
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    counts = [len(group.counted) for group in groups if len(group.counted) > 1]
    most = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else "".join(map(str, counts[:1]))
    seeds = f"; bands and bars: ± 1 standard deviation of {most} seeds" if counts else ""
    headline(axes, "Training loss", f"nats per token, smoothed; dark is best{seeds}")
    # Drawn last and on top, the best job stands first in the key; what several curves share is there once.
    handles, words = axes.get_legend_handles_labels()
    entries = dict(zip(words[::-1], handles[::-1], strict=True))
    if 1 < len(entries) <= MAX_IN_KEY:
        axes.legend(list(entries.values()), list(entries), fontsize=8, labelcolor=INK, framealpha=0.9, edgecolor="none")


def _curve(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and smoothed training loss of the steps that have one."""
    path = outcome.folder / "metrics.jsonl"
    steps = [step for step in (read_metrics(path) if path.exists() else []) if "train/loss" in step]
    return column(steps, "train/consumed_tokens"), smooth(column(steps, "train/loss"))


def _draw_job(axes: Axes, outcome: Outcome, color: Color, label: str, width: float, line: str) -> np.ndarray:
    """One job's curve, and its losses."""
    tokens, loss = _curve(outcome)
    if len(tokens):
        marker = "o" if len(tokens) < 12 else None
        label += "" if outcome.status == "finished" else f" ({outcome.status})"
        axes.plot(tokens, loss, color=color, marker=marker, markersize=3, label=label, linewidth=width, linestyle=line)
    return loss


def _draw_mean(axes: Axes, group: Group, color: Color, label: str, width: float) -> list[np.ndarray]:
    """The mean over a group's seeds where all of them have been, in its band; the band's edges."""
    curves = [_curve(outcome) for outcome in group.counted]
    length = min(len(tokens) for tokens, _ in curves)
    tokens, losses = curves[0][0][:length], np.stack([loss[:length] for _, loss in curves])
    mean, deviation = losses.mean(0), losses.std(0, ddof=1)
    axes.fill_between(tokens, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    axes.plot(
        tokens, mean, color=color, label=label, linewidth=width, marker="o" if length < 12 else None, markersize=3
    )
    return [mean - deviation, mean + deviation]


def _draw_setting(axes: Axes, groups: Sequence[Group], colors: Sequence[Color], key: str, config: SweepConfig) -> None:
    """The metric of every job over one setting, means over seeds with their deviation; crosses at the top for jobs
    without a value. Groups at one value stand side by side."""
    places = _places(axes, [outcome.proposal.values[key] for group in groups for outcome in group.outcomes])
    beside: dict[float, int] = {}
    for group, color in zip(groups, colors, strict=True):
        x = places[group.outcomes[0].proposal.values[key]]
        beside[x] = beside.get(x, 0) + (not is_seed(key))
        # Letters' points from the value itself: 0, 9, -9, 18, ...
        number = max(0, beside[x] - 1)
        shift = ScaledTranslation(9 / 72 * ((number + 1) // 2) * (-1) ** (number + 1), 0, axes.figure.dpi_scale_trans)
        for outcome in group.outcomes:
            small = outcome in group.counted and len(group.counted) > 1 and not is_seed(key)
            _draw_point(axes, outcome, color, places[outcome.proposal.values[key]], axes.transData + shift, small)
        if len(group.counted) > 1 and not is_seed(key):
            _draw_spread(axes, group.value, color, x, axes.transData + shift)
    if is_seed(key) and len(groups) == 1 and len(groups[0].counted) > 1:
        spread = groups[0].value
        axes.axhline(spread.mean, color=FAINT, linewidth=1.1, zorder=1)
        axes.axhspan(spread.mean - spread.deviation, spread.mean + spread.deviation, color=FAINT, alpha=0.15, zorder=0)
    headline(axes, key.lstrip("+"), config.metric)


def _places(axes: Axes, words: Sequence[str]) -> dict[str, float]:
    """Where the values of a setting lie: numbers on a scale, which is made logarithmic for wide ones; others side by
    side. A few numbers are written where they lie."""
    numbers = {word: number for word in words if (number := _number(word)) is not None}
    if len(numbers) < len(set(words)):
        names = sorted(set(words))
        axes.set_xticks(range(len(names)), [name[:18] for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        return {name: float(index) for index, name in enumerate(names)}
    if min(numbers.values()) > 0 and max(numbers.values()) >= 8 * min(numbers.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(short_rate))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    if len(numbers) <= MAX_TICKS:
        axes.set_xticks(list(numbers.values()), [_brief(word) for word in numbers])
        axes.set_xticks([], minor=True)
    axes.margins(x=0.1)
    return numbers


def _draw_point(axes: Axes, outcome: Outcome, color: Color, x: float, where: Transform, is_small: bool) -> None:
    if math.isfinite(outcome.value) and outcome.status in ENDED_WELL:
        marker = "o" if outcome.status == "finished" else "^"
        size, strength = (4.5, 0.5) if is_small else (6.5, 1.0)
        style = {"markersize": size, "alpha": strength, "markeredgecolor": "white", "transform": where}
        axes.plot([x], [outcome.value], marker, color=color, **style)  # type: ignore[arg-type]
        _reach(axes, x, outcome.value)
    elif outcome.status in ("diverged", "failed"):
        at_top = axes.get_xaxis_transform()
        axes.plot([x], [0.97], "x", color=ALARM, markersize=6, transform=at_top, clip_on=False)


def _draw_spread(axes: Axes, spread: Spread, color: Color, x: float, where: Transform) -> None:
    """The mean as a dot, and a bar of one standard deviation to each side."""
    ends = [spread.mean - spread.deviation, spread.mean + spread.deviation]
    axes.plot([x, x], ends, color=color, linewidth=1.4, transform=where)
    axes.plot([x], [spread.mean], "o", color=color, markersize=7.5, markeredgecolor="white", transform=where)
    for end in ends:
        _reach(axes, x, end)


def _reach(axes: Axes, x: float, y: float) -> None:
    """Show this place: what is drawn with a shift is not seen by the scales."""
    axes.update_datalim([(x, y)])
    axes.autoscale_view()


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _brief(word: str) -> str:
    """A value for the key: long numbers in three digits, long words without their end."""
    number = _number(word)
    if number is not None:
        return word if len(word) <= 8 else f"{number:.3g}"
    return word if len(word) <= MAX_VALUE else f"{word[: MAX_VALUE - 3]}..."
