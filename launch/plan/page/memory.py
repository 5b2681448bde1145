"""What ranks hold: the fullest one over its step, what is alive at its peak, and all of them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from launch.plan import breakdown
from launch.plan.answer import GB
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.page.words import axis
from train.view.report.bars import Part, Row, draw_bars
from train.view.report.document import escaped, table
from train.view.report.panels import short_bytes
from train.view.report.stack import Layer, Stack, draw_stack

# Component -> its colour by number. Those that lie there through the whole step come first, and stand at the bottom.
COLORS = {
    "reserve": 10,
    "router biases": 3,
    "weights": 7,
    "main_grad": 0,
    "masters and moments": 5,
    "activations": 1,
    "kept": 6,
    "gradients": 8,
    "logits": 9,
    "dispatch": 2,
    "links": 3,
    "work": 4,
}
# What those are whose names do not say it.
MEANS = {
    "reserve": "the driver's context, communicators, and what an allocator cannot give out",
    "main_grad": "gradients of weights, summed over micro-batches",
    "kept": "for weight gradients that wait for their turn",
    "gradients": "of activations",
    "dispatch": "rows of experts on their way",
    "links": "what stages hand to each other",
    "work": "gone within its own operation",
}
# A component that is nowhere more than this share of the peak is left out of a picture.
_LEAST = 0.0005
# The device's limit is drawn where the peak is at least this share of it: a small run's memory would be a flat line.
_NEAR = 0.25
_MOST_ROWS = 24


def memory_section(plan: Plan, figures: Mapping[str, Any]) -> str:
    """All pictures of memory."""
    stack = stack_of(figures)
    over_step = draw_stack(stack, lambda value: f"{value:g} {stack.unit}", axis(float(stack.borders[-1])))
    meant = "; ".join(f"{layer.name}: {MEANS[layer.name]}" for layer in stack.layers if layer.name in MEANS)
    return (
        f"<h2>Memory <small>{_who(plan, figures['memory_over_step']['rank'])}, by component</small></h2>"
        f'<section class="panel free wide">{over_step}<p class="note">While an action runs, its fullest moment; '
        f"between actions, what stays. {escaped(meant[:1].upper() + meant[1:])}.</p></section>"
        f"{_at_peak(plan, figures)}{_all_ranks(plan, figures)}"
    )


def _who(plan: Plan, rank: int) -> str:
    return (
        f"pipeline rank {rank}, the fullest of {plan.config.parallel.pp}" if plan.config.parallel.pp > 1 else "a rank"
    )


def _limit(figures: Mapping[str, Any], peak_bytes: float) -> tuple[float, str] | None:
    limit = figures["device_bytes"]
    return (limit, f"the device's {limit / GB:.1f} GB") if peak_bytes >= _NEAR * limit else None


def _is_reserve_shown(figures: Mapping[str, Any]) -> bool:
    """What a device holds back is not drawn where it is most of all: of a small run nothing else could be seen."""
    entry = figures["memory"][figures["memory_over_step"]["rank"]]
    return entry["reserve"] <= entry["total"] / 2


def stack_of(figures: Mapping[str, Any]) -> Stack:
    """The fullest rank's components over its step: while an action runs its fullest moment, between actions what
    stays."""
    found, entry = figures["memory_over_step"], figures["memory"][figures["memory_over_step"]["rank"]]
    has_reserve = _is_reserve_shown(figures)
    peak = entry["total"] - (0 if has_reserve else entry["reserve"])
    unit, size = ("GB", GB) if peak >= GB else ("MB", 1e6)
    borders, layers = _layers(figures)
    shown = [each for each in layers if each.values.max() >= _LEAST * peak and (has_reserve or each.name != "reserve")]
    limit = _limit(figures, entry["total"]) if has_reserve else None
    at = found["peak_at"]
    beside = "" if has_reserve else f", and a reserve of {short_bytes(entry['reserve'])}"
    return Stack(
        title="memory over the step",
        borders=borders,
        layers=[replace(each, values=each.values / size) for each in shown],
        unit=unit,
        x_unit="s",
        mark=(
            (found["start_s"][at] + found["stop_s"][at]) / 2,
            f"peak {peak / size:.1f} {unit}, in {found['actions'][at]}{beside}",
        ),
        level=None if limit is None else (limit[0] / size, limit[1]),
    )


def _layers(figures: Mapping[str, Any]) -> tuple[np.ndarray, list[Layer]]:
    """Borders of stretches of time, and every component's bytes in them, in the order of the stack."""
    found, borders = figures["memory_over_step"], [0.0]
    for start_s, stop_s in zip(found["start_s"], found["stop_s"], strict=True):
        borders += [start_s, stop_s]
    borders.append(max(figures[AS_WRITTEN]["step_s"], borders[-1]))
    sizes = {name: np.full(len(borders) - 1, size) for name, size in found["always"].items()}
    for name in found["during"]:
        sizes[name] = np.zeros(len(borders) - 1)
        sizes[name][1::2], sizes[name][2::2] = found["during"][name], found["after"][name]
    there = np.diff(borders) > 0
    layers = [Layer(name, color, sizes[name][there]) for name, color in COLORS.items() if name in sizes]
    return np.array([0.0, *np.array(borders)[1:][there]]), layers


