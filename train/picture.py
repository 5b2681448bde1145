"""Pictures of runs, drawn without a screen: loss curves over tokens, and the paper that all our pictures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Steps = Sequence[Mapping[str, float]]  # as read from metrics.jsonl

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


def paper(heights: Sequence[float], width: float = 8.0) -> tuple[Figure, list[Axes]]:
    """A figure with one panel per height (inches), all over one token axis, in our plain style."""
    figure = Figure(figsize=(width, sum(heights) + 0.55 + 0.18 * len(heights)), dpi=160, layout="constrained")
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for axes, height in zip(panels, heights, strict=True):
        axes.yaxis.set_major_locator(MaxNLocator(6 if height > 2 else 2))
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
    """Writes the PNG aside and moves it in place, so that whoever watches the file never sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.part")
    figure.savefig(aside, format="png")
    aside.replace(out)


def column(steps: Steps, name: str) -> np.ndarray:
    """One number of every step, [num_steps], NaN where a step lacks it."""
    return np.array([step.get(name, np.nan) for step in steps], dtype=float)


def smooth(values: np.ndarray, num_windows: int = 50) -> np.ndarray:
    """Centred mean over about 1/`num_windows` of the curve, [n] -> [n].

    The window shrinks towards both ends, so the curve starts and ends on its data; non-finite values are left out.
    """
    n = len(values)
    is_finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_finite)])
    at = np.arange(n)
    half = np.minimum(n // num_windows // 2, np.minimum(at, n - 1 - at))
    first, last = at - half, at + half + 1
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _draw_run(axes: Axes, steps: Steps, color: str, valid_color: str, labels: tuple[str, str]) -> None:
    tokens, loss, valid = (column(steps, name) for name in ("train/consumed_tokens", "train/loss", "valid/loss"))
    is_few = len(steps) < 50
    axes.plot(tokens, loss, color=color, alpha=0.25, linewidth=0.8, marker="o" if is_few else None, markersize=3)
    axes.plot(tokens, smooth(loss), color=color, linewidth=1.9, label=labels[0], solid_capstyle="round")
    at = np.isfinite(valid)
    if at.any():
        axes.plot(tokens[at], valid[at], color=valid_color, linewidth=0.9, alpha=0.5, zorder=3)
        dots = axes.plot(tokens[at], valid[at], "o", label=labels[1], zorder=4, markersize=4.5)
        dots[0].set(markerfacecolor="white", markeredgecolor=valid_color, markeredgewidth=1.4)
    for where in tokens[~np.isfinite(loss)]:
        axes.axvline(where, color=ALARM, linewidth=1, alpha=0.6)
        axes.annotate("not finite", (where, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color=ALARM)


def _limits(runs: Mapping[str, Steps], unigram_entropy: float | None) -> tuple[float, float] | None:
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


def _last(steps: Steps, name: str) -> str:
    values = column(steps, name)
    values = values[np.isfinite(values)]
    return f"{values[-1]:.3f}" if len(values) else "none"


def draw_loss(
    runs: Mapping[str, Steps], out: Path, unigram_entropy: float | None = None, title: str | None = None
) -> None:
    """Writes the PNG `out`: training loss (raw and smoothed) and validation loss over tokens, the LR small below.

    `runs` maps a label to the steps of its `metrics.jsonl` (`train.metrics_file.read_metrics`), in any number and
    length; `unigram_entropy` is in nats per token. Steps with a loss that is not finite are marked.
    """
    figure, (top, bottom) = paper((3.6, 0.75))
    is_single = len(runs) == 1
    for (label, steps), color in zip(runs.items(), COLORS * (len(runs) // len(COLORS) + 1), strict=False):
        labels = ("training", "validation") if is_single else (label, "")
        _draw_run(top, steps, color, VALID if is_single else color, labels)
        tokens, lr = column(steps, "train/consumed_tokens"), column(steps, "train/lr")
        bottom.plot(tokens, lr, color=color, linewidth=1.3)
        if is_single:
            bottom.fill_between(tokens, lr, color=color, alpha=0.12, linewidth=0)
    limits = _limits(runs, unigram_entropy)
    if limits is not None:
        top.set_ylim(*limits)
    if unigram_entropy is not None:
        top.axhline(unigram_entropy, color=FAINT, linewidth=1.1, linestyle=(0, (5, 4)), zorder=1.5)
        top.annotate(
            f"unigram entropy {unigram_entropy:.2f}",
            (1, unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=FAINT,
        )
    note = "nats per token"
    if is_single:
        (steps,) = runs.values()
        note = f"training {_last(steps, 'train/loss')}, validation {_last(steps, 'valid/loss')} nats per token"
    headline(top, title or (next(iter(runs)) if is_single else "Loss"), note)
    top.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    headline(bottom, "Learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    bottom.set_xlim(left=0)
    save(figure, out)
