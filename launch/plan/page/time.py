"""Where the time of a step and of a pair goes, in all three sets of kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from launch.plan.answer import WORDS
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN, BOUND, KERNELS, PUBLISHED
from launch.plan.page.words import duration, milliseconds
from train.view.report.bars import Part, Row, draw_bars
from train.view.report.document import escaped

# The colours of the three sets, of the parts of a step, of what ranks do and of nodes, by number.
SETS = {AS_WRITTEN: 1, PUBLISHED: 0, BOUND: 2}
PARTS = {"1F": 1, "1B": 9, "1W": 7, "1F1B": 2, "bubble": 10, "optimizer": 5}
DOES = {
    "products": 0,
    "attention": 2,
    "passes over memory": 1,
    "waits for exchanges": 4,
    "waits for its host": 3,
    "waits for neighbours": 10,
    "optimizer": 5,
}
NODES = {
    "attention": 2,
    "experts": 0,
    "dense": 7,
    "router": 9,
    "dispatch": 1,
    "combine": 6,
    "waits for exchanges": 4,
    "waits for the host": 3,
    "other": 10,
}
_WAIT = "waits for "
# Pieces below this share of a pair in every set are told together.
_LEAST = 0.004


def action_of(plan: Plan) -> str:
    """What the pieces are of, in words."""
    kind = "pair of forward and backward" if plan.step(AS_WRITTEN).has_pairs else "forward and backward"
    return f"a middle rank's {kind}" if plan.config.parallel.pp > 1 else f"a {kind}"


def inside(plan: Plan) -> str:
    """What the pieces are of, in words and by its name, as HTML."""
    pair = plan.step(AS_WRITTEN).pair
    words = pair[0].words if len(pair) == 1 else " ".join(map(str, pair))
    return f"inside {action_of(plan)}, {escaped(words)}"


def time_section(plan: Plan, figures: Mapping[str, Any]) -> str:
    """The most frequent action piece by piece, and each rank's time."""
    return (
        "<h2>Time</h2>"
        f'<section class="panel free"><h3>By layer, node and pass <small>in milliseconds; {inside(plan)}; F forward, '
        f"B backward for the input, W weight gradients</small></h3>{_pieces(figures)}</section>"
        f'<div class="panels">{_ranks(plan, figures, AS_WRITTEN)}{_ranks(plan, figures, PUBLISHED)}</div>'
    )


def step_rows(figures: Mapping[str, Any]) -> list[Row]:
    """The step by the published table's parts, in each set."""
    rows = []
    for kernels in KERNELS:
        column = figures[kernels]
        parts = [Part(name, value, PARTS[name], duration(value)) for name, value in column["parts_s"].items()]
        rows.append(Row(WORDS[kernels], [parts], [duration(column["step_s"])]))
    return rows


def _ranks(plan: Plan, figures: Mapping[str, Any], kernels: str) -> str:
    rows = []
    for rank, times in enumerate(figures[kernels]["rank_time_s"]):
        parts = [Part(name, value, DOES[name], duration(value)) for name, value in times.items()]
        busy = sum(value for name, value in times.items() if not name.startswith(_WAIT) and name != "optimizer")
        share = busy / figures[kernels]["step_s"]
        rows.append(Row(f"rank {rank}" if plan.config.parallel.pp > 1 else "device", [parts], [f"{share:.1%}"]))
    return (
        f'<section class="panel free"><h3>What each rank does, {WORDS[kernels]} <small>in a step of '
        f"{duration(figures[kernels]['step_s'])}</small></h3>{draw_bars(rows, ['computes'])}</section>"
    )


def node_of(piece: str) -> str:
    """Under which name a piece of a pair is told with others."""
    if piece.startswith(_WAIT):
        return piece if piece.endswith("host") else "waits for exchanges"
    node = piece.split()[1]
    return node if node in NODES else "other"


def node_rows(figures: Mapping[str, Any]) -> list[Row]:
    """The most frequent action by node, in each set."""
    rows = []
    for kernels in KERNELS:
        times: defaultdict[str, float] = defaultdict(float)
        for piece, seconds in figures[kernels]["pair_by_part_s"].items():
            times[node_of(piece)] += seconds
        parts = [Part(name, times[name], color, duration(times[name])) for name, color in NODES.items()]
        rows.append(Row(WORDS[kernels], [parts], [duration(figures[kernels]["pair_s"])]))
    return rows


def _pieces(figures: Mapping[str, Any]) -> str:
    times = {kernels: figures[kernels]["pair_by_part_s"] for kernels in KERNELS}
    names = list(dict.fromkeys(name for kernels in KERNELS for name in times[kernels]))
    names.sort(key=lambda name: -times[AS_WRITTEN].get(name, 0.0))
    least = {kernels: _LEAST * figures[kernels]["pair_s"] for kernels in KERNELS}
    told = [name for name in names if any(times[each].get(name, 0.0) >= least[each] for each in KERNELS)]
    rows = [_piece(name, {each: times[each].get(name, 0.0) for each in KERNELS}) for name in told]
    rest = {each: sum(value for name, value in times[each].items() if name not in told) for each in KERNELS}
    if any(rest.values()):
        rows.append(_piece("all others", rest))
    return draw_bars(rows, [WORDS[kernels] for kernels in KERNELS])


def _piece(name: str, seconds: Mapping[str, float]) -> Row:
    bars = [[Part(WORDS[each], seconds[each], SETS[each], duration(seconds[each]))] for each in KERNELS]
    return Row(name, bars, [milliseconds(seconds[each]) for each in KERNELS])


def differences_section(plan: Plan, figures: Mapping[str, Any]) -> str:
    """The work list; nothing where the published kernels take no less."""
    found = figures["costliest_differences"]
    if not found:
        return ""
    rows = []
    for each in found:
        texts = [milliseconds(each[name]) for name in ("as_written_s", "published_s", "difference_s")]
        parts = [
            Part("published", each["published_s"], SETS[PUBLISHED], duration(each["published_s"])),
            Part("more as written", each["difference_s"], SETS[AS_WRITTEN], duration(each["difference_s"])),
        ]
        rows.append(Row(each["piece"], [parts], texts))
    bars = draw_bars(rows, ["as written", "published", "difference"])
    return (
        f"<h2>What costs most beside the published kernels <small>in milliseconds; {inside(plan)}</small></h2>"
        f'<section class="panel free">{bars}</section>'
    )
