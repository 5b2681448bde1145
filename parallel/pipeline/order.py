"""What must come before what: data dependencies, messages between ranks, and an order in which a schedule can run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from parallel.pipeline.actions import Action, Chunk
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule


class ScheduleError(ValueError):
    """A schedule that no runtime could carry out, or that would not compute the model's gradients."""


class Channel(NamedTuple):
    """A one-way link between two ranks that keeps order; activations (F) and gradients (B) travel apart.

    With both kinds on one link, messages would be consumed in another order than they are produced in ZB-V and
    DualPipe; with two links no schedule here needs tags.
    """

    source: int
    target: int
    kind: str


class Message(NamedTuple):
    """One tensor on a channel: made by `producer` (F or B), the `sent`-th action of the source rank's list, and
    consumed by `consumer`, the `taken`-th action of the target's."""

    producer: Chunk
    consumer: Chunk
    sent: int
    taken: int


def source(placement: Placement, part: Chunk) -> Chunk | None:
    """The chunk whose output an F or B takes as its input or output gradient; None where data or loss come in."""
    at = {"F": placement.before, "B": placement.after}[part.kind](part.stage)
    return None if at is None else Chunk(part.kind, at, part.micro_batch)


def needs(placement: Placement, action: Action) -> tuple[Chunk, ...]:
    """Every F, B or W that must be over before an action can start."""
    needed = []
    for part in action.parts:
        if part.kind == "W":
            needed.append(Chunk("B", part.stage, part.micro_batch))
            continue
        made_by = source(placement, part)
        if made_by is not None:
            needed.append(made_by)
        if part.kind == "B":
            needed.append(Chunk("F", part.stage, part.micro_batch))
    return tuple(chunk for chunk in needed if chunk not in action.parts)


def walk(schedule: Schedule) -> Iterator[tuple[int, Action, tuple[Chunk, ...]]]:
    """All actions as (rank, action, what it needs), in an order in which they can run.

    Ranks never wait for a message to be taken, only for one to arrive. Raises ScheduleError when no rank can go on.
    """
    done: set[Chunk] = set()
    ahead = [
        [(action, needs(schedule.placement, action)) for action in reversed(actions)] for actions in schedule.ranks
    ]
    moved = True
    while moved:
        moved = False
        for rank, rest in enumerate(ahead):
            while rest and done.issuperset(rest[-1][1]):
                action, needed = rest.pop()
                yield rank, action, needed
                done.update(action.parts)
                moved = True
    stuck = [f"rank {rank} at {rest[-1][0]}" for rank, rest in enumerate(ahead) if rest]
    if stuck:
        raise ScheduleError(f"deadlock: {', '.join(stuck)} wait for what never comes")


def messages(schedule: Schedule) -> dict[Channel, list[Message]]:
    """Per channel, by (source, target, kind), its messages in the order in which they are sent.

    Every rank can derive from this, without a word to the others, which receives to post and in which order.
    """
    placement = schedule.placement
    found: dict[Channel, list[Message]] = defaultdict(list)
    index = {
        part: (rank, at)
        for rank, actions in enumerate(schedule.ranks)
        for at, action in enumerate(actions)
        for part in action.parts
    }
    for part, (rank, at) in index.items():
        made_by = source(placement, part) if part.kind != "W" else None
        if made_by is not None and index[made_by][0] != rank:
            sender, sent = index[made_by]
            found[Channel(sender, rank, part.kind)].append(Message(made_by, part, sent, at))
    return {channel: sorted(found[channel], key=lambda message: message.sent) for channel in sorted(found)}


def peak_chunks(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most chunks whose activations are alive at once: from the start of F to the end of W.

    A forward-only schedule keeps none.
    """
    if schedule.forward_only:
        return (0,) * len(schedule.ranks)
    peaks = []
    for actions in schedule.ranks:
        alive = peak = 0
        for action in actions:
            kinds = [part.kind for part in action.parts]
            alive += kinds.count("F")
            peak = max(peak, alive)
            alive -= kinds.count("W")
        peaks.append(peak)
    return tuple(peaks)
