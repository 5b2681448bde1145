"""What ranks hold at work is what the simulator counts: live chunks exactly, and bytes to each of them.

All ranks of a pipeline run in this process, in an order in which they could, over links that only copy. Every tensor
that comes to life is followed until it is freed, and belongs to the chunk at work at that moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from benchmarks._storages import Storages
from parallel.pipeline import registry
from parallel.pipeline.actions import Chunk
from parallel.pipeline.order import peak_chunks, source, walk
from parallel.pipeline.placement import Placement
from parallel.pipeline.record import Recorder
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.segments import Segments
from parallel.pipeline.simulate import simulate
from parallel.watch import Watch
from tests.train.model_cases import TINY, build, random_tokens
from train.model.loss import LossTerms
from train.model.parts import Parts
from train.model.recompute import Recompute
from train.model.recompute_config import RecomputeConfig
from train.stage import Stage, WeightGradients

SEQ_LEN = 7
# Heads wide enough that, as in DeepSeek-V3, a layer's queries, keys and values are most of what only B needs.
CONFIG = replace(TINY, first_k_dense_replace=0, num_nextn_predict_layers=0, num_attention_heads=12, vocab_size=40)
NONE = RecomputeConfig()
NORM = RecomputeConfig(norm=True)
BOTH = RecomputeConfig(norm=True, mla_up_proj=True)
WHOLE = RecomputeConfig(nodes=["attention", "experts"])


class World:
    """A whole pipeline, and what each chunk of it holds: (stage, micro-batch, F or B) owns what it made there."""

    def __init__(self, placement: Placement, choice: RecomputeConfig) -> None:
        self.placement, self.storages = placement, Storages()
        self.on_the_way: dict[Chunk, Tensor] = {}
        self.most_alive = [0] * placement.num_ranks
        config = replace(CONFIG, num_hidden_layers=placement.num_slices)
        self.tokens = [random_tokens(config, 1, SEQ_LEN, seed) for seed in range(64)]
        self.stages: dict[int, Stage] = {}
        for stage in range(placement.num_stages):
            at, sink = placement.position(stage), WeightGradients()
            last = at == placement.num_slices - 1
            parts = Parts(embedding=at == 0, layers=(at,), head=last, mtp=False)
            model = build(config, sink=sink, parts=parts, recompute=Recompute(choice))
            self.stages[stage] = Stage(model, sink, Segments)
            self.stages[stage].begin(self.tokens.__getitem__, LossTerms(1.0, 0.0, 1.0))
        self.runtimes = [
            Runtime(
                rank,
                {s: Watched(self, s) for s in placement.stages_on(rank)},
                Copies(self),
                Recorder(rank, Watch()),
            )
            for rank in range(placement.num_ranks)
        ]

    def run(self, schedule: Schedule) -> Iterator[int]:
        """Action by action; yields the rank after each."""
        with self.storages:
            for rank, action, _ in walk(schedule):
                alone = replace(
                    schedule, ranks=tuple((action,) if r == rank else () for r in range(len(schedule.ranks)))
                )
                self.runtimes[rank].run(alone, (1, SEQ_LEN, CONFIG.hidden_size))
                yield rank

    @contextmanager
    def owned_by(self, owner: Any) -> Iterator[None]:
        before, self.storages.owner = self.storages.owner, owner
        try:
            yield
        finally:
            self.storages.owner = before

    def alive(self, rank: int) -> dict[tuple[int, int], dict[str, int]]:
        """Bytes that each (stage, micro-batch) of a rank holds, by the kind of work that made them."""
        found: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
        for owner, num_bytes in self.storages.by_owner().items():
            if isinstance(owner, tuple) and self.placement.rank_of[owner[0]] == rank:
                found[owner[:2]][owner[2]] = num_bytes
        return dict(found)

    def sample(self, stage: int) -> None:
        """While work is suspended: how many chunks hold anything at all."""
        rank = self.placement.rank_of[stage]
        self.most_alive[rank] = max(self.most_alive[rank], len(self.alive(rank)))


class Watched:
    """A stage whose work is told apart by chunk."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number, self.stage = world, number, world.stages[number]

    def forward(self, micro_batch: int, x: Tensor | None) -> Any:
        y = yield from self._steps((self.number, micro_batch, "F"), self.stage.forward(micro_batch, x))
        self.stage.findings.clear()
        return y

    def backward(self, micro_batch: int, dy: Tensor | None) -> Any:
        return (yield from self._steps((self.number, micro_batch, "B"), self.stage.backward(micro_batch, dy)))

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        with self.world.owned_by("W"):
            return self.stage.weight_gradients(micro_batch, share)

    def _steps(self, owner: tuple[int, int, str], steps: Any) -> Any:
        while True:
            try:
                with self.world.owned_by(owner):
                    slot = next(steps)
            except StopIteration as end:
                return end.value
            finally:
                self.world.sample(self.number)
            yield slot


class Copies:
    """Links between ranks of one process: the receiver gets a tensor of its own."""

    def __init__(self, world: World) -> None:
        self._world = world

    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None:
        pass

    def close(self) -> None:
        pass

    def turn_to(self, at: int) -> None:
        pass

    def reach(self, at: int, moment: float) -> None:
        pass

    def take(self, part: Chunk) -> Tensor | None:
        if source(self._world.placement, part) is None:
            return None
        with self._world.owned_by((part.stage, part.micro_batch, part.kind)):
            return self._world.on_the_way.pop(part).clone()

    def send(self, part: Chunk, tensor: Tensor | None) -> None:
        placement = self._world.placement
        target = {"F": placement.after, "B": placement.before}[part.kind](part.stage)
        if target is not None:
            assert tensor is not None
            with self._world.owned_by("link"):
                self._world.on_the_way[Chunk(part.kind, target, part.micro_batch)] = tensor.clone()


