"""The clock against the rules of streams, and replayed layers against what can be worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.plan.clock import Clock, Host, Priced
from launch.plan.events import Answer, Calls, Event, Kernel, Launch, LayerPasses, Memory, Read, Turn, Wait
from launch.plan.memory import book, peak_of
from launch.plan.replay import Passes, passes_of, slots, stretches
from launch.plan.step import ActionCosts, run_schedule
from parallel.pipeline.actions import Chunk, Pair
from parallel.pipeline.order import peak_chunks
from parallel.pipeline.registry import build
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Costs, simulate


def kernel(work: str = "move") -> Kernel:
    return Kernel("op", work, "bfloat16", (), 1, 0, 0)


def launch(number: int, group: str = "rail") -> Launch:
    return Launch(number, "exchange", group, 8, 10, 10)


def run(events: list[tuple[Event, float]], host: Host | None = None) -> Clock:
    clock = Clock(host or Host())
    for event, seconds in events:
        clock.see(event, seconds, 0)
    return clock


# --- streams ---


def test_what_is_waited_for_late_is_hidden() -> None:
    clock = run([(launch(0), 2.0), (kernel(), 3.0), (Wait(0), 0.0), (kernel(), 1.0)])
    assert clock.compute_s == 4.0 and not clock.totals.exposed_s


def test_what_is_waited_for_early_is_exposed_by_its_group() -> None:
    clock = run([(kernel(), 1.0), (launch(0), 2.0), (kernel(), 0.5), (Wait(0), 0.0), (kernel(), 1.0)])
    assert clock.compute_s == 4.0
    assert clock.totals.exposed_s == {"rail": 1.5} and clock.totals.busy_s == {"move": 2.5}


def test_one_groups_communications_queue_and_two_groups_do_not() -> None:
    one = run([(launch(0), 2.0), (launch(1), 2.0), (Wait(1), 0.0)])
    two = run([(launch(0), 2.0), (launch(1, "node"), 2.0), (Wait(1), 0.0)])
    assert (one.compute_s, two.compute_s) == (4.0, 2.0)


def test_a_communication_starts_behind_what_was_computed_before_it() -> None:
    assert run([(kernel(), 5.0), (launch(0), 1.0), (Wait(0), 0.0)]).compute_s == 6.0


def test_a_slow_host_is_the_clock() -> None:
    clock = run([(kernel(), 1.0)] * 10, Host(issue_s=3.0))
    assert clock.compute_s == 31.0 and clock.totals.host_s == 21.0
    assert clock.totals.length_s == pytest.approx(clock.compute_s)


def test_a_host_that_is_the_device_does_one_thing_at_a_time() -> None:
    clock = run([(kernel(), 1.0)] * 10, Host(issue_s=0.5, is_device=True))
    assert clock.compute_s == 15.0 and clock.totals.host_s == 5.0


def test_calls_take_time_where_the_host_computes_itself_and_nowhere_else() -> None:
    events: list[tuple[Event, float]] = [(Calls(4), 2.0), (kernel(), 1.0), (launch(0), 1.0), (Calls(1), 0.5)]
    here, device = run(events, Host(is_device=True)), run(events)
    assert (here.compute_s, here.totals.host_s, here.totals.length_s) == (3.5, 2.5, 3.5)
    assert device.compute_s == 1.0 and not device.totals.host_s


def test_a_read_stops_the_host_and_not_the_device() -> None:
    """The device has work queued while the host waits; afterwards the host must issue anew."""
    events = [(launch(0), 2.0), (Read(0, 0), 0.0), (kernel(), 5.0), (Answer(0), 0.0), (kernel(), 1.0)]
    assert run(events, Host(read_s=0.5)).compute_s == 6.0
    assert run(events[:2] + events[3:], Host(read_s=0.5)).compute_s == 3.5


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("kernel"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["rail", "node"]), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.just(0)),
    ),
    max_size=40,
)


@given(drawn=EVENTS, issue_s=st.integers(0, 3))
def test_every_second_of_the_compute_stream_is_booked_once(drawn: list[tuple[str, int]], issue_s: int) -> None:
    events: list[tuple[Event, float]] = []
    open_ones: list[int] = []
    for what, seconds in drawn:
        if what == "kernel":
            events.append((kernel(), float(seconds)))
        elif what == "wait":
            events += [(Wait(open_ones.pop(0)), 0.0)] if open_ones else []
        else:
            open_ones.append(len(events))
            events.append((launch(len(events), what), float(seconds)))
    clock = run(events, Host(issue_s=issue_s))
    assert clock.totals.length_s == clock.compute_s
    assert sum(clock.totals.busy_s.values()) == sum(s for event, s in events if isinstance(event, Kernel))
    # Neither stream nor host is ever faster than its own work.
    assert clock.compute_s >= sum(clock.totals.busy_s.values())
    assert clock.host_s >= issue_s * (clock.totals.num_kernels + clock.totals.num_launches)


# --- replayed layers ---


def layer(f: float, b: float, w: float, trip: float = 0.0) -> Passes[Priced]:
    """A layer that computes, sends its rows out, and computes again; the backward likewise; weights at the end."""

    def with_trip(seconds: float) -> tuple[Priced, Priced]:
        there = Priced((kernel(), launch(0)), (seconds / 2, trip))
        return there, Priced((Wait(0), kernel()), (0.0, seconds / 2))

    weights = (), (Priced((kernel(),), (w,)),)
    return Passes(with_trip(f), with_trip(b), weights, ("dispatch last hop",), ("combine last hop",))


def costs_of(
    name: str, num_ranks: int, num: int, each: Passes[Priced], latency: float = 0.0
) -> tuple[ActionCosts, Schedule]:
    schedule = build(name, num_ranks, num)
    slices = [("moe",)] * schedule.placement.num_slices
    return ActionCosts(schedule.placement, slices, {"moe": each}, {"moe": each}, Host(), latency), schedule


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev"])
def test_layers_without_trips_cost_what_the_closed_simulation_says(name: str) -> None:
    costs, schedule = costs_of(name, 4, 16, layer(1.0, 1.5, 0.75), latency=0.25)
    step = run_schedule(schedule, costs)
    size = schedule.placement.stage_size
    plain = simulate(schedule, Costs(1.0 / size, 1.5 / size, 0.75 / size, latency=0.25))
    # What leaves before the weight gradients of its action comes sooner to the neighbour, and never later.
    assert step.simulation.step <= plain.step + 1e-9
    busy = sum(sum(totals.busy_s.values()) for totals in step.totals)
    assert busy == pytest.approx(sum(plain.step - idle for idle in plain.bubble))
    assert sum(step.parts_s.values()) == pytest.approx(step.simulation.step)


def test_a_pair_hides_what_its_halves_expose() -> None:
    each = layer(2.0, 2.0, 1.0, trip=1.0)
    costs, _ = costs_of("dualpipe", 4, 16, each)
    forward, backward = Chunk("F", 0, 0), Chunk("D", 4, 1)
    alone = costs.cost(forward).seconds + costs.cost(backward).seconds
    pair = costs.cost(Pair(forward, backward))
    assert costs.cost(forward).totals.exposed_s == {"rail": 1.0}
    assert alone == 2.0 + 1.0 + 2.0 + 1.0 + 1.0
    assert pair.seconds == 5.0 and not any(pair.totals.exposed_s.values())


def test_the_result_leaves_before_the_weight_gradients() -> None:
    costs, _ = costs_of("1f1b", 2, 4, layer(2.0, 2.0, 1.0))
    cost = costs.cost(Chunk("D", 0, 0))
    assert cost.leads_s == {"B": 1.0} and cost.seconds == 3.0


# --- memory ---


def held(num_bytes: int, label: str = "x") -> Memory:
    return Memory(num_bytes, "activations", label)


def remembering(kept: int, work: int) -> LayerPasses:
    """A layer that keeps bytes from its forward to its weight gradient, and needs more in the middle."""
    return LayerPasses(
        (held(kept), held(work, "work"), held(-work, "work")),
        (held(work, "work"), held(-work, "work")),
        ((held(-kept),),),
    )


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "dualpipe", "dualpipev", "zbv"])
def test_a_rank_holds_as_many_micro_batches_as_the_schedule_says(name: str) -> None:
    schedule = build(name, 4, 16)
    layers = {"moe": passes_of(remembering(100, 7), book)}
    slices = [("moe",)] * schedule.placement.num_slices
    for rank, chunks in enumerate(peak_chunks(schedule)):
        peak = peak_of(schedule, rank, slices, layers, boundary_bytes=0)
        # In a pair without turns the backward lets go before the forward takes; counted apart both are alive.
        has_pairs = any(action.kind == "pair" for action in schedule.ranks[rank])
        assert 100 * (chunks - has_pairs) + 7 <= peak.num_bytes <= 100 * chunks + 7
        assert sum(peak.by_micro_batch.values()) == sum(peak.by_label.values()) == peak.num_bytes
        assert peak.series[-1].after == {}
        assert max(sum(held.fullest.values()) for held in peak.series) == peak.num_bytes


def test_what_stages_hand_on_is_held_while_it_is_worked_on() -> None:
    schedule = build("1f1b", 2, 4)
    # A layer frees the input that it was handed and makes an output; backward likewise.
    passing = LayerPasses((held(5), held(0)), (held(-5), held(5, "dx"), held(-5, "dy")), ((),))
    layers = {"moe": passes_of(passing, book)}
    for rank in range(2):
        peak = peak_of(schedule, rank, [("moe",)] * 2, layers, boundary_bytes=5)
        assert peak.num_bytes >= 5


@given(changes=st.lists(st.integers(-50, 50), max_size=30))
def test_a_stretch_is_booked_as_its_running_sum(changes: list[int]) -> None:
    booked = book([held(change, f"t{place % 3}") for place, change in enumerate(changes)])
    running = [sum(changes[: place + 1]) for place in range(len(changes))]
    assert booked.peak_bytes == max([0, *running])
    assert sum(booked.at_peak.values()) == booked.peak_bytes
    assert sum(booked.net_bytes.values()) == sum(changes)


def test_stretches_are_what_lies_between_turns() -> None:
    events = [kernel(), Turn("a"), Turn("b"), kernel()]
    assert stretches(events) == [(kernel(),), (), (kernel(),)] and slots(events) == ("a", "b")
    assert Counter() == book([]).net_bytes
