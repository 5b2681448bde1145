"""The simulator against the papers' closed forms, and against a clock that ticks."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Chunk
from parallel.pipeline.order import messages, needs
from parallel.pipeline.registry import build, build_forward
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Costs, Simulation, simulate
from tests.parallel.pipeline_cases import legal_cases, make

RANKS = range(2, 17)
EXACT = {"abs": 1e-9, "rel": 1e-12}  # sums of a few hundred binary fractions

# (F, B, W, F&B): with B >= F, where the zero-bubble forms hold.
GENERAL = [(1, 1, 1, None), (2, 3, 2, 6), (1, 1.5, 1, 2.5), (2, 2, 1, None), (1, 3, 0.5, None)]
# B = F and W <= F: where DualPipe's form is exact, whatever the pair gains.
BALANCED = [(1, 1, 1, None), (2, 2, 1, None), (3, 3, 1, 5), (1, 1, 1, 2), (1, 1, 1, 2.5), (1.5, 1.5, 1, 3)]


def some(costs: list, num_ranks: int) -> list:
    """Two of the costs for each number of ranks, so that all have their turns."""
    return [costs[num_ranks % len(costs)], costs[(num_ranks + 2) % len(costs)]]


def bubbles(schedule: Schedule, costs: Costs) -> list[float]:
    return list(simulate(schedule, costs).bubble)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_closed_forms_without_pairs(num_ranks: int) -> None:
    for num, (f, b, w, pair) in zip((num_ranks, 2 * num_ranks + 1), some(GENERAL, num_ranks), strict=True):
        costs = Costs(f, b, w, pair)
        one = bubbles(build("1f1b", num_ranks, num), costs)
        assert one == pytest.approx([(num_ranks - 1) * (f + b + w)] * num_ranks, **EXACT)
        zero = bubbles(build("zb_h1", num_ranks, num), costs)
        assert zero == pytest.approx([(num_ranks - 1) * (f + b + w - 2 * w)] * num_ranks, **EXACT)
        for stages in (2, 3):
            whole = num - num % num_ranks
            looped = bubbles(build("interleaved_1f1b", num_ranks, whole, stages_per_rank=stages), costs)
            assert looped == pytest.approx([(num_ranks - 1) * (f + b + w) / stages] * num_ranks, **EXACT)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_closed_forms_with_pairs(num_ranks: int) -> None:
    for num, (f, b, w, pair) in zip((2 * num_ranks, 3 * num_ranks), some(BALANCED, num_ranks), strict=True):
        costs = Costs(f, b, w, pair)
        both = f + b + w if pair is None else pair
        per_hop = both + (b + w) - 3 * w
        halved = simulate(build("dualpipev", num_ranks, num), costs)
        assert max(halved.bubble) == pytest.approx((num_ranks - 1) * per_hop / 2, **EXACT)
        if num_ranks % 2 == 0:
            dual = simulate(build("dualpipe", num_ranks, num), costs)
            assert max(dual.bubble) == pytest.approx((num_ranks / 2 - 1) * per_hop, **EXACT)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_dualpipes_form_is_an_upper_bound_where_b_costs_more_than_f(num_ranks: int) -> None:
    f, b, w = 2.0, 3.0, 2.0
    form = (num_ranks - 1) * (f + b + w + b + w - 3 * w) / 2
    found = max(bubbles(build("dualpipev", num_ranks, 3 * num_ranks), Costs(f, b, w)))
    assert form - 2 * (b - f) <= found <= form


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zbv_halves_dualpipev_where_all_kinds_cost_the_same(num_ranks: int) -> None:
    assert bubbles(build("zbv", num_ranks, 2 * num_ranks), Costs()) == pytest.approx(
        [(num_ranks - 1) / 2] * num_ranks, **EXACT
    )


@pytest.mark.parametrize("num_ranks", RANKS)
def test_pairs_of_interleaved_keep_its_bubble_when_they_gain_nothing(num_ranks: int) -> None:
    for stages in (2, 3):
        paired = build("interleaved_1f1b", num_ranks, 2 * num_ranks, pairs=True, stages_per_rank=stages)
        expected = [3 * (num_ranks - 1) / stages] * num_ranks
        assert bubbles(paired, Costs()) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_peak_activations(num_ranks: int) -> None:
    def peaks(name: str, **more: object) -> list[float]:
        return list(simulate(build(name, num_ranks, 2 * num_ranks, **more)).peak_activations)  # type: ignore[arg-type]

    assert peaks("1f1b") == [num_ranks - rank for rank in range(num_ranks)]
    assert max(peaks("zb_h1")) == num_ranks
    assert max(peaks("zbv")) == num_ranks
    assert max(peaks("dualpipev")) == num_ranks + 0.5
    if num_ranks % 2 == 0:
        assert max(peaks("dualpipe")) == num_ranks + 1
    for stages in (2, 3):
        filled = 2 * (num_ranks - 1) + (stages - 1) * num_ranks + 1
        peak = max(peaks("interleaved_1f1b", stages_per_rank=stages))
        assert peak == pytest.approx(filled / stages)
    assert set(simulate(build_forward("1f1b", num_ranks, 9)).peak_activations) == {0}


def test_dualpipe_is_two_dualpipev() -> None:
    """Renamed stages aside, rank for rank: one generator makes both."""

    def shape(schedule: Schedule, rank: int) -> list[tuple[str, list[tuple[int, int]]]]:
        near, far = schedule.placement.stages_on(rank)
        first = {stage: schedule.micro_batches(schedule.placement.route_of(stage))[0] for stage in (near, far)}
        return [
            (action.kind, [((near, far).index(p.stage), p.micro_batch - first[p.stage]) for p in action.parts])
            for action in schedule.ranks[rank]
        ]

    for half in (1, 2, 4, 7):
        dual, vee = build("dualpipe", 2 * half, 8 * half), build("dualpipev", half, 4 * half) if half > 1 else None
        for rank in range(half):
            mirror = 2 * half - 1 - rank
            assert shape(dual, rank) == shape(dual, mirror)
            if vee is not None:
                assert shape(dual, rank) == shape(vee, rank)


def test_a_pair_gains_in_proportion_and_costs_may_differ_per_stage() -> None:
    schedule = build("1f1b", 2, 4, pairs=True)
    costs = Costs(f=(1, 3), b=(2, 4), w=(1, 1), pair=3)
    # 12 for a whole model, 6 for half of it: a pair of 3 takes half as long as its parts.
    at_last = schedule.ranks[1][1]
    assert str(at_last) == "F1.1&D1.0"
    duration = costs.durations(schedule.placement)
    assert duration(at_last) == pytest.approx((3 + 4 + 1) / 2)
    assert duration(Chunk("D", 0, 0)) == 3
    result = simulate(schedule, costs)
    # Rank 0: 3 forwards ahead, 1 pair, 3 backwards. Rank 1: 1 forward, 3 pairs, 1 backward.
    assert [result.step - idle for idle in result.bubble] == pytest.approx([3 * 1 + 2 + 3 * 3, 3 + 3 * 4 + 5])
    with pytest.raises(ValueError, match=r"cost\.f has 3 costs for 2 stages"):
        simulate(schedule, Costs(f=(1, 2, 3)))


@pytest.mark.parametrize(
    ("costs", "reason"),
    [
        ({"f": -1}, r"cost\.f=-1"),
        ({"pair": float("inf")}, r"cost\.pair=inf"),
        ({"latency": float("nan")}, r"cost\.latency=nan"),
        ({"b": (1, -2)}, r"cost\.b=-2"),
        ({"f": 0, "b": 0, "w": 0}, "above 0"),
    ],
)
def test_impossible_costs_are_refused(costs: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Costs(**costs)


def test_results_that_leave_early_hide_the_links() -> None:
    """Pairs have no slack: a link's latency is paid per pair, unless results leave before the weight gradients."""

    def bubble(num: int, **costs: float) -> float:
        return max(bubbles(build("dualpipev", 8, num), Costs(**costs)))

    assert bubble(32) == bubble(64) == 7
    assert bubble(64, latency=0.1) > bubble(32, latency=0.1) + 4
    assert bubble(64, latency=0.1, early=0.2) == pytest.approx(bubble(32, latency=0.1, early=0.2))
    assert bubble(64, latency=0.1, early=0.2) < 10
    # A stage of half the size has half as much weight gradient left: this hides half of the link.
    assert bubble(64, latency=0.1, early=0.1) > bubble(32, latency=0.1, early=0.1) + 2


