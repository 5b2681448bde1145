"""What is held over time, layer over layer, as SVG that stretches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from train.view.report.bars import key
from train.view.report.chart import SIDE, label, ticks
from train.view.report.document import escaped


@dataclass(frozen=True)
class Layer:
    """One layer: values [num_stretches], its colour by number in the style sheet."""

    name: str
    color: int
    values: np.ndarray


@dataclass(frozen=True)
class Stack:
    """Layers over each other, the first one at the bottom.

    Attributes:
        borders: [num_stretches + 1], where stretches of x begin and end; values are constant in each.
        unit, x_unit: of values and of x, as words.
        mark: a labelled vertical line.
        level: a labelled horizontal line; None: there is none.
    """

    title: str
    borders: np.ndarray
    layers: Sequence[Layer]
    unit: str
    x_unit: str
    mark: tuple[float, str]
    level: tuple[float, str] | None = None


def draw_stack(stack: Stack, form: Callable[[float], str], x_form: Callable[[float], str]) -> str:
    """The picture with its key, without a frame. form, x_form: numbers of the axes as text."""
    tops = np.cumsum(np.stack([layer.values for layer in stack.layers]), axis=0)
    x_end = float(stack.borders[-1])
    high = 1.06 * max(float(tops.max()), stack.level[0] if stack.level else 0.0)
    across, down = SIDE * stack.borders / x_end, SIDE * (1 - tops / high)
    parts = [
        f'<svg viewBox="0 0 {SIDE:.0f} {SIDE:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escaped(stack.title)}" data-x="{x_end!r}" data-low="0" data-high="{high!r}" data-log="0" '
        f'data-unit="{escaped(stack.unit)}" data-across="{escaped(stack.x_unit)}">'
    ]
    y_at = ticks(0.0, high)
    parts += [f'<path class="grid" d="M0 {SIDE * (1 - value / high):.1f}H{SIDE:.0f}"/>' for value in y_at]
    floor = np.full_like(down[0], SIDE)
    for layer, top in zip(stack.layers, down, strict=True):
        name = escaped(layer.name)
        parts.append(f'<path class="area c{layer.color}" data-name="{name}" d="{_outline(across, top, floor)}"/>')
        floor = top
    if stack.level is not None:
        line = f"M0 {SIDE * (1 - stack.level[0] / high):.1f}H{SIDE:.0f}"
        parts.append(f'<path class="limit under" d="{line}"/><path class="limit" d="{line}"/>')
    mark = SIDE * stack.mark[0] / x_end
    parts.append(f'<path class="mark peak" d="M{mark:.1f} 0V{SIDE:.0f}"/></svg>')
    parts += [label("y", SIDE * (1 - value / high), form(value)) for value in y_at]
    parts += [label("x", SIDE * at / x_end, x_form(at)) for at in ticks(0.0, x_end, 6)]
    side = f"left:calc({mark / SIDE:.2%} + 5px)" if mark < SIDE / 2 else f"right:calc({1 - mark / SIDE:.2%} + 5px)"
    parts.append(f'<span class="said" style="{side}">{escaped(stack.mark[1])}</span>')
    names = key([(layer.name, layer.color) for layer in reversed(stack.layers)], stack.level and stack.level[1])
    return f'{names}<div class="box">{"".join(parts)}</div>'


def _outline(across: np.ndarray, top: np.ndarray, floor: np.ndarray) -> str:
    """Along the top in steps, and back along the floor: point i of the way there is above point i from the end."""
    x = np.stack([across[:-1], across[1:]], axis=1).reshape(-1)
    there = list(zip(x, top.repeat(2), strict=True))
    back = list(zip(x, floor.repeat(2), strict=True))[::-1]
    return "M" + "L".join(f"{px:.2f} {py:.2f}" for px, py in there + back) + "Z"
