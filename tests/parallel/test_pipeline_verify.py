"""The verifier against a toy pipeline that knows none of its rules: on every schedule, and on thousands of edits."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.order import ScheduleError, messages
from parallel.pipeline.registry import build
from parallel.pipeline.schedule import Schedule, parse
from parallel.pipeline.verify import verify
from tests.parallel.pipeline_cases import ToyPipeline, legal_cases, make, make_forward

SIZES = legal_cases((1, 2, 3, 4, 5, 6), (1, 2, 3))
EDITS_PER_SCHEDULE = 150


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_every_schedule_is_right(case: tuple) -> None:
    schedule = make(case)
    verify(schedule)
    assert ToyPipeline(schedule).run()
    verify(make_forward(case))


@pytest.mark.parametrize("num_micro_batches", range(1, 12))
@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv"])
def test_any_number_of_micro_batches(name: str, num_micro_batches: int) -> None:
    for num_ranks in (2, 3, 5):
        schedule = build(name, num_ranks, num_micro_batches)
        verify(schedule)
        assert ToyPipeline(schedule).run()
        if name == "1f1b":
            verify(build(name, num_ranks, num_micro_batches, pairs=True))


@pytest.mark.parametrize("case", [("dualpipe", 16, 120, None, 0), ("dualpipev", 16, 120, None, 0)], ids=str)
def test_the_report_size(case: tuple) -> None:
    verify(make(case))
    assert ToyPipeline(make(case)).run()


def edit(schedule: Schedule, dice: random.Random) -> tuple[str, Schedule]:
    """One random change: drop, duplicate, swap, move, another micro-batch, another rank."""
    ranks = [list(actions) for actions in schedule.ranks]
    kind = dice.choice(["drop", "duplicate", "swap", "move", "micro-batch", "rank", "kind"])
    rank = dice.choice([index for index, actions in enumerate(ranks) if actions])
    at = dice.randrange(len(ranks[rank]))
    action = ranks[rank][at]
    near = min(max(at + dice.choice([-3, -2, -1, 1, 2, 3]), 0), len(ranks[rank]) - 1)
    if kind == "drop":
        del ranks[rank][at]
    elif kind == "duplicate":
        ranks[rank].insert(dice.randrange(len(ranks[rank]) + 1), action)
    elif kind == "swap":
        ranks[rank][at], ranks[rank][near] = ranks[rank][near], action
    elif kind == "move":
        ranks[rank].insert(near, ranks[rank].pop(at))
    elif kind == "rank":
        del ranks[rank][at]
        other = dice.choice([index for index in range(len(ranks)) if index != rank])
        ranks[other].insert(dice.randrange(len(ranks[other]) + 1), action)
    else:
        changed = _changed(action, kind, sum(schedule.num_micro_batches), dice)
        if changed is not None:
            ranks[rank][at] = changed
    return kind, replace(schedule, ranks=tuple(tuple(actions) for actions in ranks))


def _changed(action: Action, kind: str, num_micro_batches: int, dice: random.Random) -> Action | None:
    other = dice.randrange(num_micro_batches + 1)
    try:
        if isinstance(action, Pair):
            if kind == "kind":
                return dice.choice([action.forward, action.backward])
            return dice.choice(
                [
                    Pair(replace(action.forward, micro_batch=other), action.backward),
                    Pair(action.forward, replace(action.backward, micro_batch=other)),
                ]
            )
        if kind == "kind":
            return replace(action, kind=dice.choice("FBWD"))
        return replace(action, micro_batch=other)
    except ValueError:
        return None  # a pair with itself cannot even be written down


def refusal(schedule: Schedule) -> str:
    try:
        verify(schedule)
    except ScheduleError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("case", legal_cases((2, 3, 4), (2,)), ids=str)
def test_every_edit_is_refused_or_proves_harmless(case: tuple) -> None:
    dice = random.Random(str(case))
    schedule = make(case)
    num_refused = num_changed = 0
    for _ in range(EDITS_PER_SCHEDULE):
        kind, edited = edit(schedule, dice)
        if edited == schedule:
            continue
        num_changed += 1
        why = refusal(edited)
        num_refused += bool(why)
        assert bool(why) != ToyPipeline(edited).run(), (kind, why, edited.text())
        if kind in ("drop", "duplicate", "rank", "micro-batch", "kind"):
            assert why, (kind, edited.text())
    assert num_changed > 0.8 * EDITS_PER_SCHEDULE and num_refused > 0.6 * num_changed


def test_forward_lists_neither_lose_nor_displace_a_chunk() -> None:
    schedule = make_forward(("dualpipe", 4, 7, None, 0))
    verify(schedule)
    for rank, actions in enumerate(schedule.ranks):
        for at in range(len(actions)):
            lists = list(schedule.ranks)
            lists[rank] = actions[:at] + actions[at + 1 :]
            assert "missing" in refusal(replace(schedule, ranks=tuple(lists)))
            # On another rank nothing but its stage's place speaks against a lone forward.
            for other in set(range(4)) - {rank}:
                moved = [*lists[:other], (*lists[other], actions[at]), *lists[other + 1 :]]
                assert f"is on rank {rank}" in refusal(replace(schedule, ranks=tuple(moved)))


BASE = """schedule hand training
route 0@0 1@1 x2
rank 0: {}
rank 1: {}
"""


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("F0.0 F0.1 D0.0 D0.1", "F1.0 D1.0 F1.1 D1.1", ""),
        ("F0.0 F0.1 D0.0", "F1.0 D1.0 F1.1 D1.1", "missing: B0.1, W0.1"),
        ("F0.0 F0.1 D0.0 D0.1 W0.1", "F1.0 D1.0 F1.1 D1.1", "more than once: W0.1"),
        ("F0.0 F0.1 D0.0 D0.1", "F1.0 D1.0 F1.1 D1.1 F1.2", "not of this schedule: F1.2"),
        ("F0.0 F0.1 D0.0 D0.1 F1.1", "F1.0 D1.0 D1.1", "rank 0, F1.1: stage 1 is on rank 1"),
        ("F0.0 F0.1 D0.0 D0.1", "F1.0 D1.0 D1.1 F1.1", "rank 1, D1.1: B1.1 comes before its F"),
        ("F0.0 F0.1 W0.0 B0.0 D0.1", "F1.0 D1.0 F1.1 D1.1", "rank 0, W0.0: W0.0 comes before its B"),
        ("F0.0 D0.0 F0.1 D0.1", "F1.0 F1.1 D1.0 D1.1", "deadlock: rank 0 at D0.0, rank 1 at F1.1"),
        ("F0.0 F0.1 D0.0 D0.1", "F1.1 F1.0 D1.0 D1.1", "rank 1 takes F0.1 before F0.0"),
        ("F0.0 F0.1 D0.1 D0.0", "F1.0 D1.0 F1.1 D1.1", "rank 0 takes B1.1 before B1.0"),
        ("F0.0 F0.1 D0.0 D0.1", "F1.0 D1.0 F1.1 D1.1 F5.0", "there is no stage 5"),
    ],
)
def test_the_refusal_says_what_is_wrong(first: str, second: str, reason: str) -> None:
    why = refusal(parse(BASE.format(first, second)))
    assert reason in why and bool(why) == bool(reason)


def test_lists_and_counts_must_fit_the_placement() -> None:
    schedule = build("1f1b", 2, 4)
    assert "lists for 2 ranks" in refusal(replace(schedule, ranks=schedule.ranks[:1]))
    assert "for 1 routes" in refusal(replace(schedule, num_micro_batches=(2, 2)))


@pytest.mark.parametrize("case", legal_cases((2, 4, 6), (2,)), ids=str)
def test_messages_are_those_that_cross_ranks(case: tuple) -> None:
    schedule = make(case)
    placement = schedule.placement
    crossing = {
        (kind, stage, micro_batch)
        for kind in "FB"
        for route, stages in enumerate(placement.routes)
        for stage in stages
        for target in [placement.after(stage) if kind == "F" else placement.before(stage)]
        if target is not None and placement.rank_of[target] != placement.rank_of[stage]
        for micro_batch in schedule.micro_batches(route)
    }
    found = [(channel, message) for channel, sent in messages(schedule).items() for message in sent]
    assert len(found) == len(crossing)
    for channel, message in found:
        made = message.producer
        assert (made.kind, made.stage, made.micro_batch) in crossing and channel.kind == made.kind
        assert made in schedule.ranks[channel.source][message.sent].parts
        assert message.consumer in schedule.ranks[channel.target][message.taken].parts


def test_one_untagged_channel_would_not_do() -> None:
    """Why activations and gradients travel apart: together they are taken in another order than they are sent."""
    sent = messages(build("dualpipev", 4, 8))
    inverted = 0
    for channel in {(channel.source, channel.target) for channel in sent}:
        mixed = sorted((m.sent, m.taken) for key, own in sent.items() if key[:2] == channel for m in own)
        inverted += any(one[1] > other[1] for one, other in pairwise(mixed))
    assert inverted


def test_a_pair_needs_both_inputs_before_it_starts() -> None:
    """In this order the forward of the pair on rank 0 is what the backward of the same pair waits for."""
    text = "schedule hand training\nroute 0@0 1@1 x2\nrank 0: F0.0 F0.1&D0.0 D0.1\nrank 1: F1.0 F1.1 D1.0 D1.1\n"
    assert "deadlock" in refusal(parse(text))
    assert refusal(parse(text).apart()) == ""
    assert parse(text).apart().ranks[0][1:3] == (Chunk("F", 0, 1), Chunk("D", 0, 0))
