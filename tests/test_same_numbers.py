"""Topology changes nothing but speed: every run equals one plain process, and deliberate faults do not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.deviation import of_rows, worst
from tests.plain_run import PlainRun, plain_run
from tests.runs import SMALL, Finished, prepare_text, run_in
from tests.spawn import Ranks
from train.compose import compose

# (ranks, settings). Every way of dispatch, expert layout, node count, engine and micro-batch size meets some other.
TOPOLOGIES = [
    (1, "train.micro_batch_size=4"),
    pytest.param(1, "parallel.dispatch=two_hop train.micro_batch_size=8", marks=pytest.mark.slow),
    pytest.param(2, "parallel.dp=2", marks=pytest.mark.slow),
    pytest.param(
        2,
        "parallel.dp=2 parallel.ep=2 parallel.dispatch=flat recompute.nodes=[attention,experts,dense]",
        marks=pytest.mark.slow,
    ),
    (2, "parallel.dp=2 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=2 train.micro_batch_size=2"),
    pytest.param(4, "parallel.dp=4 train.micro_batch_size=2", marks=pytest.mark.slow),
    pytest.param(4, "parallel.dp=4 parallel.ep=2 parallel.dispatch=flat", marks=pytest.mark.slow),
    pytest.param(
        4,
        "parallel.dp=4 parallel.ep=2 parallel.dispatch=flat parallel.nodes=4 train.micro_batch_size=2",
        marks=pytest.mark.slow,
    ),
    pytest.param(4, "parallel.dp=4 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=2", marks=pytest.mark.slow),
    pytest.param(4, "parallel.dp=4 parallel.ep=4 parallel.dispatch=flat parallel.nodes=2", marks=pytest.mark.slow),
    pytest.param(4, "parallel.dp=4 parallel.ep=4 parallel.dispatch=two_hop", marks=pytest.mark.slow),
    (4, "parallel.dp=4 parallel.ep=4 parallel.dispatch=two_hop parallel.nodes=2 train.micro_batch_size=2"),
    pytest.param(4, "parallel.dp=4 parallel.ep=4 parallel.dispatch=two_hop parallel.nodes=4", marks=pytest.mark.slow),
]


def names(cases: list[Any]) -> list[str]:
    """The settings of each case, marked as slow or not."""
    return [str(getattr(case, "values", case)[1]) for case in cases]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture(scope="module")
def plain_fp64(text: list[str]) -> PlainRun:
    return plain_run(compose([*SMALL, *text, "precision=fp64"]))


@pytest.fixture(scope="module")
def plain_fp32(text: list[str]) -> PlainRun:
    return plain_run(compose([*SMALL, *text, "precision=fp32"]))


@pytest.mark.parametrize(("world_size", "settings"), TOPOLOGIES, ids=names(TOPOLOGIES))
def test_fp64_equals_one_plain_process(
    ranks: Ranks, tmp_path: Path, text: list[str], plain_fp64: PlainRun, world_size: int, settings: str
) -> None:
    run = run_in(ranks, tmp_path, [*SMALL, *text, "precision=fp64", *settings.split()], world_size)
    # Sums in another order differ by fp64's rounding, which ten steps of AdamW do not lift past 1e-9.
    assert worst(run, plain_fp64) < 1e-9


@pytest.mark.slow
def test_kernels_of_gpus_equal_one_plain_process(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    """In Triton's interpreter, a second for a hundred launches: one step, and the validation loss of what it makes."""
    short = ["train.max_steps=1", "train.global_batch_size=2", "train.seq_len=12", "lr_scheduler.warmup_steps=0"]
    words = [*SMALL, *text, "precision=fp64", "evaluate.num_sequences=2", "model.num_hidden_layers=2", *short]
    split = ["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=two_hop", "parallel.nodes=2", "run.kernels=triton"]
    assert worst(run_in(ranks, tmp_path, [*words, *split], 2), plain_run(compose(words))) < 1e-9


