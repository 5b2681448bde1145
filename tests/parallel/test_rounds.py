"""Rounds of messages between stages: complete, in one order at both ends, and never waiting in a circle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

from parallel.pipeline.order import Channel, Message, messages
from parallel.pipeline.registry import FAMILIES, build, build_alone, build_forward, build_one_way
from parallel.pipeline.rounds import Round, rounds
from parallel.pipeline.schedule import Schedule

# What a call brings to others, and what of others it waits for.
Call = tuple[set[Any], set[Any]]


def call_of(each: Round, column: int = 0) -> Call:
    """A round as ends of messages."""
    sends = {("send", column, *sent) for sent in each.sends}
    receives = {("receive", column, *sent) for sent in each.receives}
    met = {("receive", *end[1:]) for end in sends} | {("send", *end[1:]) for end in receives}
    return sends | receives, met


def stuck(lists: Sequence[Sequence[Call]]) -> list[int]:
    """Ranks that hang by NCCL's rules at their strictest.

    A rank's calls run one after the other, and each stops the rank until it is over: when all that it meets in other
    ranks' calls has begun, too. What has begun never ends otherwise, so it does not matter which rank moves first.
    """
    at = [0] * len(lists)
    begun: set[Any] = set()
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(lists):
            if at[rank] == len(own):
                continue
            (brings, meets), before = own[at[rank]], len(begun)
            begun |= brings
            moved |= len(begun) > before
            if meets <= begun:
                at[rank] += 1
                moved = True
    return [rank for rank, own in enumerate(lists) if at[rank] < len(own)]


def with_experts(schedule: Schedule, lists: Sequence[Sequence[Round]], num_columns: int) -> list[list[Call]]:
    """The calls of several pipelines side by side, whose ranks of one stage share experts: in the middle of each F and
    B, and twice in a pair, all of them exchange rows, in a call of another communicator."""
    calls = []
    for column, (rank, own) in product(range(num_columns), enumerate(lists)):
        placed: list[tuple[float, int, Call]] = [(each.place, 0, call_of(each, column)) for each in own]
        for at, action in enumerate(schedule.ranks[rank]):
            for turn in range(sum(part.kind != "W" for part in action.parts)):
                everyone = [("rows", rank, at, turn, other) for other in range(num_columns)]
                placed.append((2 * at + 0.5, turn, ({everyone[column]}, set(everyone))))
        calls.append([call for _, _, call in sorted(placed, key=lambda entry: entry[:2])])
    return calls


def all_schedules(most_ranks: int) -> list[Schedule]:
    found = []
    for name, num_ranks in product(FAMILIES, range(1, most_ranks + 1)):
        for num_micro_batches in (1, 2, 3, num_ranks, 2 * num_ranks, 3 * num_ranks + 1, 4 * num_ranks + 2):
            for pairs, per_rank in product((None, True, False), (None, 3)):
                try:
                    found.append(build(name, num_ranks, num_micro_batches, pairs, per_rank))
                except ValueError:
                    continue  # sizes that this schedule does not take
            found.append(build_forward(name, num_ranks, num_micro_batches) if _has(name, num_ranks) else found[-1])
        if _has(name, num_ranks):
            found.append(build_alone(build_forward(name, num_ranks, 1).placement))
        if num_ranks % 2 == 0:
            found.append(build_one_way(num_ranks, num_ranks))
    return list({schedule.text(): schedule for schedule in found}.values())


def _has(name: str, num_ranks: int) -> bool:
    return name != "dualpipe" or num_ranks % 2 == 0 or num_ranks == 1


def check(schedule: Schedule) -> None:
    lists = rounds(schedule)
    assert stuck([list(map(call_of, own)) for own in lists]) == []
    assert stuck(with_experts(schedule, lists, num_columns=2)) == []
    ends: dict[Channel, list[tuple[str, Message]]] = {channel: [] for channel in messages(schedule)}
    for rank, own in enumerate(lists):
        places = [each.place for each in own]
        assert places == sorted(places)
        # Between two ranks one way, of both kinds: NCCL knows messages by their order alone.
        for peer in {peer for each in own for peer in each.peers}:
            out = [each for part in own for each in part.sends if each[0].target == peer]
            into = [each for part in lists[peer] for each in part.receives if each[0].source == rank]
            assert out == into
        for each in own:
            assert each.sends or each.receives
            for channel, message in each.sends:
                assert channel.source == rank
                ends[channel].append(("send", message))
                # Sent as soon as it is there: behind the action, or inside one that has more to do than it.
                whole = schedule.ranks[rank][message.sent]
                assert each.place == 2 * message.sent + (1 if whole.kind == "D" else 2)
            for channel, message in each.receives:
                assert channel.target == rank
                ends[channel].append(("receive", message))
                assert each.place <= 2 * message.taken, "before it is taken"
    for channel, sent in messages(schedule).items():
        assert Counter(ends[channel]) == Counter((end, message) for message in sent for end in ("send", "receive"))


def most_waiting(own: Sequence[Round]) -> int:
    """The most tensors that have memory, as their receives are launched, and wait for an action to take them."""
    changes = [(each.place, 1) for each in own for _ in each.receives]
    changes += [(2 * message.taken, -1) for each in own for _, message in each.receives]
    most = held = 0
    for _, change in sorted(changes, key=lambda entry: (entry[0], -entry[1])):
        held += change
        most = max(most, held)
    return most


def test_every_schedule_can_be_exchanged_in_rounds() -> None:
    schedules = all_schedules(6)
    assert len(schedules) > 300
    for schedule in schedules:
        check(schedule)


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe", "dualpipev"])
def test_many_ranks(name: str) -> None:
    check(build(name, 16, 64))


@pytest.mark.slow
def test_every_schedule_of_up_to_twelve_ranks() -> None:
    for schedule in all_schedules(12):
        check(schedule)


def at_need(schedule: Schedule) -> list[list[Round]]:
    """A call for every message: sent when it is there, received when it is taken."""
    return _by_places(schedule, lambda message: 2 * message.taken)


def ahead(schedule: Schedule) -> list[list[Round]]:
    """The same with all receives before the first action, each in a call of its own."""
    return _by_places(schedule, lambda message: 0)


def _by_places(schedule: Schedule, received: Callable[[Message], int]) -> list[list[Round]]:
    lists: list[list[Round]] = [[] for _ in schedule.ranks]
    for channel, sent in messages(schedule).items():
        for message in sent:
            lists[channel.source].append(Round(2 * message.sent + 1, ((channel, message),), ()))
            lists[channel.target].append(Round(received(message), (), ((channel, message),)))
    return [sorted(own, key=lambda each: each.place) for own in lists]


@pytest.mark.parametrize("policy", [at_need, ahead])
def test_the_model_finds_what_hangs(policy: Callable[[Schedule], list[list[Round]]]) -> None:
    """Calls of one message each hang in every training schedule of two ranks and more."""
    for name in ("1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev", "interleaved_1f1b"):
        assert stuck([list(map(call_of, own)) for own in policy(build(name, 4, 8))]), name


def test_few_wait_to_be_taken() -> None:
    """Receives are not launched long ahead: about as many tensors lie there as results would in the simulation."""
    for name in ("1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev"):
        few, many = (build(name, 8, num) for num in (16, 64))
        most = [most_waiting(own) for own in rounds(many)]
        assert most == [most_waiting(own) for own in rounds(few)], "a longer step holds no more"
        assert max(most) <= 4, (name, most)
