"""Tables of overlap carried out for any two passes: in one order on all ranks, everything done once and in turn."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.collectives import Steps
from parallel.pipeline.actions import Action, Chunk
from parallel.pipeline.overlap import HOST_AHEAD, HOST_COMPUTES, Line, Overlap, interleave, lines, overlap_of
from parallel.pipeline.registry import build
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule

TABLES = {"host computes": HOST_COMPUTES, "host ahead": HOST_AHEAD}


@dataclass(frozen=True)
class Layer:
    """hops: of each of its trips; None for a layer without any. strange: its slots are in no table."""

    hops: int | None
    strange: bool = False

    def trip(self, node: str, first: tuple[str, ...] = ()) -> list[str]:
        hops = ["first hop", "last hop"] if self.hops == 2 else ["last hop"]
        return [f"{'other ' if self.strange else ''}{node} {slot}" for slot in (*first, *hops)]


LAYERS = st.lists(st.builds(Layer, st.sampled_from([None, 1, 2]), st.booleans()), max_size=5)


@dataclass
class Rank:
    """What one rank does, in the order in which its host does it."""

    done: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    def forward(self, layers: list[Layer]) -> Steps[str]:
        for number, layer in enumerate(layers):
            if layer.hops is None:
                self.done.append(f"compute F {number} dense")
                continue
            self.done.append(f"compute F {number} attention")
            yield from self.stand("F", number, layer.trip("dispatch", ("counts",)))
            self.done.append(f"compute F {number} experts")
            yield from self.stand("F", number, layer.trip("combine"))
        return "y"

    def backward(self, layers: list[Layer]) -> Steps[str]:
        for number, layer in reversed(list(enumerate(layers))):
            if layer.hops is None:
                self.piece(f"B {number} dense")
                continue
            yield from self.stand("B", number, layer.trip("combine", ("departure",)))
            self.piece(f"B {number} experts")
            yield from self.stand("B", number, layer.trip("dispatch", ("departure",)))
            self.piece(f"B {number} attention")
        return "dx"

    def piece(self, name: str) -> None:
        """A piece of a backward, which leaves the weight gradients of two matrices."""
        self.done.append(f"compute {name}")
        self.waiting += [f"W {name} {matrix}" for matrix in "ab"]

    def stand(self, who: str, number: int, slots: list[str]) -> Iterator[str]:
        for slot in slots:
            if not slot.endswith("departure"):
                self.done.append(f"launch {who} {number} {slot}")
            yield slot
            if not slot.endswith("departure"):
                self.done.append(f"wait {who} {number} {slot}")

    def take(self, share: float) -> None:
        for _ in range(math.ceil(len(self.waiting) * share)):
            self.done.append(self.waiting.pop(0))

    def run(self, overlap: Overlap, backward: list[Layer], forward: list[Layer]) -> tuple[Any, Any]:
        return interleave(overlap, self.backward(backward), self.forward(forward), self.take)


def alone(run: Callable[[Rank], Iterator[str]]) -> list[str]:
    """What a pass does by itself, its weight gradients left out."""
    rank = Rank()
    for _ in run(rank):
        pass
    return rank.done


@pytest.mark.parametrize("name", TABLES)
@given(backward=LAYERS, forward=LAYERS)
def test_any_two_passes_come_to_their_ends(name: str, backward: list[Layer], forward: list[Layer]) -> None:
    """Whatever layers they have: each does what it does alone, in its own order, and what the backward leaves is done
    in the order in which it was left, once, and never before."""
    rank = Rank()
    assert rank.run(TABLES[name], backward, forward) == ("dx", "y")
    passes = {
        who: [each for each in rank.done if f" {who} " in each and not each.startswith("W")] for who in ("F", "B")
    }
    assert passes == {
        "F": alone(lambda rank: rank.forward(forward)),
        "B": alone(lambda rank: rank.backward(backward)),
    }
    taken = [each for each in rank.done if each.startswith("W")]
    left = [
        f"W {each.removeprefix('compute ')} {m}" for each in passes["B"] if each.startswith("compute") for m in "ab"
    ]
    assert taken + rank.waiting == left
    for each in taken:
        assert rank.done.index(each) > rank.done.index(f"compute {each[2:-2]}")
    if all(layer.hops is None for layer in backward):
        assert not rank.waiting  # nothing will be under way that they could stand beside


@pytest.mark.parametrize("name", TABLES)
@given(backward=LAYERS, forward=LAYERS, seed=st.integers(0, 9))
def test_no_rank_waits_for_ever(name: str, backward: list[Layer], forward: list[Layer], seed: int) -> None:
    """Ranks of a group that meet in every communication, each as slow as chance has it: a wait is over when all have
    launched what is waited for, and what they launch must be the same from the first to the last."""
    programs = []
    for _ in range(3):
        rank = Rank()
        rank.run(TABLES[name], backward, forward)
        programs.append(rank.done)
    draw, at, launched = random.Random(seed), [0] * len(programs), defaultdict[int, list[str]](list)
    while any(place < len(program) for place, program in zip(at, programs, strict=True)):
        able = [number for number in range(len(programs)) if _may_go_on(programs, at, launched, number)]
        assert able, "all wait for each other"
        number = draw.choice(able)
        step = programs[number][at[number]]
        if step.startswith("launch"):
            launched[number].append(step.removeprefix("launch "))
        at[number] += 1
    assert len({tuple(order) for order in launched.values()}) <= 1


def _may_go_on(programs: list[list[str]], at: list[int], launched: dict[int, list[str]], number: int) -> bool:
    if at[number] == len(programs[number]):
        return False
    step = programs[number][at[number]]
    if not step.startswith("wait"):
        return True
    # In the order of launching: a communication is over when all ranks have launched as many.
    place = launched[number].index(step.removeprefix("wait "))
    return all(len(launched[other]) > place for other in range(len(programs)))


FIGURE = ["attention F", "W", "experts B", "W", "experts F", "W", "attention B", "W"]


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("name", TABLES)
def test_the_figure_of_a_pair(name: str, hops: int) -> None:
    """In the middle of a pair the pieces stand as in DeepSeek's figure, half of a piece's weight gradients behind each
    piece of the other pass. A trip has a piece and weight gradients beside it; where the host computes itself, each of
    its hops has something, and the one between nodes a piece."""
    rank, layers = Rank(), [Layer(hops)] * 4
    rank.run(TABLES[name], layers, layers)
    words = [each.split() for each in rank.done if each.startswith(("compute", "W"))]
    order = ["W" if word[0] == "W" else f"{word[3]} {word[1]}" for word in words]
    single = [each for at, each in enumerate(order) if each != "W" or order[at - 1] != "W"]
    start = single.index("attention F", 1)
    assert single[start : start + 2 * len(FIGURE)] == FIGURE * 2
    for who, number, node in itertools.product("FB", (1, 2), ("dispatch", "combine")):
        slots = ["first hop", "last hop"] if hops == 2 else ["last hop"]
        legs = [f"{who} {number} {node} {slot}" for slot in slots]
        # A device's trip goes on from the counts to the rows while the host issues what stands behind them.
        counts = f"F {number} dispatch counts"
        first = counts if (who, node, name) == ("F", "dispatch", "host ahead") else legs[0]
        assert {each[0] for each in between(rank, first, legs[-1])} == {"c", "W"}
        if name == "host computes" and hops == 2:
            outwards = (who, node) in (("F", "dispatch"), ("B", "combine"))
            rail, inside = legs if outwards else legs[::-1]
            assert "c" in {each[0] for each in between(rank, rail, rail)} and between(rank, inside, inside)


def between(rank: Rank, first: str, last: str) -> list[str]:
    """What is computed from the launch of one leg to the wait for another."""
    stretch = rank.done[rank.done.index(f"launch {first}") : rank.done.index(f"wait {last}")]
    return [each for each in stretch if each.startswith(("compute", "W"))]


def test_a_trip_leaves_for_the_experts_before_the_gradients_that_come_later() -> None:
    """A group's communications run in the order in which a rank launches them."""
    rank, layers = Rank(), [Layer(1)] * 3
    rank.run(HOST_AHEAD, layers, layers)
    legs = [each.removeprefix("launch ") for each in rank.done if each.startswith("launch")]
    assert legs.index("F 1 dispatch last hop") < legs.index("B 1 dispatch last hop")
    assert legs.index("F 0 combine last hop") < legs.index("B 1 combine last hop")


