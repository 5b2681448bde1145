"""Charts as SVG and HTML: curves in a box that stretches to any width, while letters and lines keep their size."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_COLORS = 8
MAX_POINTS = 500
# Styles whose points stand by themselves.
POINTS = ("dots", "cloud")
SIDE = 1000.0  # of the square that is stretched over the box
FOOT = 0.05  # of the side: a short mark


@dataclass(frozen=True)
class Curve:
    """One line of a chart: x and y [n], its run (which gives the colour and is toggled) and how it is drawn.

    style: line | faint | dots | cloud (small dots) | dashed.
    """

    label: str
    run: int
    x: np.ndarray
    y: np.ndarray
    style: str = "line"
    color: int | None = None


@dataclass(frozen=True)
class Mark:
    """A vertical line of a chart at `x`; `word` is shown where a pointer rests on it.

    kind: what the legend calls it, once for all marks of a kind; empty for one that has no entry there.
    look: dotted | dashed | solid | short (at the foot of the chart alone: for what there is much of).
    """

    x: float
    word: str
    run: int
    kind: str = ""
    look: str = "dotted"
    is_bad: bool = False


@dataclass(frozen=True)
class Chart:
    """A titled panel. `level`: a labelled horizontal line.

    has_key: whether the curves are named above them; not where the page names the runs once for all panels. across: the
    unit of x.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    form: Callable[[float], str]
    is_log: bool = False
    from_zero: bool = False
    wide: bool = False
    level: tuple[float, str] | None = None
    marks: Sequence[Mark] = ()
    has_key: bool = True
    across: str = "tokens"


