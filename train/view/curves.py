"""Pictures of runs, drawn without a screen: loss curves over tokens, and the paper that all our pictures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.files import replacing

History = Sequence[Mapping[str, float]]  # the steps of a run, as read from metrics.jsonl

INK, FAINT, GRID, ALARM = "#22303a", "#7b8893", "#e6eaed", "#c22f2f"
# First the colour of a single run; all told apart in print and by most colour-blind readers.
COLORS = ("#0a6c8f", "#d9772b", "#4b8f4e", "#8a4f9e", "#b0413e", "#5b6770", "#c9a227", "#2f4b9c")
VALID = "#d9772b"


def short_tokens(tokens: float, _: object = None) -> str:
    """12_600_000 -> 12.6M, as axes and tables show tokens."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(tokens) >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:.4g}"


def short_rate(rate: float, _: object = None) -> str:
    """0.00022 -> 2.2e-4, as axes and tables show learning rates."""
    if rate == 0:
        return "0"
    digits, power = f"{rate:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def paper(heights: Sequence[float], width: float = 8.0) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per height (inches), all over one token axis, in our plain style."""
    margins = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1)
    figure = Figure(figsize=(width, sum(heights) + 0.55 + 0.18 * len(heights)), dpi=160, layout=margins)
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, height in zip(panels, heights, strict=True):
        axes.yaxis.set_major_locator(MaxNLocator(8 if height > 2 else 2, steps=[1, 2, 2.5, 5, 10]))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=8.5, length=0, pad=5)
    bottom = panels[-1]
    bottom.xaxis.set_major_formatter(FuncFormatter(short_tokens))
    bottom.set_xlabel("tokens", fontsize=9, color=INK)
    return figure, panels


def headline(axes: Axes, text: str, note: str = "") -> None:
    """What a panel shows, at its top left, with a quieter note after it."""
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    if note:
        axes.set_title(note, loc="right", fontsize=9, color=FAINT, pad=8)


def save(figure: Figure, out: Path) -> None:
    """Writes the picture aside and moves it in place, so that whoever watches the file never sees half of it.

    An SVG where the name ends so, with its text as text; else a PNG. The same figure gives the same bytes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, durable=False) as aside:
        if out.suffix == ".svg":
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "halocline"}):
                figure.savefig(aside, format="svg", metadata={"Date": None})
        else:
            figure.savefig(aside, format="png")


def column(steps: History, name: str) -> np.ndarray:
    """One number of every step, [num_steps], NaN where a step lacks it."""
    return np.array([step.get(name, np.nan) for step in steps], dtype=float)


def not_finite(steps: History, name: str) -> np.ndarray:
    """Whether a step has this number and it is NaN or infinite, [num_steps]."""
    return np.array([name in step and not np.isfinite(step[name]) for step in steps], dtype=bool)


def smooth(values: np.ndarray, num_windows: int = 50) -> np.ndarray:
    """Centred mean over about 1/`num_windows` of the curve, [n] -> [n].

    At the start, where losses fall steeply, the window shrinks so that the curve starts on its data; at the end it is
    cut off. Non-finite values are left out.
    """
    n = len(values)
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    at = np.arange(n)
    half = np.minimum(n // num_windows // 2, at)
    first, last = at - half, np.minimum(at + half + 1, n)
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _draw_run(axes: Axes, steps: History, color: str, valid_color: str, labels: tuple[str, str]) -> None:
    tokens, loss, valid = (column(steps, name) for name in ("train/consumed_tokens", "train/loss", "valid/loss"))
    dot = "o" if len(steps) < 50 else None
    axes.plot(tokens, loss, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(loss), color=color, linewidth=1.9, marker=dot, markersize=4, label=labels[0])
    at = np.isfinite(valid)
    if at.any():
        (dots,) = axes.plot(tokens[at], valid[at], "o", label=labels[1], zorder=4, markersize=5)
        dots.set(markerfacecolor="white", markeredgecolor=valid_color, markeredgewidth=1.5)
    broken = tokens[not_finite(steps, "train/loss")]
    for where in broken:
        axes.axvline(where, color=ALARM, linewidth=1, alpha=0.6, zorder=1)
    if len(broken):
        at_first = (broken[0], 0.03)
        place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "xytext": (-4, 0)}
        axes.annotate("loss not finite", at_first, ha="right", fontsize=8.5, color=ALARM, **place)  # type: ignore[arg-type]


def _limits(runs: Mapping[str, History], unigram_entropy: float | None) -> tuple[float, float] | None:
    """Loss range that shows every smoothed curve and validation point whole; a lone spike may leave the picture."""
    shown = [smooth(column(steps, "train/loss")) for steps in runs.values()]
    shown += [column(steps, "valid/loss") for steps in runs.values()]
    if unigram_entropy is not None:
        shown.append(np.array([unigram_entropy]))
    values = np.concatenate(shown)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = values.min(), values.max()
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _note(steps: History) -> str:
    """Where a run's curves end, in words."""
    ends = (("training", smooth(column(steps, "train/loss"))), ("validation", column(steps, "valid/loss")))
    finite = ((name, values[np.isfinite(values)]) for name, values in ends)
    texts = [f"{name} {values[-1]:.3f}" for name, values in finite if len(values)]
    return ", ".join(texts) + " nats per token" if texts else "no steps yet"


def _draw_entropy(axes: Axes, entropy: float) -> None:
    axes.axhline(entropy, color=FAINT, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1.5)
    text = axes.annotate(
        f"unigram entropy {entropy:.2f}",
        (1, entropy),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=FAINT,
    )
    text.set_in_layout(False)


def draw_loss(
    runs: Mapping[str, History], out: Path, unigram_entropy: float | None = None, title: str | None = None
) -> None:
    """Writes the PNG `out`: training loss (raw and smoothed) and validation loss over tokens, the LR small below.

    `runs` maps a label to the steps of its `metrics.jsonl` (`train.track.metrics_file.read_metrics`), in any number and
    length; `unigram_entropy` is in nats per token. Steps with a loss that is not finite are marked.
    """
    figure, (top, bottom) = paper((3.6, 0.8))
    is_single = len(runs) == 1
    for index, (label, steps) in enumerate(runs.items()):
        color = COLORS[index % len(COLORS)]
        labels = ("training", "validation") if is_single else (label, "")
        _draw_run(top, steps, color, VALID if is_single else color, labels)
        tokens, lr = column(steps, "train/consumed_tokens"), column(steps, "train/lr")
        bottom.plot(tokens, lr, color=color, linewidth=1.5, marker="o" if len(lr) == 1 else None, markersize=4)
        if is_single:
            bottom.fill_between(tokens, lr, color=color, alpha=0.12, linewidth=0)
    limits = _limits(runs, unigram_entropy)
    if limits is not None:
        top.set_ylim(*limits)
    if unigram_entropy is not None:
        _draw_entropy(top, unigram_entropy)
    note = _note(next(iter(runs.values()))) if is_single else "nats per token"
    headline(top, title or (next(iter(runs)) if is_single else "Loss"), note)
    most_steps = max((len(steps) for steps in runs.values()), default=0)
    if most_steps:
        # Losses fall away from the upper right, but a few first steps may lie right there.
        key = top.legend(fontsize=9, labelcolor=INK, framealpha=0.9, edgecolor="none")
        key.set_loc("upper right" if most_steps >= 50 else "best")
    headline(bottom, "Learning rate")
    bottom.yaxis.set_major_formatter(FuncFormatter(short_rate))
    bottom.set_ylim(bottom=0)
    bottom.set_xlim(left=0)
    save(figure, out)
