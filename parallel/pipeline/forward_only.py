"""Forward lists over any placement, for evaluation."""

from __future__ import annotations

from parallel.pipeline.actions import Chunk
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule


def forward_only(placement: Placement, num_micro_batches: int) -> Schedule:
    """Every micro-batch through every stage of its route, forward only; any number of micro-batches.

    A timetable: each micro-batch enters at the first tick from which it can move one stage per tick without ever
    meeting another on a rank, routes in turn. All messages of a channel take one tick, hence arrive in order; and
    sorted by tick, every action comes after those that it needs, hence no deadlock. Routes share the micro-batches
    evenly, the first ones take one more.
    """
    num_routes = len(placement.routes)
    per_route = tuple((num_micro_batches + num_routes - 1 - k) // num_routes for k in range(num_routes))
    firsts = [sum(per_route[:k]) for k in range(num_routes)]
    rows = range(per_route[0])
    in_turn = [(k, firsts[k] + row) for row in rows for k in range(num_routes) if row < per_route[k]]
    timetables: list[dict[int, Chunk]] = [{} for _ in range(placement.num_ranks)]
    enters = 0
    for route, micro_batch in in_turn:
        stops = [(placement.rank_of[stage], stage) for stage in placement.routes[route]]
        while any(enters + at in timetables[rank] for at, (rank, _) in enumerate(stops)):
            enters += 1
        for at, (rank, stage) in enumerate(stops):
            timetables[rank][enters + at] = Chunk("F", stage, micro_batch)
    ranks = tuple(tuple(timetable[tick] for tick in sorted(timetable)) for timetable in timetables)
    return Schedule("forward_only", placement, per_route, ranks, forward_only=True)
