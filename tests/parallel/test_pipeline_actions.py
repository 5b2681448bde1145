"""Actions, placements and schedules as values and as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import KINDS, Action, Chunk, Pair, parse_action
from parallel.pipeline.placement import Placement, bidirectional, loop, vee
from parallel.pipeline.schedule import Schedule, parse
from tests.parallel.pipeline_cases import legal_cases, make, make_forward

numbers = st.integers(0, 200)
chunks = st.builds(Chunk, st.sampled_from(KINDS), numbers, numbers)
pairs = st.builds(
    lambda a, b, i, j: Pair(Chunk("F", a, i), Chunk("D", b, i + j)), numbers, numbers, numbers, st.integers(1, 9)
)
actions = st.one_of(chunks, pairs)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any lists over any placement: the text form is not for legal schedules alone."""
    num_ranks = draw(st.integers(1, 4))
    num_routes, num_slices = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    stages = draw(st.permutations(range(num_routes * num_slices)))
    routes = tuple(tuple(stages[k * num_slices : (k + 1) * num_slices]) for k in range(num_routes))
    rank_of = draw(st.lists(st.integers(0, num_ranks - 1), min_size=len(stages), max_size=len(stages)))
    counts = draw(st.lists(st.integers(0, 99), min_size=num_routes, max_size=num_routes))
    lists = draw(st.lists(st.lists(actions, max_size=6), min_size=num_ranks, max_size=num_ranks))
    placement = Placement(num_ranks, routes, tuple(rank_of))
    return Schedule(
        draw(st.sampled_from(["1f1b", "x", "zb-h2"])),
        placement,
        tuple(counts),
        tuple(tuple(own) for own in lists),
        forward_only=draw(st.booleans()),
    )


@settings(deadline=None)
@given(actions)
def test_an_action_reads_back(action: Action) -> None:
    assert parse_action(str(action)) == action


@settings(deadline=None)
@given(schedules())
def test_any_schedule_reads_back(schedule: Schedule) -> None:
    assert parse(schedule.text()) == schedule


@pytest.mark.parametrize("case", legal_cases((1, 2, 4), (2,)), ids=str)
def test_generated_schedules_read_back(case: tuple) -> None:
    assert parse(make(case).text()) == make(case)
    assert parse(make_forward(case).text()) == make_forward(case)


@pytest.mark.parametrize(
    "text",
    ["", "F", "F1", "F1.", "G1.2", "F01.2", "F1.2&", "D1.2&F1.3", "F1.2&D0.2", "F1.2&D1.3&D1.4", "F-1.2", "f1.2"],
)
def test_other_texts_are_no_actions(text: str) -> None:
    with pytest.raises(ValueError, match="F"):
        parse_action(text)


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("schedule 1f1b training", "schedule 1f1b"),
        ("rank 1:", "rank 2:"),
        ("rank 0:", "row 0:"),
        ("0@0", "0"),
        ("F1.0", "X1.0"),
        ("1@1", "1@7"),
        ("1@1", "3@1"),
    ],
)
def test_a_broken_text_is_refused(find: str, put: str) -> None:
    text = make(("1f1b", 2, 4, None, 0)).text()
    assert find in text
    with pytest.raises(ValueError, match=r"\S"):
        parse(text.replace(find, put))


def test_parts_come_in_order() -> None:
    assert Chunk("D", 3, 5).parts == (Chunk("B", 3, 5), Chunk("W", 3, 5))
    pair = Pair(Chunk("F", 0, 7), Chunk("D", 3, 5))
    assert [str(part) for part in pair.parts] == ["F0.7", "B3.5", "W3.5"]
    assert str(pair) == "F0.7&D3.5"


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_placements(num_ranks: int) -> None:
    for stages_per_rank in (1, 2, 3):
        looped = loop(num_ranks, stages_per_rank)
        assert all(looped.stages_on(r) == tuple(range(r, looped.num_stages, num_ranks)) for r in range(num_ranks))
        assert looped.stage_size == pytest.approx(1 / stages_per_rank)
    for rank in range(num_ranks):
        assert vee(num_ranks).stages_on(rank) == (rank, 2 * num_ranks - 1 - rank)
        both = bidirectional(num_ranks)
        assert {both.position(stage) for stage in both.stages_on(rank)} == {rank, num_ranks - 1 - rank}
        assert {both.route_of(stage) for stage in both.stages_on(rank)} == {0, 1}
    # In a V the first and the last stage share a rank, as in DualPipe slice 0 and the last slice do.
    assert vee(num_ranks).rank_of[0] == vee(num_ranks).rank_of[-1] == 0


def test_neighbours_follow_the_route() -> None:
    both = bidirectional(4)
    assert [both.after(stage) for stage in (0, 3, 4, 7)] == [1, None, 5, None]
    assert [both.before(stage) for stage in (0, 3, 4, 7)] == [None, 2, None, 6]


@pytest.mark.parametrize(
    ("routes", "rank_of"),
    [(((0, 1),), (0,)), (((0, 0),), (0, 1)), (((0, 1), (2,)), (0, 1, 0)), (((0, 1),), (0, 2)), ((), ())],
)
def test_impossible_placements_are_refused(routes: tuple, rank_of: tuple) -> None:
    with pytest.raises(ValueError, match=r"routes|ranks"):
        Placement(2, routes, rank_of)
