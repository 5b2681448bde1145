"""A plan as one picture for a page of text: memory over the step, and where time goes in three sets of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from launch.plan.page import memory, time
from launch.plan.page.words import axis
from train.view.curves import ALARM, FAINT, GRID, INK, headline, save
from train.view.report.bars import Part, Row
from train.view.report.style import LIGHT

# Of the peak: a component below is not drawn, and has no entry in the key.
_LEAST = 0.005


def draw_plan(title: str, action: str, figures: Mapping[str, Any], out: Path) -> None:
    """Writes the SVG or PNG `out`. action: of what the pieces are; figures: `answer.numbers` of the plan."""
    figure = Figure(figsize=(10.5, 6.2), dpi=160, layout="constrained")
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.9, 1])
    _draw_memory(_axes(figure.add_subplot(grid[0, :])), figures)
    _draw_rows(_axes(figure.add_subplot(grid[1, 0])), time.step_rows(figures), "A step, mean over ranks")
    _draw_rows(_axes(figure.add_subplot(grid[1, 1])), time.node_rows(figures), f"Inside {action}")
    save(figure, out)


def _axes(axes: Axes) -> Axes:
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=5)
    return axes


def _draw_memory(axes: Axes, figures: Mapping[str, Any]) -> None:
    stack = memory.stack_of(figures)
    tops = np.cumsum([layer.values for layer in stack.layers], axis=0)
    shown = [layer for layer in stack.layers if layer.values.max() >= _LEAST * tops.max()]
    floor = np.zeros_like(tops[0])
    for layer, top in zip(stack.layers, tops, strict=True):
        axes.stairs(top, stack.borders, baseline=floor, fill=True, color=LIGHT[layer.color], linewidth=0)
        floor = top
    high, says = float(tops.max()), stack.mark[1]
    if stack.level is not None:
        axes.axhline(stack.level[0], color="white", linewidth=3.5)
        axes.axhline(stack.level[0], color=ALARM, linewidth=1.8, linestyle=(0, (6, 3)))
        high, says = max(high, stack.level[0]), f"{says}; dashed: {stack.level[1]}"
    axes.axvline(stack.mark[0], color=INK, linewidth=1, linestyle=":")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_xlim(0, stack.borders[-1])
    axes.set_ylim(0, 1.06 * high)
    in_words = axis(float(stack.borders[-1]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} {stack.unit}")
    axes.xaxis.set_major_formatter(lambda value, _: in_words(value))
    headline(axes, f"Memory of rank {figures['memory_over_step']['rank']}, the fullest, over a step", says)
    key = [Patch(color=LIGHT[layer.color], label=layer.name) for layer in reversed(shown)]
    axes.legend(handles=key, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=9, labelcolor=INK)


def _draw_rows(axes: Axes, rows: Sequence[Row], title: str) -> None:
    ends = []
    for place, row in enumerate(rows):
        end = 0.0
        for part in _shown(row):
            axes.barh(place, part.value, left=end, color=LIGHT[part.color], height=0.66)
            end += part.value
        ends.append(end)
        axes.annotate(
            row.texts[0], (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.set_xlim(0, 1.2 * max(ends))
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xticks([])
    axes.invert_yaxis()
    headline(axes, title)
    names = {part.name: part.color for row in rows for part in _shown(row)}
    key = [Patch(color=LIGHT[color], label=name) for name, color in names.items()]
    axes.legend(
        handles=key,
        loc="upper left",
        bbox_to_anchor=(-0.02, 0.02),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        labelcolor=FAINT,
        handlelength=1.0,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _shown(row: Row) -> list[Part]:
    """The parts of a row that can be seen."""
    (bar,) = row.bars
    whole = sum(part.value for part in bar)
    return [part for part in bar if part.value >= _LEAST * whole]
