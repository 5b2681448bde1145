"""What tables of overlap hide, by the clock: traced layers of a run with prices of our own, host ahead and not."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.plan.clock import Host, Priced
from launch.plan.events import Enter, Event, Kernel, Launch, LayerPasses
from launch.plan.layers import layers_of
from launch.plan.page.pair import COMPUTES, spans_of
from launch.plan.replay import Passes, passes_of
from launch.plan.step import ActionCosts
from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.registry import build
from tests.plan.jobs import WAYS, job

SMALL = [
    *("model=tiny", "precision=bf16", "parallel.pp=2", "parallel.dp=4", "parallel.ep=4", "parallel.nodes=4"),
    *("parallel.dispatch=two_hop", "train.micro_batch_size=1", "train.global_batch_size=32", "run.device=cuda"),
]
# Forward, backward and weight gradients of attention and of experts take as long each: a layer computes for 6.
PIECES = {(node, kind) for node in ("attention", "experts") for kind in "FBW"}
COMPUTED = float(len(PIECES))
# A layer's trips: out and home, forward and backward.
NUM_TRIPS = 4


@pytest.fixture(scope="module")
def traced() -> dict[tuple[str, str], LayerPasses]:
    """A layer with experts, as it is on a GPU and on a CPU, over both dispatches."""
    return {
        (device, way): layers_of(job(*WAYS[way], "precision=bf16"), device).passes["moe"]
        for device in ("cuda", "cpu")
        for way in ("two_hop", "flat")
    }


def priced(passes: LayerPasses, hops: dict[str, float]) -> Passes[Priced]:
    """A layer whose pieces take 1 each, a node's weight gradients alike long. hops: what a hop takes, by its group; its
    largest message takes all of it."""
    lists = [passes.forward, passes.backward, *passes.weights]
    stretches = [pair for events in lists for pair in by_piece(events)]
    num_parts = Counter((enter.node, enter.kind) for enter, events in stretches if kernels_of(events))
    launches = [(enter, event) for enter, events in stretches for event in events if isinstance(event, Launch)]
    largest: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    for enter, event in launches:
        key = enter.node, enter.kind, event.group
        largest[key] = max(largest[key], event.received_bytes)
    prices: dict[int, float] = {}
    for enter, events in stretches:
        for event in kernels_of(events):
            whole = num_parts[enter.node, enter.kind] * len(kernels_of(events))
            prices[id(event)] = 1 / whole if (enter.node, enter.kind) in PIECES else 0.0
    for enter, event in launches:
        is_rows = event.received_bytes == largest[enter.node, enter.kind, event.group]
        prices[id(event)] = hops[event.group] if is_rows else 0.0

    return passes_of(passes, lambda events: Priced(events, [prices.get(id(event), 0.0) for event in events]))


def by_piece(events: Iterable[Event]) -> list[tuple[Enter, list[Event]]]:
    found: list[tuple[Enter, list[Event]]] = []
    for event in events:
        if isinstance(event, Enter):
            found.append((event, []))
        else:
            found[-1][1].append(event)
    return found


def kernels_of(events: Sequence[Event]) -> list[Kernel]:
    return [event for event in events if isinstance(event, Kernel)]


def costs_of(layer: Passes[Priced], host: Host, num_layers: int) -> ActionCosts:
    schedule = build("dualpipev", 2, 8)
    slices = [("moe",) * num_layers] * schedule.placement.num_slices
    return ActionCosts(schedule.placement, slices, {"moe": layer}, {"moe": layer}, host, 0.0)


PAIR, FORWARD, BACKWARD = Pair(Chunk("F", 0, 0), Chunk("D", 3, 1)), Chunk("F", 0, 0), Chunk("D", 3, 1)


def hidden(costs: ActionCosts, action: Action) -> float:
    """The share of an action's communication that nobody waits for."""
    cost = costs.cost(action)
    return 1 - (cost.seconds - sum(cost.totals.busy_s.values())) / sum(cost.totals.network_s.values())


def hops_of(way: str, inside: float) -> dict[str, float]:
    """Communication as long as computing. inside: the hop inside a node over the one between nodes."""
    trip = COMPUTED / NUM_TRIPS
    return {"ep": trip} if way == "flat" else {"rail": trip / (1 + inside), "node": trip * inside / (1 + inside)}


# A host that is ahead and costs nothing, and one that needs as long for a layer's kernels as a sixth of what they take.
AHEAD = [Host(), Host(issue_s=0.001, read_s=0.01)]


