"""1F1B and interleaved 1F1B: fill with forwards, then one forward, one backward in turn, or as a pair; then drain.

Pairs need a forward that does not wait for the backward next to it, hence a longer fill: a micro-batch that goes one
rank further takes a whole pair each way, and one more forward makes the two of a pair independent.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule

Turn = tuple[int, int]  # (stage, micro-batch)


def one_f_one_b(placement: Placement, num_micro_batches: int, pairs: bool = False) -> Schedule:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): rank r runs num_ranks - 1 - r forwards ahead.

    Bubble (P-1)(F+D) on P ranks, at most P activations. With pairs 2 (P-1-r) + 1 ahead and at most 2 P activations.
    Any number of micro-batches. placement: `loop` with one stage per rank.
    """
    num_ranks = placement.num_ranks
    ranks = []
    for rank in range(num_ranks):
        (stage,) = placement.stages_on(rank)
        turns = [(stage, micro_batch) for micro_batch in range(num_micro_batches)]
        hops = num_ranks - 1 - rank
        ranks.append(_one_each(turns, turns, 2 * hops + 1 if pairs else hops, pairs))
    return Schedule("1f1b", placement, (num_micro_batches,), tuple(ranks))


def interleaved_1f1b(placement: Placement, num_micro_batches: int, pairs: bool = False) -> Schedule:
    """Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): a rank's v stages take turns, P micro-batches each.

    Bubble (P-1)(F+D)/v. placement: `loop` with v stages per rank. ValueError unless the number of micro-batches is a
    multiple of the number of ranks. With pairs it is the order behind Megatron-Core's combined 1F1B.
    """
    num_ranks = placement.num_ranks
    num_rounds, rest = divmod(num_micro_batches, num_ranks)
    if rest:
        legal = num_rounds * num_ranks
        raise ValueError(
            f"pipeline.num_micro_batches={num_micro_batches} with pipeline.schedule=interleaved_1f1b must be a "
            f"multiple of parallel.pp={num_ranks}, such as {f'{legal} or ' if legal else ''}{legal + num_ranks}"
        )
    ranks = []
    for rank in range(num_ranks):
        stages = placement.stages_on(rank)
        forwards, backwards = _in_rounds(stages, num_ranks, num_rounds), _in_rounds(stages[::-1], num_ranks, num_rounds)
        num_ahead = 2 * (num_ranks - 1 - rank) + (len(stages) - 1) * num_ranks + (1 if pairs else 0)
        ranks.append(_one_each(forwards, backwards, num_ahead, pairs))
    return Schedule("interleaved_1f1b", placement, (num_micro_batches,), tuple(ranks))


def _in_rounds(stages: Sequence[int], num_ranks: int, num_rounds: int) -> list[Turn]:
    """`num_ranks` micro-batches through each stage in turn, then the next `num_ranks`."""
    return [
        (stage, first + index)
        for first in range(0, num_rounds * num_ranks, num_ranks)
        for stage in stages
        for index in range(num_ranks)
    ]


def _one_each(forwards: Sequence[Turn], backwards: Sequence[Turn], num_ahead: int, pairs: bool) -> tuple[Action, ...]:
    """`num_ahead` forwards, then a forward and a backward until the forwards are over, then the other backwards."""
    f = [Chunk("F", *turn) for turn in forwards]
    d = [Chunk("D", *turn) for turn in backwards]
    num_ahead = min(num_ahead, len(f))
    actions: list[Action] = list(f[:num_ahead])
    for forward, backward in zip(f[num_ahead:], d, strict=False):
        actions += [Pair(forward, backward)] if pairs else [forward, backward]
    return (*actions, *d[len(f) - num_ahead :])
