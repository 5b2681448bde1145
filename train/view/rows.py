"""Pictures of what several workers did over time: one row per worker, one bar per piece of work. Knows no pipeline."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.legend_handler import HandlerBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Transform

from train.view.curves import FAINT, INK, save

IDLE, EDGE = "#f1f3f5", "white"
ROW, GAP = 0.34, 0.07  # inches
MARK = 0.14  # of a row, most of it in the gap below
TOP, BOTTOM, LEFT, RIGHT, COLUMN, MAX_WIDTH = 1.02, 0.55, 0.78, 0.17, 0.59, 22.0
LINE, KEY = 0.18, 1.8  # of the note; the least width of an entry of the key
LETTERS = 13  # of the note, to the inch
POINTS = 72


class Mark(NamedTuple):
    """A stretch of a bar that is underlined in a colour of its own."""

    start: float
    stop: float
    color: str


@dataclass(frozen=True)
class Bar:
    """One piece of work: its row, its time, and one colour and text; or two of each, upper half and lower half, for two
    pieces that run together."""

    row: int
    start: float
    stop: float
    colors: tuple[str, ...]
    texts: tuple[str, ...]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class RowChart:
    """A picture's words: names of the rows; per row one entry under each of `columns`, at its right."""

    title: str
    note: str
    unit: str
    names: Sequence[str]
    columns: Sequence[str]
    entries: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Swatch:
    """An entry of the key: a text and its colours, in lines of equally many."""

    text: str
    colors: Sequence[Sequence[str]]


def draw_rows(rows: RowChart, bars: Sequence[Bar], key: Sequence[Swatch], out: Path) -> None:
    """Writes the PNG or SVG `out`, as wide as short bars need to show their text (within reason)."""
    stop = max((bar.stop for bar in bars), default=1.0)
    lengths = sorted(bar.stop - bar.start for bar in bars if bar.stop > bar.start) or [stop]
    width = min(max(stop / lengths[len(lengths) // 4] * 0.205, 9.5, KEY * len(key)), MAX_WIDTH)
    height = len(rows.names) * (ROW + GAP)
    right = RIGHT + COLUMN * len(rows.columns)
    note = textwrap.wrap(rows.note, int((width + right) * LETTERS))
    top = TOP + LINE * max(0, len(note) - 1)
    size = (LEFT + width + right, top + height + BOTTOM)
    figure = Figure(figsize=size, dpi=160)
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((LEFT / size[0], BOTTOM / size[1], width / size[0], height / size[1]))
    axes.set_xlim(0, stop)
    axes.set_ylim(len(rows.names), 0)
    _draw_frame(axes, rows, stop)
    _draw_bars(axes, bars, points_per_unit=width * POINTS / stop)
    _draw_heading(axes, rows.title, note, key, top, height)
    save(figure, out)


def _draw_frame(axes: Axes, rows: RowChart, stop: float) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=6)
    axes.set_yticks([row + 0.5 for row in range(len(rows.names))], rows.names)
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(rows.unit, fontsize=9, color=INK)
    pad = GAP / (ROW + GAP) / 2
    for row in range(len(rows.names)):
        axes.add_patch(Rectangle((0, row + pad), stop, 1 - 2 * pad, color=IDLE, linewidth=0, zorder=0.5))
    for column, heading in enumerate(rows.columns):
        at = (RIGHT + COLUMN * (column + 1)) * POINTS - 9
        style = {"textcoords": "offset points", "ha": "right", "va": "center", "annotation_clip": False}
        axes.annotate(heading, (stop, 0), (at, 7), fontsize=8.5, color=FAINT, **style)  # type: ignore[arg-type]
        for row, entry in enumerate(rows.entries):
            place = (stop, row + 0.5)
            axes.annotate(entry[column], place, (at, 0), fontsize=9, color=INK, **style)  # type: ignore[arg-type]


def _draw_bars(axes: Axes, bars: Sequence[Bar], points_per_unit: float) -> None:
    pad = GAP / (ROW + GAP) / 2
    cells, colors, frames, lines = [], [], [], []
    for bar in bars:
        lines += [(bar.row, mark) for mark in bar.marks]
        width = bar.stop - bar.start
        height = (1 - 2 * pad) / len(bar.colors)
        for half, (color, text) in enumerate(zip(bar.colors, bar.texts, strict=True)):
            low = bar.row + pad + half * height
            cells.append(Rectangle((bar.start, low), width, height))
            colors.append(color)
            fontsize = _fontsize(text, width * points_per_unit, height * (ROW + GAP) * POINTS)
            if fontsize:
                middle = (bar.start + width / 2, low + height / 2)
                axes.text(*middle, text, fontsize=fontsize, color=on(color), ha="center", va="center_baseline")
        if len(bar.colors) > 1:
            frames.append(Rectangle((bar.start, bar.row + pad), width, 1 - 2 * pad))
    _draw_marks(axes, lines)
    thin = points_per_unit * min((bar.stop - bar.start for bar in bars), default=1) < 5
    axes.add_collection(PatchCollection(cells, facecolors=colors, edgecolors=EDGE, linewidths=0.2 if thin else 0.7))
    axes.add_collection(
        PatchCollection(frames, facecolors="none", edgecolors=INK, linewidths=0.35 if thin else 1.0, zorder=2)
    )


def _draw_marks(axes: Axes, marks: Sequence[tuple[int, Mark]]) -> None:
    cells = [Rectangle((mark.start, row + 1 - MARK), mark.stop - mark.start, MARK) for row, mark in marks]
    colors = [mark.color for _, mark in marks]
    axes.add_collection(PatchCollection(cells, facecolors=colors, linewidths=0, zorder=3))


def _fontsize(text: str, width: float, height: float) -> float:
    """Points at which a text fits a cell of so many points; 0 where it would not be legible."""
    fits = min(8.0, (width - 2) / (0.62 * len(text)) if text else 0.0, height * 0.86)
    return fits if fits >= 4.5 else 0.0


def on(color: str) -> str:
    """The colour of a text that is legible on `color`."""
    red, green, blue = to_rgb(color)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.57 else "white"


def shades(light: str, dark: str, count: int) -> list[str]:
    """`count` colours from light to dark; the light one alone if one is asked for."""
    ends = to_rgb(light), to_rgb(dark)
    weights = [index / max(count - 1, 1) for index in range(count)]
    mixed = [[(1 - weight) * a + weight * b for a, b in zip(*ends, strict=True)] for weight in weights]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color) for color in mixed]


