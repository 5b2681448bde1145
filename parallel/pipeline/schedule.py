"""A schedule: one list of actions per rank over a placement, as plain data that every reader shares. With text form.

Micro-batches are numbered through all routes of a pipeline: with two routes of 10, the first route's are 0 to 9 and the
second's 10 to 19. So a micro-batch's number alone says its data, and a stage alone says its route.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from parallel.pipeline.actions import Action, Chunk, Pair, parse_action
from parallel.pipeline.placement import Placement

_PURPOSES = ("training", "forward")


@dataclass(frozen=True)
class Schedule:
    """`ranks[r]` is what rank r does, in order; `num_micro_batches[k]` is how many micro-batches take route k.

    With `forward_only` the lists hold no backward (evaluation). Nothing is checked here: see `verify.verify`.
    """

    name: str
    placement: Placement
    num_micro_batches: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]
    forward_only: bool = False

    def micro_batches(self, route: int) -> range:
        """Numbers of the micro-batches that take a route."""
        first = sum(self.num_micro_batches[:route])
        return range(first, first + self.num_micro_batches[route])

    @property
    def has_pairs(self) -> bool:
        return any(isinstance(action, Pair) for actions in self.ranks for action in actions)

    def apart(self) -> Schedule:
        """This schedule with each pair as its forward and then its backward: what overlap is measured against."""
        split = tuple(tuple(chunk for action in actions for chunk in _chunks(action)) for actions in self.ranks)
        return replace(self, ranks=split)

    def text(self) -> str:
        """The schedule as text; `parse` reads it back.

        schedule dualpipev training
        route 0@0 1@1 2@1 3@0 x4       a route's stages, each at its rank; number of micro-batches
        rank 0: F0.0 F0.1 F0.2 F3.0 ...
        """
        lines = [f"schedule {self.name} {_PURPOSES[self.forward_only]}"]
        for route, count in zip(self.placement.routes, self.num_micro_batches, strict=True):
            places = " ".join(f"{stage}@{self.placement.rank_of[stage]}" for stage in route)
            lines.append(f"route {places} x{count}")
        for rank, actions in enumerate(self.ranks):
            lines.append(f"rank {rank}: {' '.join(map(str, actions))}".rstrip())
        return "\n".join(lines) + "\n"


def _chunks(action: Action) -> tuple[Chunk, ...]:
    return (action.forward, action.backward) if isinstance(action, Pair) else (action,)


def parse(text: str) -> Schedule:
    """Reads what `Schedule.text` writes. ValueError, naming the line, for anything else."""
    head, *lines = text.splitlines() or [""]
    title = re.fullmatch(r"schedule (\S+) (training|forward)", head)
    if title is None:
        raise ValueError(f"{head!r} is no first line of a schedule such as 'schedule 1f1b training'")
    routes: list[tuple[int, ...]] = []
    counts: list[int] = []
    rank_of: dict[int, int] = {}
    ranks: list[tuple[Action, ...]] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "route" and not ranks and (found := re.fullmatch(r"((?:\d+@\d+ )+)x(\d+)", rest)):
            places = [(int(stage), int(rank)) for stage, rank in re.findall(r"(\d+)@(\d+)", found[1])]
            routes.append(tuple(stage for stage, _ in places))
            rank_of |= dict(places)
            counts.append(int(found[2]))
        elif word == "rank" and (found := re.fullmatch(rf"{len(ranks)}:((?: \S+)*)", rest)):
            ranks.append(tuple(parse_action(word) for word in found[1].split()))
        else:
            raise ValueError(f"{line!r} is no line of a schedule; expected a route, or rank {len(ranks)}")
    owners = tuple(rank for _, rank in sorted(rank_of.items()))
    placement = Placement(len(ranks), tuple(routes), owners)
    return Schedule(title[1], placement, tuple(counts), tuple(ranks), forward_only=title[2] == "forward")