def _at_peak(plan: Plan, figures: Mapping[str, Any]) -> str:
    """Which micro-batches and which tensors are alive when the fullest rank holds most."""
    rank = figures["memory_over_step"]["rank"]
    entry, action = figures["memory"][rank], plan.ranks[rank].step.action
    alive = list(entry["by_micro_batch"].items())
    rows = []
    for name, size in alive[:_MOST_ROWS]:
        stage, number = name.split(".")
        parts = [Part("holds", size, 1, short_bytes(size))]
        rows.append(Row(f"micro-batch {number} on stage {stage}", [parts], [short_bytes(size)]))
    if len(alive) > _MOST_ROWS:
        rest = sum(size for _, size in alive[_MOST_ROWS:])
        rows.append(Row(f"{len(alive) - _MOST_ROWS} more, together", [[]], [short_bytes(rest)]))
    largest = [[short_bytes(size), label] for label, size in entry["largest"].items()]
    assert action is not None
    count = f"{len(alive)} micro-batch{'es' if len(alive) != 1 else ''}"
    return (
        '<div class="panels">'
        f'<section class="panel free"><h3>Alive at the peak <small>{count}, in {escaped(action.words)}</small></h3>'
        f"{draw_bars(rows, [''], has_key=False)}</section>"
        '<section class="panel free"><h3>Largest tensors at the peak <small>all of a shape and origin together</small>'
        f"</h3>{table(['bytes', 'shape, type, made by'], largest, kind='sizes')}</section></div>"
    )


def _all_ranks(plan: Plan, figures: Mapping[str, Any]) -> str:
    """The peaks of all ranks of a pipeline; nothing for a run without one."""
    if plan.config.parallel.pp == 1:
        return ""
    most, has_reserve = max(figures[AS_WRITTEN]["peak_bytes"]), _is_reserve_shown(figures)
    rows = []
    for number, rank in enumerate(plan.ranks):
        sizes = {**breakdown.components(rank), **rank.step.by_component}
        parts = [
            Part(name, sizes[name], color, short_bytes(sizes[name]))
            for name, color in COLORS.items()
            if sizes.get(name, 0) >= _LEAST * most and (has_reserve or name != "reserve")
        ]
        total = figures["memory"][number]["total"]
        rows.append(Row(f"rank {number}", [parts], [short_bytes(total)]))
    return (
        '<section class="panel free"><h3>Every rank of the pipeline at its own peak'
        f"{'' if has_reserve else ' <small>the bars without the reserve</small>'}</h3>"
        f"{draw_bars(rows, ['peak'], _limit(figures, most) if has_reserve else None)}</section>"
    )
