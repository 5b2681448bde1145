"""When the gradients of each slice of the model are complete, as each rank's list has it.

What ranks do with complete gradients they do together, some in the middle of their lists: a sum over the replicas of a
slice, which waits for all of them. So it has a place in every list, which all ranks derive alike. Moments are those of
`rounds`. A slice is complete at the moment m at which the last of its weight gradients is done, on whichever rank. Is m
the end of an action on every rank that has the slice, then there is its place, behind the rounds of moment m and of
earlier ones. Else it comes behind all that the rank does.

Why nobody waits in a circle, even if each call stopped its host: a rank in the sum of moment m waits for one that
stands before its own place of it, in a round of m or an earlier moment or in the sum of an earlier one. A rank in a
round of moment a waits for one whose round is the first not earlier than a, or is not later than a; if that one stands
in a sum before its round, then in one of a moment earlier than a, as the sum's moment is one of its own. So moments
fall, as in `rounds`. (What comes behind all else waits for nothing that is behind it.)
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache
from typing import NamedTuple

from parallel.pipeline.order import messages
from parallel.pipeline.rounds import clock
from parallel.pipeline.schedule import Schedule


class Completion(NamedTuple):
    """A slice of the model has all its gradients. moment: behind whose rounds that is known; infinite behind all."""

    moment: float
    position: int


@lru_cache(maxsize=8)  # a run has one list for a step of each size
def completions(schedule: Schedule) -> tuple[dict[int, tuple[Completion, ...]], ...]:
    """For each rank: number of an action of its list, or how many there are, to the slices that are complete before
    it, in the order in which all ranks that have them meet them. Every slice comes once on every rank."""
    moments, made = clock(schedule, messages(schedule))
    placement, done = schedule.placement, dict[int, int]()
    holders: dict[int, set[int]] = defaultdict(set)
    for stage, rank in enumerate(placement.rank_of):
        holders[placement.position(stage)].add(rank)
    for chunk, moment in made.items():
        if chunk.kind == "W":
            position = placement.position(chunk.stage)
            done[position] = max(moment, done.get(position, 0))
    found = []
    for rank, actions in enumerate(schedule.ranks):
        at: dict[int, list[Completion]] = defaultdict(list)
        for position in sorted(done):
            moment = done[position]
            if rank in holders[position] and all(moments[each].get(moment, 1) % 2 == 0 for each in holders[position]):
                at[moments[rank][moment] // 2].append(Completion(moment, position))
            else:
                at[len(actions)].append(Completion(math.inf, position))
        found.append({place: tuple(sorted(each)) for place, each in at.items()})
    return tuple(found)