# Pipelines of one model: every schedule, experts and mirrors, an empty stage, both ends on one rank and on two,
# recompute. On demand, as tests/test_compositions.py draws others all the time.
FINE = "recompute.norm=true recompute.mla_up_proj=true"
PIPELINES = [
    (2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=zb_h1"),
    (2, f"parallel.pp=2 parallel.dp=1 pipeline.schedule=zb_h1 {FINE} recompute.nodes=[attention,dense]"),
    (2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=interleaved_1f1b"),
    (2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=dualpipev train.micro_batch_size=2"),
    (4, f"parallel.pp=2 parallel.dp=2 parallel.ep=2 parallel.dispatch=flat pipeline.schedule=dualpipe {FINE}"),
    (
        4,
        "parallel.pp=2 parallel.dp=2 parallel.ep=2 parallel.dispatch=flat pipeline.schedule=dualpipe "
        "recompute.nodes=[attention,experts,dense] train.micro_batch_size=2",
    ),
    (4, "parallel.pp=2 parallel.dp=2 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=4 pipeline.schedule=zbv"),
    (4, "parallel.pp=2 parallel.dp=2 pipeline.schedule=1f1b pipeline.pairs=true train.micro_batch_size=2"),
    (4, "parallel.pp=4 parallel.dp=1 pipeline.schedule=dualpipe pipeline.layers=[2,0,1,1]"),
]


@pytest.fixture(scope="module")
def deep(text: list[str]) -> list[str]:
    """Settings of a model with a layer more and a batch that fills a pipeline."""
    return [*SMALL, *text, "precision=fp64", "model.num_hidden_layers=4", "train.global_batch_size=16"]


@pytest.fixture(scope="module")
def plain_deep(deep: list[str]) -> PlainRun:
    return plain_run(compose([*deep, "train.max_steps=5"]))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "settings"), PIPELINES, ids=names(PIPELINES))
def test_pipelines_equal_one_plain_process(
    ranks: Ranks, tmp_path: Path, deep: list[str], plain_deep: PlainRun, world_size: int, settings: str
) -> None:
    run = run_in(ranks, tmp_path, [*deep, "train.max_steps=5", *settings.split()], world_size)
    assert worst(run, plain_deep) < 1e-9


# Routing and balance of DeepSeek-V2: no biases, devices as groups, three losses; and V3's routing with all of them.
V2 = "model.scoring_func=softmax model.topk_method=group_limited_greedy model.norm_topk_prob=false"
V2 += " model.n_shared_experts=2 model.routed_scaling_factor=4 moe.bias_update_rate=0"
LOSSES = "moe.seq_aux_coeff=0.03 moe.device_aux_coeff=0.05 moe.comm_aux_coeff=0.02"


@pytest.mark.parametrize(
    ("recipe", "world_size", "settings"),
    [
        (f"{V2} {LOSSES}", 2, "parallel.dp=2 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=2"),
        pytest.param(LOSSES, 4, "parallel.pp=2 parallel.dp=2 train.micro_batch_size=2", marks=pytest.mark.slow),
    ],
    ids=["v2", "v3 with losses"],
)
def test_balance_losses_equal_one_plain_process(
    ranks: Ranks, tmp_path: Path, text: list[str], recipe: str, world_size: int, settings: str
) -> None:
    base = [*SMALL, *text, "precision=fp64", *recipe.split(), "train.max_steps=5"]
    run = run_in(ranks, tmp_path, [*base, *settings.split()], world_size)
    plain = plain_run(compose(base))
    assert {"train/device_balance_loss", "train/comm_balance_loss"} <= plain.rows[0].keys()
    assert worst(run, plain) < 1e-9


FP32 = [
    (1, "zero.engine=deepspeed"),
    pytest.param(2, "parallel.dp=2 parallel.ep=2 parallel.dispatch=flat zero.engine=deepspeed", marks=pytest.mark.slow),
    pytest.param(
        4,
        "parallel.dp=4 parallel.ep=2 parallel.dispatch=flat zero.engine=deepspeed train.micro_batch_size=2",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        4,
        "parallel.dp=4 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=2 zero.engine=native",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("world_size", "settings"), FP32, ids=names(FP32))
def test_fp32_equals_as_far_as_single_precision_can_hold(
    ranks: Ranks, tmp_path: Path, text: list[str], plain_fp32: PlainRun, world_size: int, settings: str
) -> None:
    assert_equal_in_fp32(
        run_in(ranks, tmp_path, [*SMALL, *text, "precision=fp32", *settings.split()], world_size), plain_fp32
    )


def assert_equal_in_fp32(run: Finished, plain_fp32: PlainRun) -> None:
    for step, (ours, theirs) in enumerate(zip(run.rows, plain_fp32.rows, strict=True)):
        # A router's tie may fall otherwise under a re-associated sum, and then one token takes another way. In these
        # ten steps no choice is closer than 1.7e-6; single precision moves them by 3e-7, and losses by 1e-7.
        loss = 1e-6 if step == 0 else 1e-4
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=loss)
        if step == 0:
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)


@contextmanager
def routes_recorded(folder: Path) -> Iterator[None]:
    """Writes what this rank's routers chose in training, call by call, to `folder`/routes_R.pt."""
    from train.model.router import Router

    original, chosen = Router.select, []

    def select(self: Any, scores: Any) -> Any:
        indices = original(self, scores)
        if self.training:
            chosen.append(indices)
        return indices

    with mock.patch.object(Router, "select", select):
        yield
    torch.save(chosen, folder / f"routes_{os.environ['RANK']}.pt")