@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize(("way", "inside"), [("flat", 0.0), ("two_hop", 0.1), ("two_hop", 1 / 3)])
def test_a_pair_hides_all_where_the_host_is_ahead(
    traced: dict[tuple[str, str], LayerPasses], way: str, inside: float, num_layers: int
) -> None:
    """The hop inside a node too, and the host is not waited for."""
    layer = priced(traced["cuda", way], hops_of(way, inside))
    for host in AHEAD:
        cost = costs_of(layer, host, num_layers).cost(PAIR)
        assert cost.totals.host_s < 0.01 * cost.seconds
        assert hidden(costs_of(layer, host, num_layers), PAIR) > (0.99 if host.issue_s == 0 else 0.97)


@pytest.mark.parametrize("num_layers", [2, 4])
@pytest.mark.parametrize(
    ("way", "inside", "least"), [("flat", 0.0, 0.99), ("two_hop", 0.1, 0.95), ("two_hop", 1 / 3, 0.94)]
)
def test_what_a_pair_hides_where_the_host_computes(
    traced: dict[tuple[str, str], LayerPasses], way: str, inside: float, least: float, num_layers: int
) -> None:
    """A hop is launched between two pieces of computing, so that one which is longer than a piece is waited for."""
    layer = priced(traced["cpu", way], hops_of(way, inside))
    assert hidden(costs_of(layer, Host(is_device=True), num_layers), PAIR) > least


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_passes_alone_hide_what_their_own_weight_gradients_hide(
    traced: dict[tuple[str, str], LayerPasses], device: str
) -> None:
    """A backward half of it: each but its first trip has those of a piece beside it, which take two thirds as long."""
    host = Host(is_device=device == "cpu")
    for way in ("flat", "two_hop"):
        costs = costs_of(priced(traced[device, way], hops_of(way, 1 / 3)), host, 2)
        assert hidden(costs, FORWARD) == pytest.approx(0.0, abs=1e-9)
        assert hidden(costs, BACKWARD) == pytest.approx(3 / (4 * 1.5), abs=1e-9)


def test_what_is_faster_than_computing_is_not_seen(traced: dict[tuple[str, str], LayerPasses]) -> None:
    """Communication of two thirds of the computing, as DeepSeek's own trace has it, hides on either kind of device."""
    for device, host in (("cuda", AHEAD[1]), ("cpu", Host(is_device=True))):
        hops = {group: seconds * 2 / 3 for group, seconds in hops_of("two_hop", 1 / 3).items()}
        assert hidden(costs_of(priced(traced[device, "two_hop"], hops), host, 4), PAIR) > 0.98


def test_the_picture_of_a_pair_shows_every_second(
    traced: dict[tuple[str, str], LayerPasses],
) -> None:
    """What is drawn is what the clock has counted: no stream does two things at once, and all lies in the pair."""
    costs = costs_of(priced(traced["cuda", "two_hop"], hops_of("two_hop", 1 / 3)), AHEAD[0], 2)
    spans, cost = spans_of(costs, PAIR), costs.cost(PAIR)
    for stream in {span.stream for span in spans}:
        own = sorted((span for span in spans if span.stream == stream), key=lambda span: span.start_s)
        assert own[0].start_s >= 0 and own[-1].stop_s <= cost.seconds + 1e-9
        assert all(one.stop_s <= other.start_s + 1e-9 for one, other in pairwise(own))
        seconds = sum(span.stop_s - span.start_s for span in own)
        whole = sum(cost.totals.busy_s.values()) if stream == COMPUTES else cost.totals.network_s[stream]
        assert seconds == pytest.approx(whole)
    order = [f"{span.piece.node} {span.piece.kind}" for span in spans if span.stream == COMPUTES]
    first = order.index("attention F")
    assert order[first : first + 5] == ["attention F", "attention W", "experts B", "experts W", "experts F"]


def test_a_picture_of_a_pair_is_written_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "cluster=h100"]
    out = tmp_path / "pair.svg"
    assert main(["plan", "pair", *words, "pipeline.schedule=dualpipev", f"out={out}"]) == 0
    assert {"experts", "attention"} <= set(re.findall(r">(\w+)<", out.read_text()))
    for more, said in (
        (["pipeline.schedule=zbv", f"out={out}"], "has no pairs"),
        (["pipeline.schedule=dualpipev"], "draws a picture"),
        (["pipeline.schedule=dualpipev", "out=pair.html"], "must end in .svg, .png"),
    ):
        assert main(["plan", "pair", *words, *more]) == 2
        assert said in capsys.readouterr().err