def ticking(schedule: Schedule, costs: dict[str, int], latency: int) -> dict[Chunk, tuple[int, int]]:
    """Start and stop of every chunk by looking at each rank at each tick; whole-number costs per stage."""
    at = [0] * len(schedule.ranks)
    free = [0] * len(schedule.ranks)
    times: dict[Chunk, tuple[int, int]] = {}
    owner = schedule.placement.rank_of
    for now in itertools.count():
        if all(index == len(actions) for index, actions in zip(at, schedule.ranks, strict=True)):
            return times
        for rank, actions in enumerate(schedule.ranks):
            while at[rank] < len(actions) and free[rank] <= now:
                action = actions[at[rank]]
                arrived = all(
                    need in times and times[need][1] + (latency if owner[need.stage] != rank else 0) <= now
                    for need in needs(schedule.placement, action)
                )
                if not arrived:
                    break
                free[rank] = now + costs.get(action.kind, sum(costs[part.kind] for part in action.parts))
                times |= dict.fromkeys(action.parts, (now, free[rank]))
                at[rank] += 1
    return times


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(legal_cases((2, 3, 4), (2,))),
    cost=st.tuples(*[st.integers(1, 5)] * 3, st.integers(1, 12)),
    latency=st.integers(0, 4),
)
def test_every_time_is_that_of_a_ticking_clock(case: tuple, cost: tuple[int, int, int, int], latency: int) -> None:
    schedule = make(case)
    whole = Fraction(schedule.placement.num_slices, schedule.placement.num_ranks)
    f, b, w, pair = cost
    result = simulate(schedule, Costs(*(float(c * whole) for c in (f, b, w, pair)), latency=float(latency)))
    times = ticking(schedule, {"F": f, "B": b, "W": w, "pair": pair}, latency)
    for event in result.events:
        for part in event.action.parts:
            assert (event.start_s, event.stop_s) == pytest.approx(times[part], **EXACT)
    check_bookkeeping(result, latency)