def test_fp32_over_nodes_and_its_routes_differ_only_at_ties(
    ranks: Ranks, tmp_path: Path, text: list[str], plain_fp32: PlainRun
) -> None:
    settings = [*SMALL, *text, "precision=fp32", "zero.engine=deepspeed", "parallel.dp=4", "parallel.ep=4"]
    settings += ["parallel.dispatch=two_hop", "parallel.nodes=2"]
    assert_equal_in_fp32(run_in(ranks, tmp_path, settings, 4, partial(routes_recorded, tmp_path)), plain_fp32)
    recorded = [iter(torch.load(tmp_path / f"routes_{rank}.pt")) for rank in range(4)]
    config = compose(settings)
    num_steps, per_rank, num_routers = config.train.max_steps, config.train.global_batch_size // 4, 3
    plain = iter(plain_fp32.routes)
    num_tokens = num_others = 0
    for _step, rank, _sequence, _router in itertools.product(
        range(num_steps), range(4), range(per_rank), range(num_routers)
    ):
        ours, (theirs, gaps) = next(recorded[rank]), next(plain)
        other = (ours.sort(-1).values != theirs.sort(-1).values).any(-1)
        num_tokens, num_others = num_tokens + len(other), num_others + int(other.sum())
        assert bool((gaps[other] < 1e-5).all())
    # Ties are rare: about as rare as the gap is narrow.
    assert num_others <= 1e-3 * num_tokens


# --- deliberate faults, made inside the ranks ---


@contextmanager
def experts_reduced_over_the_dense_group() -> Iterator[None]:
    from parallel.zero.sets import ReplicaGroups
    from train import assemble

    with mock.patch.object(assemble, "ReplicaGroups", lambda dense, expert, *rest: ReplicaGroups(dense, dense, *rest)):
        yield


@contextmanager
def ep_left_out_of_the_norm() -> Iterator[None]:
    from parallel.everyone import Everyone
    from parallel.zero.sets import ReplicaGroups
    from train import assemble

    with mock.patch.object(
        assemble, "ReplicaGroups", lambda dense, expert, *rest: ReplicaGroups(dense, expert, world=Everyone.of(expert))
    ):
        yield


@contextmanager
def load_counted_twice() -> Iterator[None]:
    """Some ranks count the first router's tokens again, as a recomputed forward would."""
    from train import loop

    def twice(job: Any, plan: Any, tally: Any, asked: Any, original: Any = loop.reduce) -> Any:
        tally.load[0] += tally.load[0] * (1 + job.groups.mesh.rank)
        return original(job, plan, tally, asked)

    with mock.patch.object(loop, "reduce", twice):
        yield


@contextmanager
def mtp_label_off_by_one() -> Iterator[None]:
    from train.model.transformer import Transformer

    original = Transformer.predict_further

    def shifted(self: Any, hidden: Any, tokens: Any, *rest: Any) -> Any:
        return original(self, hidden, torch.cat([tokens[:, :-1], tokens[:, -2:-1]], 1), *rest)

    with mock.patch.object(Transformer, "predict_further", shifted):
        yield


@contextmanager
def bias_moved_per_micro_batch() -> Iterator[None]:
    from train.recipe.balance import update_bias
    from train.stage import Stage

    original = Stage.forward

    def forward(self: Any, micro_batch: int, x: Any) -> Any:
        y = yield from original(self, micro_batch, x)
        if self.model.training:
            update_bias(self.model, self.findings[micro_batch].load, 0.001)
        return y

    with mock.patch.object(Stage, "forward", forward):
        yield


@contextmanager
def mean_over_the_micro_batch() -> Iterator[None]:
    from train import loop

    def terms(job: Any, plan: Any, original: Any = loop.loss_terms) -> Any:
        from dataclasses import replace

        return original(job, replace(plan, num_sequences=job.config.train.micro_batch_size))

    with mock.patch.object(loop, "loss_terms", terms):
        yield


FAULTS = [
    experts_reduced_over_the_dense_group,
    ep_left_out_of_the_norm,
    load_counted_twice,
    mtp_label_off_by_one,
    bias_moved_per_micro_batch,
    mean_over_the_micro_batch,
]
FAULTY = ["parallel.dp=4", "parallel.ep=2", "parallel.dispatch=flat"]


@pytest.fixture(scope="module")
def short(text: list[str]) -> list[str]:
    """Settings of a run that is long enough for every fault to show."""
    return [*SMALL, *text, "precision=fp64", "train.max_steps=4"]


@pytest.fixture(scope="module")
def plain_short(short: list[str]) -> PlainRun:
    return plain_run(compose(short))


def test_without_a_fault_it_is_green(ranks: Ranks, tmp_path: Path, short: list[str], plain_short: PlainRun) -> None:
    assert worst(run_in(ranks, tmp_path, [*short, *FAULTY], 4), plain_short) < 1e-9


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_turns_it_red(
    ranks: Ranks, tmp_path: Path, short: list[str], plain_short: PlainRun, fault: Any
) -> None:
    # Some faults are also noticed by the checkpoint, whose ranges then do not fit together; the numbers tell all.
    run = run_in(ranks, tmp_path, [*short, *FAULTY], 4, fault, exit_code=None)
    assert max(of_rows(run, plain_short).values()) > 1e-6