def build_schedule(text: str) -> Schedule:
    """name pp micro-batches [pairs]"""
    name, num_ranks, num_micro_batches, *pairs = text.split()
    return registry.build(name, int(num_ranks), int(num_micro_batches), True if pairs else None)


SCHEDULES = [
    "1f1b 4 6",
    "1f1b 2 5 pairs",
    "interleaved_1f1b 2 4",
    "interleaved_1f1b 2 4 pairs",
    "zb_h1 4 6",
    "zbv 2 5",
    pytest.param("zbv 4 8", marks=pytest.mark.slow),
    "dualpipe 2 6",
    pytest.param("dualpipe 4 10", marks=pytest.mark.slow),
    "dualpipev 2 5",
    pytest.param("dualpipev 4 9", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("choice", [NONE, BOTH], ids=["none", "recompute"])
@pytest.mark.parametrize("text", SCHEDULES)
def test_live_chunks_are_those_of_the_simulator(text: str, choice: RecomputeConfig) -> None:
    schedule = build_schedule(text)
    placement = schedule.placement
    world = World(placement, choice)
    done: list[set[Chunk]] = [set() for _ in schedule.ranks]
    ahead = [iter(actions) for actions in schedule.ranks]
    sizes: dict[tuple[int, bool], set[int]] = defaultdict(set)
    for rank in world.run(schedule):
        done[rank].update(next(ahead[rank]).parts)
        chunks = world.alive(rank)
        begun = {(part.stage, part.micro_batch) for part in done[rank] if part.kind == "F"}
        over = {(part.stage, part.micro_batch) for part in done[rank] if part.kind == "W"}
        # Nothing of a chunk is there after its W, and something of every other.
        assert set(chunks) == begun - over
        for (stage, micro_batch), made in chunks.items():
            sizes[stage, Chunk("B", stage, micro_batch) in done[rank]].add(sum(made.values()))
    assert world.storages.num_bytes("link") == world.storages.num_bytes("W") == 0
    # The peak counts within actions too: in a pair, the next chunk begins before the last one is over.
    assert tuple(world.most_alive) == peak_chunks(schedule)
    assert tuple(most * placement.stage_size for most in world.most_alive) == simulate(schedule).peak_activations
    # To the byte: all micro-batches of a stage are alike, before B and after it, and so are all stages of just a layer.
    assert all(len(size) == 1 for size in sizes.values())
    inner = [stage for stage in range(placement.num_stages) if 0 < placement.position(stage) < placement.num_slices - 1]
    for after_b in (False, True):
        assert len(set().union(*(sizes.get((stage, after_b), set()) for stage in inner))) <= 1


def inner_bytes(world: World, rank: int) -> tuple[int, int]:
    """(most chunks, most bytes) of a rank at the end of any of its actions under 1F1B."""
    schedule, most = build_schedule("1f1b 4 6"), (0, 0)
    for at in world.run(schedule):
        if at == rank:
            made = world.alive(rank).values()
            most = max(most, (len(made), sum(sum(kinds.values()) for kinds in made)))
    return most


def test_bytes_at_the_peak_are_chunks_times_the_bytes_of_a_chunk() -> None:
    placement, per_chunk = build_schedule("1f1b 4 6").placement, []
    for choice in (NONE, NORM, BOTH, WHOLE):
        most = [inner_bytes(World(placement, choice), rank) for rank in (1, 2)]
        assert [chunks for chunks, _ in most] == [3, 2] == list(peak_chunks(build_schedule("1f1b 4 6"))[1:3])
        assert most[0][1] / 3 == most[1][1] / 2
        per_chunk.append(most[0][1] // 3)
    assert per_chunk == sorted(per_chunk, reverse=True)
    assert per_chunk[3] < per_chunk[2] < per_chunk[1] < per_chunk[0]


def first_chunk(choice: RecomputeConfig) -> tuple[dict[str, int], dict[str, int]]:
    """What the second stage holds of the first micro-batch after its F and after its B, by the kind that made it."""
    schedule = build_schedule("zb_h1 4 6")
    world, ahead = World(schedule.placement, choice), iter(schedule.ranks[1])
    found = {}
    for rank in world.run(schedule):
        if rank == 1:
            found[str(next(ahead))] = world.alive(1).get((1, 0), {})
    return found["F1.0"], found["B1.0"]


def test_b_frees_all_that_w_does_not_read() -> None:
    assert CONFIG.q_lora_rank is not None
    # The inputs of matrices: of the attention's; of router and shared experts at once; of the routed experts.
    columns = CONFIG.hidden_size + CONFIG.q_lora_rank + CONFIG.kv_lora_rank
    columns += CONFIG.num_attention_heads * CONFIG.v_head_dim
    columns += CONFIG.hidden_size * (1 + CONFIG.num_experts_per_tok)
    inputs = 8 * SEQ_LEN * columns
    after_f, after_b = first_chunk(NONE)
    assert after_b["F"] == inputs
    assert sum(after_b.values()) < sum(after_f.values())
    _, rebuilt = first_chunk(BOTH)
    # What B has built again waits for W in the place of what F would have kept.
    assert 0 < rebuilt["F"] < inputs
    assert sum(rebuilt.values()) == sum(after_b.values())
    # Router and shared experts share an input, of which a rerun of the attention makes the router one of its own.
    own = 8 * SEQ_LEN * CONFIG.hidden_size
    _, again = first_chunk(WHOLE)
    assert sum(again.values()) == sum(after_b.values()) + own
