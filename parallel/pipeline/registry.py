"""Schedules by name, as the config has them, and every rule about their sizes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from parallel.pipeline.actions import Chunk
from parallel.pipeline.dual_pipe import dualpipe, dualpipev
from parallel.pipeline.forward_only import forward_only
from parallel.pipeline.one_f_one_b import interleaved_1f1b, one_f_one_b
from parallel.pipeline.placement import Placement, bidirectional, loop, vee
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.zero_bubble import zb_h1, zbv


@dataclass(frozen=True)
class Family:
    """place: number of ranks -> placement; generate: (placement, number of micro-batches) -> schedule.

    with_pairs: the generator of the same schedule with pairs, where there is one.
    has_pairs: whether the schedule is published with pairs, so that `generate` makes them.
    """

    place: Callable[[int], Placement]
    generate: Callable[[Placement, int], Schedule]
    with_pairs: Callable[[Placement, int], Schedule] | None = None
    has_pairs: bool = False


FAMILIES = {
    "1f1b": Family(loop, one_f_one_b, lambda placement, num: one_f_one_b(placement, num, pairs=True)),
    "interleaved_1f1b": Family(
        loop, interleaved_1f1b, lambda placement, num: interleaved_1f1b(placement, num, pairs=True)
    ),
    "zb_h1": Family(loop, zb_h1),
    "zbv": Family(vee, zbv),
    "dualpipe": Family(bidirectional, dualpipe, dualpipe, has_pairs=True),
    "dualpipev": Family(vee, dualpipev, dualpipev, has_pairs=True),
}
NAMES = tuple(FAMILIES)
INTERLEAVED = "interleaved_1f1b"


def place(name: str, num_ranks: int, stages_per_rank: int | None = None) -> Placement:
    """Where a schedule of this name has its stages. One rank holds one stage under every name.

    stages_per_rank: for interleaved_1f1b only, 2 where it is None. ValueError names field, value and what is legal.
    """
    family = _family(name)
    _check_count("parallel.pp", num_ranks)
    if stages_per_rank is not None:
        _check_count("pipeline.stages_per_rank", stages_per_rank)
        if name != INTERLEAVED:
            raise ValueError(
                f"pipeline.stages_per_rank={stages_per_rank} belongs to pipeline.schedule={INTERLEAVED}: "
                f"the placement of {name} is fixed"
            )
        if stages_per_rank == 1:
            raise ValueError(
                f"pipeline.stages_per_rank=1 with pipeline.schedule={INTERLEAVED} must be at least 2; "
                "one stage per rank is pipeline.schedule=1f1b"
            )
    if num_ranks == 1:
        return loop(1)
    if name == INTERLEAVED:
        return loop(num_ranks, stages_per_rank or 2)
    return family.place(num_ranks)


def build(
    name: str,
    num_ranks: int,
    num_micro_batches: int,
    pairs: bool | None = None,
    stages_per_rank: int | None = None,
) -> Schedule:
    """A training schedule by the name that `pipeline.schedule` gives it.

    num_micro_batches: of one pipeline and one step, over all its routes. pairs: None as published; True or False to
    have forward and backward run together or one after the other. On one rank every name is the same: F and D in turn,
    with pairs each D together with the next F.

    ValueError names field, value and what would be legal, for an unknown name and for sizes that the schedule lacks.
    """
    placement = place(name, num_ranks, stages_per_rank)
    _check_count("pipeline.num_micro_batches", num_micro_batches)
    family = _family(name)
    wants_pairs = family.has_pairs if pairs is None else pairs
    if wants_pairs and family.with_pairs is None:
        legal = ", ".join(name for name, other in FAMILIES.items() if other.with_pairs)
        raise ValueError(f"pipeline.pairs=true with pipeline.schedule={name}: only {legal} have pairs")
    if num_ranks == 1:
        return replace(one_f_one_b(placement, num_micro_batches, pairs=wants_pairs), name=name)
    generate = family.with_pairs if wants_pairs and family.with_pairs else family.generate
    schedule = generate(placement, num_micro_batches)
    return schedule if wants_pairs else schedule.apart()


def build_one_way(num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B over the first route of dualpipe's placement: for steps with fewer micro-batches than dualpipe takes."""
    _check_count("pipeline.num_micro_batches", num_micro_batches)
    straight = one_f_one_b(loop(num_ranks), num_micro_batches)
    return replace(straight, placement=bidirectional(num_ranks), num_micro_batches=(num_micro_batches, 0))


def build_alone(placement: Placement) -> Schedule:
    """One micro-batch along the first route and back, nothing else under way."""
    ranks: list[list[Chunk]] = [[] for _ in range(placement.num_ranks)]
    route = placement.routes[0]
    for kind, stages in (("F", route), ("D", tuple(reversed(route)))):
        for stage in stages:
            ranks[placement.rank_of[stage]].append(Chunk(kind, stage, 0))
    counts = (1,) + (0,) * (len(placement.routes) - 1)
    return Schedule("alone", placement, counts, tuple(map(tuple, ranks)))


def build_forward(name: str, num_ranks: int, num_micro_batches: int, stages_per_rank: int | None = None) -> Schedule:
    """The evaluation lists over the placement of a schedule of this name; any number of micro-batches."""
    placement = place(name, num_ranks, stages_per_rank)
    _check_count("number of micro-batches", num_micro_batches)
    return forward_only(placement, num_micro_batches)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"pipeline.schedule={name} is not one of {', '.join(NAMES)}{hint}")
    return FAMILIES[name]


def _check_count(field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} must be a whole number, 1 or more")
