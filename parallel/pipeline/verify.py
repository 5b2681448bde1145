"""Proof that a schedule can be run and computes the model's gradients, whatever the timing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from parallel.pipeline.actions import Chunk
from parallel.pipeline.order import Channel, ScheduleError, messages, peak_chunks
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import simulate


@dataclass(frozen=True)
class Proof:
    """What a runtime must provide for a schedule.

    peak_chunks: per rank, most chunks whose activations are alive at once.
    peak_activations: the same in units of one micro-batch through 1 / num_ranks of the model.
    receive_slots: per channel, receive buffers with which no result waits at its sender when all chunks cost the same
        and links nothing. One per channel is enough never to deadlock.
    """

    peak_chunks: tuple[int, ...]
    peak_activations: tuple[float, ...]
    receive_slots: dict[Channel, int]


def verify(schedule: Schedule) -> Proof:
    """Raises ScheduleError, naming rank and action, unless

    - each micro-batch has its F, B and W on every stage of its route once (forward-only: its F), and nothing else is;
    - every action is on the rank that holds its stage;
    - on each rank F comes before B before W of the same stage and micro-batch;
    - the ranks never wait for each other in a circle;
    - each channel's messages are taken in the order in which they are sent, so that no tags are needed.
    """
    _check_ranks(schedule)
    _check_complete(schedule)
    _check_kinds_in_order(schedule)
    result = simulate(schedule)  # refuses a deadlock
    _check_first_in_first_out(schedule)
    return Proof(peak_chunks(schedule), result.peak_activations, result.receive_slots())


def _check_ranks(schedule: Schedule) -> None:
    placement = schedule.placement
    if len(schedule.ranks) != placement.num_ranks:
        raise ScheduleError(f"{len(schedule.ranks)} lists for {placement.num_ranks} ranks")
    if len(schedule.num_micro_batches) != len(placement.routes):
        raise ScheduleError(f"micro-batches {schedule.num_micro_batches} for {len(placement.routes)} routes")
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            for part in action.parts:
                if part.stage >= placement.num_stages:
                    raise ScheduleError(f"rank {rank}, {action}: there is no stage {part.stage}")
                owner = placement.rank_of[part.stage]
                if owner != rank:
                    raise ScheduleError(f"rank {rank}, {action}: stage {part.stage} is on rank {owner}")


def _check_complete(schedule: Schedule) -> None:
    found = Counter(part for actions in schedule.ranks for action in actions for part in action.parts)
    wanted = {
        Chunk(kind, stage, micro_batch)
        for route, stages in enumerate(schedule.placement.routes)
        for stage in stages
        for micro_batch in schedule.micro_batches(route)
        for kind in ("F" if schedule.forward_only else "FBW")
    }
    for title, chunks in (
        ("missing", wanted - found.keys()),
        ("not of this schedule", found.keys() - wanted),
        ("more than once", {chunk for chunk, count in found.items() if count > 1}),
    ):
        if chunks:
            some = sorted(chunks, key=lambda chunk: (chunk.stage, chunk.micro_batch, chunk.kind))[:4]
            raise ScheduleError(f"{title}: {', '.join(map(str, some))}{' ...' if len(chunks) > 4 else ''}")


def _check_kinds_in_order(schedule: Schedule) -> None:
    for rank, actions in enumerate(schedule.ranks):
        done: set[Chunk] = set()
        for action in actions:
            for part in action.parts:
                first = {"F": None, "B": "F", "W": "B"}[part.kind]
                if first is not None and Chunk(first, part.stage, part.micro_batch) not in done:
                    raise ScheduleError(f"rank {rank}, {action}: {part} comes before its {first}")
                done.add(part)


def _check_first_in_first_out(schedule: Schedule) -> None:
    for channel, sent in messages(schedule).items():
        for one, next_one in pairwise(sent):
            if one.taken > next_one.taken:
                raise ScheduleError(
                    f"rank {channel.target} takes {next_one.producer} before {one.producer}, but rank {channel.source} "
                    f"sends them the other way round ({'activations' if channel.kind == 'F' else 'gradients'})"
                )
