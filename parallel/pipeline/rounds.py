"""Which messages between stages travel together: each rank's exchanges in a step as data, in an order that cannot hang.

NCCL's sends and receives are kernels. One that waits for its other end occupies multiprocessors, and whatever waits for
the whole device meanwhile (an allocator that gives memory back, a kernel that is loaded) waits for it too. So nothing
may be launched whose end depends on what this rank's host has yet to launch: a step must not hang even if every
exchange stopped the host until it is over. Single sends and receives, each at its own moment, do hang in that sense:
two neighbours that send first, each what the other one takes later.

Here a rank's sends and receives of one moment are one group call, a round. Moments are those of a clock that all ranks
derive from the lists: every F, B and W takes one unit and starts as soon as it can. A result is sent at the moment it
is there, and received in the first round of its target that is not earlier: in time, as its action starts no earlier,
and no sooner than it could arrive.

Why no round waits in a circle. Say that rank A stands in its round of moment a, which waits for B. Either it sends to
B, whose round is then the first one not earlier than a; or it receives from B, whose round is not later than a, as no
round of A lies between. In both cases B stands before that round in one that is earlier than a. So from rank to rank
moments fall, and a circle cannot close. Exchanges between the ranks of one expert group come at the same places of the
same lists, and change nothing in that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import NamedTuple

from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.order import Channel, Message, messages, walk
from parallel.pipeline.schedule import Schedule

Sent = tuple[Channel, Message]


class Round(NamedTuple):
    """One group call of a rank.

    place: where in the rank's list: 2 k is before action k, 2 k + 1 inside it, once its input gradient is sent.
    sends, receives: in the order in which both ends of each have them. moment: of the clock.
    """

    place: int
    sends: tuple[Sent, ...]
    receives: tuple[Sent, ...]
    moment: int = 0

    @property
    def peers(self) -> tuple[int, ...]:
        """Ranks of the pipeline at the other ends."""
        return tuple(sorted({to.target for to, _ in self.sends} | {by.source for by, _ in self.receives}))


def rounds(schedule: Schedule) -> tuple[tuple[Round, ...], ...]:
    """Each rank's rounds, in the order in which it comes to them. Raises ScheduleError for lists that cannot run."""
    sent = messages(schedule)
    moments, made = clock(schedule, sent)
    times = [sorted(each) for each in moments]
    sends: dict[tuple[int, int], list[Sent]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Sent]] = defaultdict(list)
    in_order = sorted(
        (made[message.producer], channel, at) for channel in sent for at, message in enumerate(sent[channel])
    )
    for moment, channel, at in in_order:
        there = times[channel.target]
        arrives = there[bisect_left(there, moment)]
        sends[channel.source, moment].append((channel, sent[channel][at]))
        receives[channel.target, arrives].append((channel, sent[channel][at]))
    return tuple(
        tuple(
            Round(places[moment], tuple(sends[rank, moment]), tuple(receives[rank, moment]), moment)
            for moment in times[rank]
            if (rank, moment) in sends or (rank, moment) in receives
        )
        for rank, places in enumerate(moments)
    )


def clock(schedule: Schedule, sent: dict[Channel, list[Message]]) -> tuple[list[dict[int, int]], dict[Chunk, int]]:
    """When each rank may exchange, as moment to place, and when each F, B and W is done."""
    leaves = {message.producer for each in sent.values() for message in each}
    moments: list[dict[int, int]] = [{} for _ in schedule.ranks]
    free, at = [0] * len(schedule.ranks), [0] * len(schedule.ranks)
    made: dict[Chunk, int] = {}
    for rank, action, needed in walk(schedule):
        moment = max(free[rank], *(made[chunk] for chunk in needed), 0)
        moments[rank][moment] = 2 * at[rank]
        for steps, parts in _stretches(action):
            moment += steps
            made |= dict.fromkeys(parts, moment)
            if parts[-1] != action.parts[-1] and not leaves.isdisjoint(parts):
                moments[rank][moment] = 2 * at[rank] + 1
        at[rank] += 1
        moments[rank][moment] = 2 * at[rank]
        free[rank] = moment
    return moments, made


def _stretches(action: Action) -> list[tuple[int, tuple[Chunk, ...]]]:
    """What of an action is done together, and how many units it takes: a pair's results leave at its end."""
    if isinstance(action, Pair):
        return [(len(action.parts), action.parts)]
    return [(1, (part,)) for part in action.parts]