def _draw_heading(
    axes: Axes, title: str, note: Sequence[str], key: Sequence[Swatch], top: float, height: float
) -> None:
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    place = (0, (top - 0.3) * POINTS)
    axes.annotate(title, (0, 1), place, fontsize=12, fontweight="bold", color=INK, **style)  # type: ignore[arg-type]
    for number, line in enumerate(note):
        place = (0, (top - 0.52 - LINE * number) * POINTS)
        axes.annotate(line, (0, 1), place, fontsize=9, color=FAINT, **style)  # type: ignore[arg-type]
    legend = axes.legend(  # type: ignore[call-overload]  # our handler draws what is no artist
        key,
        [swatch.text for swatch in key],
        handler_map={Swatch: _SwatchHandler()},
        loc="lower left",
        bbox_to_anchor=(0, 1 + 0.1 / height),
        ncols=len(key),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
        handlelength=2.4,
        handleheight=1.1,
        handletextpad=0.6,
        columnspacing=1.8,
    )
    legend.set_in_layout(False)


class _SwatchHandler(HandlerBase):
    def create_artists(
        self,
        legend: Legend,
        orig_handle: Artist,
        xdescent: float,
        ydescent: float,
        width: float,
        height: float,
        fontsize: float,
        trans: Transform,
    ) -> list[Artist]:
        assert isinstance(orig_handle, Swatch)
        lines = orig_handle.colors
        tall = height / len(lines)
        cells: list[Artist] = []
        for line, colors in enumerate(lines):
            wide = width / len(colors)
            for index, color in enumerate(colors):
                at = (-xdescent + index * wide, -ydescent + height - (line + 1) * tall)
                cells.append(Rectangle(at, wide, tall, facecolor=color, edgecolor=EDGE, linewidth=0.7, transform=trans))
        if len(lines) > 1:
            place = (-xdescent, -ydescent)
            cells.append(Rectangle(place, width, height, facecolor="none", edgecolor=INK, linewidth=1, transform=trans))
        return cells