def check_bookkeeping(result: Simulation, latency: float) -> None:
    """Step, bubble, peaks and slots once more, from the events alone."""
    schedule = result.schedule
    assert result.step == max(event.stop_s for event in result.events)
    when = {part: event for event in result.events for part in event.action.parts}
    for rank, (idle, peak) in enumerate(zip(result.bubble, result.peak_activations, strict=True)):
        own = [event for event in result.events if event.rank == rank]
        assert all(one.stop_s <= other.start_s + 1e-9 for one, other in itertools.pairwise(own))
        assert idle == pytest.approx(result.step - sum(event.stop_s - event.start_s for event in own), **EXACT)
        lives = [
            (when[part].start_s, when[Chunk("W", part.stage, part.micro_batch)].stop_s)
            for event in own
            for part in event.action.parts
            if part.kind == "F"
        ]
        alive = max(sum(first <= start < last - 1e-9 for first, last in lives) for start, _ in lives)
        assert peak == pytest.approx(alive * schedule.placement.stage_size)
    slots = result.receive_slots()
    for channel, sent in messages(schedule).items():
        spans = [(when[m.producer].stop_s + latency, when[m.consumer].start_s) for m in sent]
        most = max(sum(one <= there + 1e-9 and taken > there + 1e-9 for one, taken in spans) for there, _ in spans)
        assert slots[channel] == max(most, 1)