def test_the_host_has_queued_work_before_it_stands_still() -> None:
    """Between the launch of counts and the wait for them lie the backward's experts; a host that computes goes on at
    once."""
    found = {}
    for name, overlap in TABLES.items():
        rank, layers = Rank(), [Layer(2)] * 2
        rank.run(overlap, layers, layers)
        start, stop = (rank.done.index(f"{what} F 1 dispatch counts") for what in ("launch", "wait"))
        found[name] = [each for each in rank.done[start + 1 : stop] if each.startswith("compute")]
    assert found == {"host computes": [], "host ahead": ["compute B 0 experts"]}


@pytest.mark.parametrize("overlap", TABLES.values(), ids=TABLES)
def test_tables_name_every_slot(overlap: Overlap) -> None:
    slots = {("F", "dispatch counts")}
    slots |= {("B", f"{node} departure") for node in ("dispatch", "combine")}
    slots |= {(who, f"{node} {n} hop") for who in "FB" for node in ("dispatch", "combine") for n in ("first", "last")}
    for table in (overlap.pair, overlap.alone):
        assert {(line.who, line.slot) for line in table if line.who != "W"} == slots


def test_lines_as_text() -> None:
    assert lines("W", "W half", "B combine last hop") == (
        Line("W"),
        Line("W", share=0.5),
        Line("B", "combine last hop"),
    )
    assert overlap_of(runs_ahead=True) is HOST_AHEAD and overlap_of(runs_ahead=False) is HOST_COMPUTES