def thin(x: np.ndarray, y: np.ndarray, count: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` points of a curve: means over runs of points, of what is finite there; NaN where nothing is."""
    if len(x) <= count:
        return x, y
    edges = np.linspace(0, len(x), count + 1).astype(int)
    is_finite = np.isfinite(y)
    sums = np.add.reduceat(np.where(is_finite, y, 0.0), edges[:-1])
    counts = np.add.reduceat(is_finite.astype(float), edges[:-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return x[edges[1:] - 1], np.where(counts > 0, sums / counts, np.nan)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    raw = (high - low) / max(count, 1)
    if not raw > 0:
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between; with 2 and 5 between those where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    found = [factor * 10.0**power for power in powers for factor in factors]
    found = [value for value in found if low * 0.999 <= value <= high * 1.001]
    stride = max(1, math.ceil(len(found) / 7))
    return found[::stride] if len(found) > 1 else ticks(low, high)


class _Scale:
    """Numbers to places on the side of the square, 0 to SIDE."""

    def __init__(self, low: float, high: float, is_log: bool = False) -> None:
        self.low, self.high, self.is_log = low, high if high > low else low + 1.0, is_log

    def __call__(self, values: np.ndarray) -> np.ndarray:
        low, high = self.low, self.high
        if not self.is_log:
            return SIDE * (values - low) / (high - low)
        with np.errstate(invalid="ignore", divide="ignore"):
            return SIDE * (np.log10(values) - math.log10(low)) / (math.log10(high) - math.log10(low))


def draw(chart: Chart, x_form: Callable[[float], str], x_end: float) -> str:
    """The panel as HTML; a sentence in place of the box where there is nothing to draw."""
    kind = "panel wide" if chart.wide else "panel"
    head = f'<section class="{kind}"><h3>{html.escape(chart.title)} <small>{html.escape(chart.unit)}</small></h3>'
    scale = _y_scale(chart)
    if scale is None:
        return f'{head}<p class="none">not measured</p></section>'
    x_end *= 1.01  # a dot at the end is whole
    across = _Scale(0.0, x_end)
    parts = [
        f'<svg viewBox="0 0 {SIDE:.0f} {SIDE:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(chart.title, quote=True)}" data-x="{x_end!r}" data-low="{scale.low!r}" '
        f'data-high="{scale.high!r}" data-log="{int(scale.is_log)}" '
        f'data-across="{html.escape(chart.across, quote=True)}">'
    ]
    y_at = log_ticks(scale.low, scale.high) if scale.is_log else ticks(scale.low, scale.high)
    places = SIDE - scale(np.array(y_at))
    parts += [f'<path class="grid" d="M0 {place:.1f}H{SIDE:.0f}"/>' for place in places]
    if chart.level is not None:
        place = SIDE - float(scale(np.array([chart.level[0]]))[0])
        parts.append(f'<path class="level" d="M0 {place:.1f}H{SIDE:.0f}"/>')
    for mark in chart.marks:
        place, top = float(across(np.array([mark.x]))[0]), SIDE * (1 - FOOT) if mark.look == "short" else 0.0
        title = f"<title>{html.escape(mark.word)}</title>"
        parts.append(f'<path class="{_look(mark)} run{mark.run}" d="M{place:.1f} {top:.0f}V{SIDE:.0f}">{title}</path>')
    parts += [_path(curve, across, scale) for curve in chart.curves]
    labels = [label("y", place, chart.form(value)) for value, place in zip(y_at, places, strict=True)]
    labels += [label("x", float(across(np.array([at]))[0]), x_form(at)) for at in ticks(0.0, x_end, 4)]
    return f'{head}{_key(chart)}<div class="box">{"".join(parts)}</svg>{"".join(labels)}</div></section>'


def _y_scale(chart: Chart) -> _Scale | None:
    shown = [curve.y[np.isfinite(curve.y)] for curve in chart.curves if curve.style != "faint"]
    values = np.concatenate([*shown, np.array([chart.level[0]] if chart.level else [])])
    if not sum(len(each) for each in shown):
        return None
    positive = values[values > 0]
    if chart.is_log and len(positive) and positive.max() > 4 * positive.min():
        return _Scale(float(positive.min()) / 1.15, float(positive.max()) * 1.15, is_log=True)
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return _Scale(0.0 if chart.from_zero else low - margin, high + margin)


def _path(curve: Curve, across: _Scale, scale: _Scale) -> str:
    x, y = (curve.x, curve.y) if curve.style in POINTS else thin(curve.x, curve.y)
    places = list(zip(across(x), SIDE - scale(y), strict=True))
    color = (curve.run if curve.color is None else curve.color) % NUM_COLORS
    dash = f" dash{(curve.run // NUM_COLORS) % 3}" if curve.style == "line" else ""
    words, pen_up = [], True
    for px, py in places:
        if not (math.isfinite(px) and math.isfinite(py)):
            pen_up = True
            continue
        if curve.style in POINTS:
            words.append(f"M{px:.2f} {py:.2f}h0")
        else:
            words.append(f"{'M' if pen_up else 'L'}{px:.2f} {py:.2f}")
        pen_up = False
    if len(words) == 1:  # a line of one point would not show
        words.append("h0")
    name = html.escape(curve.label, quote=True)
    return (
        f'<path class="curve {curve.style} c{color}{dash} run{curve.run}" data-name="{name}" d="{"".join(words)}">'
        f"<title>{name}</title></path>"
    )


def _look(mark: Mark) -> str:
    """The classes of its style."""
    return f"mark {mark.look}{' bad' if mark.is_bad else ''}"


def _key(chart: Chart) -> str:
    """The legend: one entry per label that is not drawn faintly, and per kind of marks; the level's words too."""
    entries: dict[str, str] = {}
    for curve in chart.curves:
        if curve.style != "faint" and curve.label and chart.has_key:
            color = (curve.run if curve.color is None else curve.color) % NUM_COLORS
            entries.setdefault(
                curve.label,
                f'<span class="run{curve.run}"><i class="{curve.style} c{color}"></i>{html.escape(curve.label)}</span>',
            )
    words = list(entries.values()) if len(entries) > 1 else []
    if chart.level is not None:
        words.append(f'<span><i class="level"></i>{html.escape(chart.level[1])}</span>')
    looks = dict.fromkeys((_look(mark), mark.kind) for mark in chart.marks if mark.kind)
    words += [f'<span><i class="{look}"></i>{html.escape(kind)}</span>' for look, kind in looks]
    return f'<div class="key">{"".join(words)}</div>' if words else ""


def label(axis: str, place: float, text: str) -> str:
    """A number of an axis, "x" or "y", at its place on the side of the square."""
    side = "top" if axis == "y" else "left"
    return f'<span class="{axis}" style="{side}:{place / SIDE:.2%}">{html.escape(text)}</span>'
