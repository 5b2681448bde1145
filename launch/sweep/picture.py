"""A sweep as a picture: its loss curves over each other, and below them the metric over each setting that varied."""

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

from launch.sweep.config import SweepConfig
from launch.sweep.jobs import Outcome
from train.track.metrics_file import read_metrics
from train.view.curves import ALARM, FAINT, GRID, INK, column, headline, save, short_rate, short_tokens, smooth

MAX_PANELS = 6
PER_ROW = 3
MAX_IN_KEY = 10


def draw_sweep(outcomes: Sequence[Outcome], varied: Sequence[str], config: SweepConfig, out: Path) -> None:
    """Writes the PNG `out` of jobs that are given best first: darker is better; diverged ones are dashed and red."""
    keys = list(varied)[:MAX_PANELS]
    num_rows = math.ceil(len(keys) / PER_ROW)
    figure = Figure(figsize=(9.5, 4.2 + 2.7 * num_rows), dpi=160, layout="constrained")
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + num_rows, 6, height_ratios=[1.55, *([1] * num_rows)])
    colors = _colors(outcomes)
    _draw_curves(_axes(figure.add_subplot(grid[0, :])), outcomes, colors, varied)
    across = 6 // min(PER_ROW, max(len(keys), 1))
    for index, key in enumerate(keys):
        row, place = 1 + index // PER_ROW, across * (index % PER_ROW)
        _draw_setting(_axes(figure.add_subplot(grid[row, place : place + across])), outcomes, colors, key, config)
    save(figure, out)


def _axes(axes: Axes) -> Axes:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0, pad=5)
    return axes


def _colors(outcomes: Sequence[Outcome]) -> list[str | tuple[float, ...]]:
    """From dark, the best, to light; what did not end well in the colour of alarm."""
    good = [each for each in outcomes if each.status in ("finished", "pruned", "interrupted")]
    scale = colormaps["viridis"]
    shade = {id(each): scale(0.85 * index / max(len(good) - 1, 1)) for index, each in enumerate(good)}
    return [shade.get(id(each), ALARM) for each in outcomes]


def _draw_curves(
    axes: Axes, outcomes: Sequence[Outcome], colors: Sequence[str | tuple[float, ...]], varied: Sequence[str]
) -> None:
    shown: list[np.ndarray] = []
    for index, (outcome, color) in reversed(list(enumerate(zip(outcomes, colors, strict=True)))):
        path = outcome.folder / "metrics.jsonl"
        steps = read_metrics(path) if path.exists() else []
        if not steps:
            continue
        loss = smooth(column(steps, "train/loss"))
        is_good = color != ALARM
        if is_good:
            shown.append(loss[np.isfinite(loss)])
        values = ", ".join(f"{key.split('.')[-1]}={_brief(outcome.proposal.values[key])}" for key in varied)
        label = values[:60] + ("" if outcome.status == "finished" else f" ({outcome.status})")
        style = {"linewidth": 2.2 if index == 0 else 1.3, "linestyle": "-" if is_good else "--"}
        marker = "o" if len(steps) < 12 else None
        tokens = column(steps, "train/consumed_tokens")
        axes.plot(tokens, loss, color=color, marker=marker, markersize=3, label=label, **style)  # type: ignore[arg-type]
    whole = np.concatenate(shown) if shown else np.zeros(0)
    if len(whole):
        margin = 0.06 * float(np.ptp(whole)) or 0.1
        axes.set_ylim(whole.min() - margin, whole.max() + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(short_tokens))
    axes.set_xlabel("tokens", fontsize=9, color=INK)
    headline(axes, "Training loss", "nats per token, smoothed; dark is best")
    handles, labels = axes.get_legend_handles_labels()
    if handles and len(handles) <= MAX_IN_KEY:
        # Drawn last and on top, the best job stands first in the key.
        axes.legend(handles[::-1], labels[::-1], fontsize=8, labelcolor=INK, framealpha=0.9, edgecolor="none")


def _draw_setting(
    axes: Axes,
    outcomes: Sequence[Outcome],
    colors: Sequence[str | tuple[float, ...]],
    key: str,
    config: SweepConfig,
) -> None:
    """The metric of every job over one setting; jobs without a value as crosses at the top."""
    words = [each.proposal.values[key] for each in outcomes]
    numbers = [_number(word) for word in words]
    if all(number is not None for number in numbers):
        at = [float(number) for number in numbers if number is not None]
        if min(at) > 0 and max(at) >= 8 * min(at):
            axes.set_xscale("log")
        axes.margins(x=0.08)
    else:
        names = list(dict.fromkeys(sorted(words)))
        at = [float(names.index(word)) for word in words]
        axes.set_xticks(range(len(names)), [name[:18] for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    for outcome, color, x in reversed(list(zip(outcomes, colors, at, strict=True))):
        if math.isfinite(outcome.value) and color != ALARM:
            marker = "o" if outcome.status == "finished" else "^"
            axes.plot([x], [outcome.value], marker, color=color, markersize=6.5, markeredgecolor="white")
        elif outcome.status in ("diverged", "failed"):
            place = axes.get_xaxis_transform()
            axes.plot([x], [0.97], "x", color=ALARM, markersize=6, transform=place, clip_on=False)
    headline(axes, key.lstrip("+"), config.metric)
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(FuncFormatter(short_rate))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _brief(word: str) -> str:
    number = _number(word)
    return word if number is None or len(word) <= 8 else f"{number:.3g}"