# --- over a whole list ---


class SomeStage:
    """A stage that notes the weight gradients that it does, by micro-batch."""

    def __init__(self, number: int, layers: list[Layer], done: list[tuple[int, int, str]]) -> None:
        self.number, self.layers, self.done = number, layers, done
        self.ranks: dict[int, Rank] = defaultdict(Rank)

    def forward(self, micro_batch: int, x: Any) -> Any:
        yield from self.ranks[micro_batch].forward(self.layers)

    def backward(self, micro_batch: int, dy: Any) -> Any:
        yield from self.ranks[micro_batch].backward(self.layers)

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        rank = self.ranks[micro_batch]
        before = len(rank.done)
        rank.take(share)
        self.done += [(self.number, micro_batch, each) for each in rank.done[before:]]
        return len(rank.waiting)


class NoLinks:
    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None: ...
    def close(self) -> None: ...
    def turn_to(self, at: int) -> None: ...
    def take(self, part: Chunk) -> None: ...
    def send(self, part: Chunk, tensor: Any) -> None: ...


class NoListener:
    def begin(self, action: Action) -> None: ...
    def started(self) -> None: ...
    def end(self) -> None: ...


@pytest.mark.parametrize("overlap", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv", "interleaved_1f1b", "dualpipe", "dualpipev"])
def test_a_step_does_all_weight_gradients_in_the_order_of_its_list(name: str, overlap: Overlap) -> None:
    """Those of a stage in the order of its micro-batches' backwards, whatever they were left beside; none is left."""
    schedule = build(name, 2, 8, pairs=None if name.startswith("zb") else True)
    for number in range(2):
        done: list[tuple[int, int, str]] = []
        layers = [Layer(None), Layer(2), Layer(1)]
        stages = {stage: SomeStage(stage, layers, done) for stage in schedule.placement.stages_on(number)}
        Runtime(number, stages, NoLinks(), NoListener(), overlap).run(schedule, ())
        parts = [part for action in schedule.ranks[number] for part in action.parts if part.kind == "W"]
        for stage in stages:
            order = [part.micro_batch for part in parts if part.stage == stage]
            found = [micro_batch for at, micro_batch, _ in done if at == stage]
            assert list(dict.fromkeys(found)) == order == sorted(order)
            assert len(found) == len(order) * 10  # five pieces, two matrices each
            assert sorted(found) == found
