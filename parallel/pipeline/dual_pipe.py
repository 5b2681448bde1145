"""DualPipe (DeepSeek-V3 report, section 3.2.1) and DualPipeV (its half), from one order of eight steps.

Each rank holds two stages. `near` is the one that micro-batches meet first, coming from the outer end; `far` lies
behind the middle, where DualPipe's two directions cross and DualPipeV's route turns back. Seen from one rank the two
schedules are the same: what the mirror half sends in DualPipe, the rank's own half sends in DualPipeV.
"""

from __future__ import annotations

from parallel.pipeline.actions import Action
from parallel.pipeline.placement import Placement
from parallel.pipeline.rank_list import RankList
from parallel.pipeline.schedule import Schedule


def dualpipe(placement: Placement, num_micro_batches: int) -> Schedule:
    """Half of the micro-batches enter at either end. placement: `bidirectional`.

    Bubble (P/2-1)(F&B+D-3W) where F = B >= W and F&B <= F+D, at most P + 1 activations, two copies of the weights.
    ValueError unless ranks and micro-batches are even in number and at least two micro-batches come per rank.
    """
    num_ranks = placement.num_ranks
    if num_ranks % 2:
        raise ValueError(
            f"parallel.pp={num_ranks} with pipeline.schedule=dualpipe must be even: each rank needs a mirror rank; "
            f"{num_ranks - 1} and {num_ranks + 1} are, and pipeline.schedule=dualpipev takes any"
        )
    if num_micro_batches % 2:
        above = max(num_micro_batches + 1, 2 * num_ranks)
        raise ValueError(
            f"pipeline.num_micro_batches={num_micro_batches} with pipeline.schedule=dualpipe must be even, one half "
            f"for each direction, such as {above}"
        )
    _check_enough("dualpipe", num_ranks, num_micro_batches)
    per_route = num_micro_batches // 2
    return Schedule("dualpipe", placement, (per_route, per_route), _eight_steps(placement, per_route))


def dualpipev(placement: Placement, num_micro_batches: int) -> Schedule:
    """All micro-batches enter at rank 0 and come back to it. placement: `vee`.

    Bubble (P-1)(F&B+D-3W)/2 where F = B >= W and F&B <= F+D, at most P + 1/2 activations, one copy of the
    weights. ValueError for fewer than two micro-batches per rank.
    """
    _check_enough("dualpipev", placement.num_ranks, num_micro_batches)
    return Schedule("dualpipev", placement, (num_micro_batches,), _eight_steps(placement, num_micro_batches))


def _check_enough(name: str, num_ranks: int, num_micro_batches: int) -> None:
    if num_micro_batches < 2 * num_ranks:
        raise ValueError(
            f"pipeline.num_micro_batches={num_micro_batches} with pipeline.schedule={name} must be at least "
            f"2 * parallel.pp = {2 * num_ranks}; pipeline.schedule=zb_h1 and 1f1b take any number"
        )


def _eight_steps(placement: Placement, per_route: int) -> tuple[tuple[Action, ...], ...]:
    return tuple(_rank(placement, rank, per_route) for rank in range(placement.num_ranks))


def _rank(placement: Placement, rank: int, per_route: int) -> tuple[Action, ...]:
    """The order of github.com/deepseek-ai/DualPipe, `DualPipe.step`, as a list.

    per_route: number of micro-batches through each of the rank's two stages. A B followed by its W is not a D: the
    gradient must leave before W starts, or every rank further on waits.
    """
    near, far = placement.stages_on(rank)
    half = placement.num_slices // 2
    inward = half - 1 - placement.position(near)  # number of ranks between this one and the middle
    outward = placement.position(near) + 1  # this rank and those outside it
    first = {stage: placement.route_of(stage) * per_route for stage in (near, far)}
    do = RankList(first)
    for _ in range(2 * inward):  # 1
        do.forward(near)
    for _ in range(outward):  # 2
        do.forward(near)
        do.forward(far)
    for _ in range(inward):  # 3
        do.input_gradient(far)
        do.weight_gradient()
        do.forward(far)
    for index in range(per_route - 2 * half + outward):  # 4
        if index == 0 and inward == 0:
            # In the middle the first backward has only just become possible: its gradient must not wait for a forward.
            do.forward(near)
            do.backward(far)
        else:
            do.pair(near, far)
        do.pair(far, near)
    for _ in range(inward):  # 5
        do.backward(far)
        do.pair(far, near)
    for index, stage in enumerate((far, near) * outward):  # 6
        if index < outward:
            do.backward(stage)
        else:
            do.input_gradient(stage)
    for _ in range(inward):  # 7
        do.weight_gradient()
        do.input_gradient(near)
    while do.num_waiting:  # 8
        do.weight_gradient()
    return tuple(do.actions)
