"""What composes, composes: random models under random topologies equal one plain run each, and faults do not.

The seed of what is drawn is part of a test's name: HALOCLINE_SEED repeats it, HALOCLINE_COMPOSITIONS draws more.
`python -m tests.fuzz` goes on past failures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.pipeline.registry import NAMES
from tests.compositions import Composition, Generator
from tests.deviation import between
from tests.fuzz import FP64, FP64_NATIVE, Bench
from tests.spawn import Ranks

SEED = int(os.environ["HALOCLINE_SEED"])  # tests/conftest.py draws one
NUM_COMPOSITIONS = int(os.environ.get("HALOCLINE_COMPOSITIONS", 3))


@pytest.fixture(scope="module")
def bench(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(ranks, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("index", range(NUM_COMPOSITIONS), ids=lambda index: f"{SEED}-{index}")
def test_a_random_composition_equals_one_plain_process(bench: Bench, index: int) -> None:
    composition = Generator().draw(SEED, index, max_ranks=4)
    print(f"HALOCLINE_SEED={SEED}", composition.command, sep="\n")
    assert bench.judge(composition).broken == []


@pytest.mark.parametrize("index", range(2), ids=lambda index: f"{SEED}-{index}")
def test_a_random_composition_in_fp8_equals_one_process(bench: Bench, index: int) -> None:
    composition = Generator().draw_fp8(SEED, index, max_ranks=4)
    print(f"HALOCLINE_SEED={SEED}", composition.command, sep="\n")
    assert bench.judge_fp8(composition).broken == []


DENSE = ("model.attention=gqa", "model.n_routed_experts=0", *FP64_NATIVE)


@pytest.mark.parametrize("place", ["", pytest.param("parallel.pp=2", marks=pytest.mark.slow)])
def test_a_random_dense_model_equals_one_plain_process(bench: Bench, place: str) -> None:
    composition = Generator().draw(SEED, 0, max_ranks=2 if place else 1, fixed=(*DENSE, *place.split()))
    print(f"HALOCLINE_SEED={SEED}", composition.command, sep="\n")
    assert bench.judge(composition).broken == []


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4), ids=lambda index: f"{SEED}-{index}")
def test_a_random_run_goes_on_in_another_place(bench: Bench, index: int) -> None:
    generator = Generator()
    composition = generator.draw(SEED, index, max_ranks=4, fixed=FP64_NATIVE)
    other = generator.move(composition, SEED, index, max_ranks=4)
    print(f"HALOCLINE_SEED={SEED}", composition.command, other.command, sep="\n")
    assert bench.judge_moved(composition, other, step=2).broken == []


# (ranks, settings): what failed once. Every sentence says what was wrong.
BASE = [
    *("model.vocab_size=300", "model.hidden_size=12", "model.intermediate_size=10", "model.moe_intermediate_size=6"),
    *("model.num_hidden_layers=2", "model.first_k_dense_replace=1", "model.num_attention_heads=2"),
    *("model.n_routed_experts=4", "model.n_group=2", "model.topk_group=1", "model.num_experts_per_tok=2"),
    *("model.q_lora_rank=6", "model.kv_lora_rank=5", "model.qk_nope_head_dim=3", "model.qk_rope_head_dim=4"),
    *("model.v_head_dim=5", "train.seq_len=7", "train.micro_batch_size=1", "train.max_steps=5"),
    *("precision=fp64", "zero.engine=native", "moe.bias_update_rate=0.05"),
]
REGRESSIONS = {
    "a rank whose stages all are empty had no parameter, which the optimizer refused after the start": (
        3,
        "parallel.pp=3 parallel.dp=1 pipeline.layers=[1,0,1] train.global_batch_size=3",
    ),
    "the same with DeepSpeed's engine on the ranks that have parameters": (
        3,
        "parallel.pp=3 parallel.dp=1 pipeline.layers=[2,0,0] train.global_batch_size=3 train.max_steps=1 "
        "precision=fp32 zero.engine=deepspeed",
    ),
    "a prediction depth of one position rotates keys that begin at an odd element": (
        1,
        "model.num_nextn_predict_layers=3 train.seq_len=4 model.kv_lora_rank=9 train.global_batch_size=2",
    ),
}


@pytest.mark.parametrize(("world_size", "settings"), REGRESSIONS.values(), ids=REGRESSIONS)
def test_what_failed_once(bench: Bench, world_size: int, settings: str) -> None:
    given = settings.split()
    keys = {each.split("=")[0] for each in given}
    base = [each for each in BASE if each.split("=")[0] not in keys]
    assert bench.judge(Composition(world_size, (*base, *given))).broken == []


def test_experts_without_shared_ones_equal_one_plain_process(bench: Bench) -> None:
    """Rows that go to other ranks' experts and back, with whole nodes computed again in the backward pass."""
    place = ("parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "recompute.nodes=[attention,experts]")
    routed = ("model.n_shared_experts=0", "model.num_nextn_predict_layers=1", "train.global_batch_size=4")
    assert bench.judge(Composition(2, (*BASE, *place, *routed))).broken == []


# --- deliberate faults, made inside the ranks ---


@contextmanager
def mirror_reduction_skipped() -> Iterator[None]:
    """Each mirror steps on its own direction's gradients."""
    import torch.distributed as dist

    from parallel.collectives import Handle
    from parallel.zero import optimizer

    def own_shard(flat: Any, group: Any, numels: Any) -> Any:
        return Handle((), (), lambda: flat.split(list(numels))[dist.get_rank(group)].clone())

    with mock.patch.object(optimizer, "reduce_scatter", own_shard):
        yield


@contextmanager
def one_mirror_counted_twice_in_the_norm() -> Iterator[None]:
    import torch.distributed as dist

    from parallel.zero import optimizer

    def norm(shards: Any, *rest: Any, original: Any = optimizer.global_norm) -> float:
        return original([*shards, *shards] if dist.get_rank() == 0 else shards, *rest)

    with mock.patch.object(optimizer, "global_norm", norm):
        yield


@contextmanager
def w_of_another_micro_batch() -> Iterator[None]:
    """Each piece of a W is that of the micro-batch before, where that one is done."""
    from train.stage import WeightGradients

    done: dict[tuple[int, int], list[Any]] = {}

    @torch.no_grad()
    def take(self: Any, micro_batch: int, share: float = 1.0) -> int:
        own = done.setdefault((id(self), micro_batch), [])
        before = done.get((id(self), micro_batch - 1), [])
        waiting = self._waiting.get(micro_batch, [])
        for _ in range(math.ceil(share * len(waiting))):
            own.append(waiting.pop(0))
            (before[len(own) - 1] if len(own) <= len(before) else own[-1])()
        return len(waiting)

    def begin(self: Any, micro_batch: int, original: Any = WeightGradients.begin) -> None:
        done.pop((id(self), micro_batch), None)
        original(self, micro_batch)

    with mock.patch.multiple(WeightGradients, take=take, begin=begin):
        yield


@contextmanager
def activations_and_gradients_swapped() -> Iterator[None]:
    """A rank sends its last activation where a gradient belongs, and its last gradient where an activation does."""
    from parallel.pipeline.links import Links

    last: dict[str, Any] = {}

    def send(self: Any, part: Any, tensor: Any, original: Any = Links.send) -> None:
        other = last.get("B" if part.kind == "F" else "F")
        if tensor is not None:
            last[part.kind] = tensor
        original(self, part, tensor if tensor is None or other is None or other.shape != tensor.shape else other)

    with mock.patch.object(Links, "send", send):
        yield


@contextmanager
def load_counted_again() -> Iterator[None]:
    """Every router counts its tokens twice: no share, no bias shows it, only the counts."""
    from train.model.router import Router

    def load(self: Any, indices: Any, original: Any = Router._load) -> Any:
        return 2 * original(self, indices)

    with mock.patch.object(Router, "_load", load):
        yield


@contextmanager
def load_counted_where_routers_run() -> Iterator[None]:
    """Loads are taken at every call of a router, so also when the backward pass runs it again."""
    from train import loop
    from train.model.router import Router

    counted: dict[int, Any] = {}

    def load(self: Any, indices: Any, original: Any = Router._load) -> Any:
        found = original(self, indices)
        counted[id(self)] = counted.get(id(self), 0) + found
        return found

    def reduce(job: Any, plan: Any, tally: Any, asked: Any, original: Any = loop.reduce) -> Any:
        tally.load.zero_()
        for model in job.models:
            for number, router in model.routers().items():
                tally.load[number] += counted.pop(id(router), 0)
        return original(job, plan, tally, asked)

    with mock.patch.object(Router, "_load", load), mock.patch.object(loop, "reduce", reduce):
        yield


FAULTS = [
    mirror_reduction_skipped,
    one_mirror_counted_twice_in_the_norm,
    w_of_another_micro_batch,
    activations_and_gradients_swapped,
    load_counted_again,
]
# Every fault can happen here: mirrors, several micro-batches per stage, both kinds on one link, routers.
MIRRORED = ("parallel.pp=2", "parallel.dp=1", "pipeline.schedule=dualpipe", "model.n_routed_experts=8", *FP64_NATIVE)


@pytest.fixture(scope="module")
def mirrored() -> Composition:
    return Generator().draw(0, 0, fixed=(*MIRRORED, "model.num_nextn_predict_layers=1"))


def test_without_a_fault_it_is_green(bench: Bench, mirrored: Composition) -> None:
    assert bench.judge(mirrored).broken == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_turns_it_red(bench: Bench, mirrored: Composition, fault: Any) -> None:
    verdict = bench.judge(mirrored, fault)
    assert verdict.broken and verdict.worst > 1e-6


def test_a_fault_turns_fp8_red(bench: Bench, mirrored: Composition) -> None:
    """What one process is compared with is coarser there, not blind."""
    drawn = ("precision", "parallel.ep=", "zero.", "train.max_steps=")
    others = [each for each in mirrored.settings if not each.startswith(drawn)]
    one_step = ("precision=fp8", "parallel.ep=1", "zero.engine=native", "train.max_steps=1")
    composition = Composition(2, (*others, *one_step))
    assert bench.judge_fp8(composition).broken == []
    assert bench.judge_fp8(composition, w_of_another_micro_batch).broken != []


@contextmanager
def targets_counted_as_if_none_crossed() -> Iterator[None]:
    """The losses of masked rows are divided by all their tokens."""
    from train.data.rows.epochs import Rows

    def all_tokens(self: Any, first: int, count: int) -> int:
        return count * self.seq_len

    with mock.patch.object(Rows, "num_targets", all_tokens):
        yield


@pytest.fixture(scope="module")
def masked() -> Composition:
    depths = ("model.num_nextn_predict_layers=2", "train.seq_len=30")
    return Generator().draw(0, 0, fixed=(*MIRRORED, *depths, "data.document_mask=true", "recompute.mla_up_proj=true"))


def test_documents_apart_equal_one_plain_process(bench: Bench, masked: Composition) -> None:
    assert bench.judge(masked).broken == []


def test_targets_counted_wrong_turn_it_red(bench: Bench, masked: Composition) -> None:
    assert bench.judge(masked, targets_counted_as_if_none_crossed).worst > 1e-6


@contextmanager
def embedding_of_the_ends_apart() -> Iterator[None]:
    """First and last stage step on their own gradients of the embedding that both hold."""
    from parallel.zero.sets import ReplicaGroups
    from train import assemble

    def groups(dense: Any, expert: Any, _: Any, world: Any) -> ReplicaGroups:
        return ReplicaGroups(dense, expert, dense, world)

    with mock.patch.object(assemble, "ReplicaGroups", groups):
        yield


@pytest.mark.slow
def test_ends_that_part_turn_it_red(bench: Bench) -> None:
    place = ("parallel.pp=2", "parallel.dp=1", "pipeline.schedule=zb_h1", "model.num_nextn_predict_layers=1")
    composition = Generator().draw(0, 1, fixed=(*place, *FP64_NATIVE))
    assert bench.judge(composition).broken == []
    assert bench.judge(composition, embedding_of_the_ends_apart).worst > 1e-6


def test_a_load_counted_in_recompute_turns_it_red(bench: Bench, mirrored: Composition) -> None:
    others = [each for each in mirrored.settings if not each.startswith("recompute.")]
    kept, again = (Composition(2, (*others, f"recompute.nodes={nodes}")) for nodes in ("[]", "[attention]"))
    # Where nothing is computed again, counting there is as good as counting reports.
    assert bench.judge(kept, load_counted_where_routers_run).broken == []
    assert bench.judge(again).broken == []
    assert bench.judge(again, load_counted_where_routers_run).broken != []


# --- tiny under every schedule ---

TINY = ("model=tiny", "train.seq_len=12", "train.micro_batch_size=1", "train.global_batch_size=8", "train.max_steps=2")
TINY_FP64 = (*TINY, *FP64_NATIVE, "evaluate.interval=1", "evaluate.num_sequences=3")
IN_CI = [("dualpipe", 4)]
SCHEDULES = [
    pytest.param(name, pp, marks=() if (name, pp) in IN_CI else pytest.mark.slow) for name in NAMES for pp in (2, 4)
]


@pytest.fixture(scope="module")
def tiny_alone(bench: Bench) -> Any:
    return bench.run(Composition(1, TINY_FP64))


@pytest.mark.parametrize(("schedule", "pp"), SCHEDULES)
def test_tiny_under_every_schedule_equals_one_rank(bench: Bench, tiny_alone: Any, schedule: str, pp: int) -> None:
    place = (f"parallel.pp={pp}", "parallel.dp=1", f"pipeline.schedule={schedule}")
    run = bench.run(Composition(pp, (*TINY_FP64, *place)))
    assert all("valid/loss" in row for row in run.rows)
    assert max(between(run, tiny_alone).values()) < FP64
