"""ZB-H1 and ZB-V: weight gradients wait until a rank would idle (Qi et al., arXiv 2401.10241 and 2405.15362)."""

from __future__ import annotations

from parallel.pipeline.actions import Action
from parallel.pipeline.placement import Placement
from parallel.pipeline.rank_list import RankList
from parallel.pipeline.schedule import Schedule


def zb_h1(placement: Placement, num_micro_batches: int) -> Schedule:
    """ZB-H1, the DeepSeek-V3 report's ZB1P: 1F1B in which rank r's weight gradients come r micro-batches late.

    Bubble (P-1)(F+D-2W) where B >= F, with 1F1B's activations. Any number of micro-batches. placement: `loop`.
    """
    ranks = []
    for rank in range(placement.num_ranks):
        (stage,) = placement.stages_on(rank)
        num_ahead = min(placement.num_ranks - 1 - rank, num_micro_batches)
        rank_list = RankList()
        for _ in range(num_ahead):
            rank_list.forward(stage)
        for micro_batch in range(num_micro_batches):
            if num_ahead + micro_batch < num_micro_batches:
                rank_list.forward(stage)
            rank_list.input_gradient(stage)
            if micro_batch >= rank:
                rank_list.weight_gradient()
        while rank_list.num_waiting:
            rank_list.weight_gradient()
        ranks.append(tuple(rank_list.actions))
    return Schedule("zb_h1", placement, (num_micro_batches,), tuple(ranks))


def zbv(placement: Placement, num_micro_batches: int) -> Schedule:
    """ZB-V: two stages per rank in a V, 1F1B's activations, next to no bubble where F = B = W. placement: `vee`.

    The order is made for at least 2 P - 1 micro-batches; fewer run the same order with the missing ones left out.
    """
    full = max(num_micro_batches, 2 * placement.num_ranks - 1)
    ranks = tuple(
        tuple(action for action in _zbv_rank(placement, rank, full) if _is_below(action, num_micro_batches))
        for rank in range(placement.num_ranks)
    )
    return Schedule("zbv", placement, (num_micro_batches,), ranks)


def _is_below(action: Action, num_micro_batches: int) -> bool:
    return action.parts[0].micro_batch < num_micro_batches


def _zbv_rank(placement: Placement, rank: int, num_micro_batches: int) -> list[Action]:
    down, up = placement.stages_on(rank)
    num_to_fold = placement.num_ranks - rank
    rank_list = RankList()

    def backward(stage: int) -> None:
        # Not a D: the gradient must leave before W starts.
        rank_list.input_gradient(stage)
        rank_list.weight_gradient()

    for _ in range(2 * num_to_fold - 1):
        rank_list.forward(down)
    for _ in range(rank):
        rank_list.forward(up)
        rank_list.forward(down)
    for _ in range(num_to_fold):
        rank_list.forward(up)
        backward(up)
    num_down, num_up = 2 * placement.num_ranks - 1 - rank, placement.num_ranks  # forwards so far
    for index in range(num_up, num_micro_batches):
        if num_down + index - num_up < num_micro_batches:
            rank_list.forward(down)
        backward(down)
        rank_list.forward(up)
        backward(up)
    for _ in range(rank):
        rank_list.input_gradient(down)
        rank_list.input_gradient(up)
    for _ in range(num_to_fold):
        rank_list.input_gradient(down)
        rank_list.weight_gradient(down)
    for stage in (up, down):
        for _ in range(rank):
            rank_list.weight_gradient(stage)
    return rank_list.actions
