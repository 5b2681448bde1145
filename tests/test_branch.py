"""A branch goes on from another run under changed settings: held against the parent's continuation, and a plain run."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.deviation import worst
from tests.plain_run import PlainRun, plain_run
from tests.runs import SMALL, Finished, forget_after, last_checkpoint, prepare_text, read_checkpoint, run_in, train_main
from tests.spawn import Ranks
from tests.wandb_case import wandb_history
from train import compose
from train.ancestry import ancestors
from train.track.metrics_file import read_loads

SEED = int(os.environ["HALOCLINE_SEED"])  # tests/conftest.py draws one
FP64 = 1e-9
PARENT = [
    *SMALL,
    *("train.max_steps=6", "lr_scheduler.phases=[]", "evaluate.interval=2", "evaluate.num_sequences=6"),
    *("checkpoint.interval=3", "checkpoint.keep_latest_k=9"),
]
LEFT_AT = 3
PLACE = [*("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"), "pipeline.schedule=dualpipe"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture(scope="module")
def fp64(text: list[str]) -> list[str]:
    return [*PARENT, *text, "precision=fp64"]


@pytest.fixture(scope="module")
def parent(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, fp64: list[str]) -> Finished:
    return run_in(ranks, tmp_path_factory.mktemp("parent") / "run", fp64, 1)


@pytest.fixture(scope="module")
def plain_parent(fp64: list[str]) -> PlainRun:
    return plain_run(compose.compose(fp64), until=LEFT_AT)


def branch_of(run: Finished | Path, step: int = LEFT_AT) -> str:
    folder = run if isinstance(run, Path) else run.folder
    return f"checkpoint.branch_from={folder}/checkpoints/step-{step:08d}"


def numbers(run: Finished) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k.startswith(("step", "train/", "valid/", "moe/"))} for row in run.rows]


def patience_of(run: Finished, step: int | None = None) -> tuple[float | None, int]:
    """What a checkpoint of the run, the last one by default, keeps of the validation losses so far."""
    folder = last_checkpoint(run.folder) if step is None else run.folder / "checkpoints" / f"step-{step:08d}"
    state = json.loads((folder / "state.json").read_text())
    return state["best_valid_loss"], state["num_evaluations_since_best"]


def assert_same_bits(run: Finished, other: Finished) -> None:
    assert numbers(run) == numbers(other)
    ours, theirs = run.masters, other.masters
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("precision=fp32 zero.engine=deepspeed", marks=pytest.mark.slow),
        pytest.param("precision=bf16 zero.engine=native optimizer.moments_dtype=bf16", marks=pytest.mark.slow),
        pytest.param("precision=fp32 zero.engine=native", marks=pytest.mark.slow),
        "precision=bf16 zero.engine=deepspeed",
    ],
)
def test_one_that_changes_nothing_is_its_parent_going_on(
    ranks: Ranks, tmp_path: Path, text: list[str], precision: str
) -> None:
    settings = [*PARENT, *text, *precision.split(), "optimizer.ema_decay=0.9", "parallel.dp=2"]
    parent = run_in(ranks, tmp_path / "parent", settings, 2)
    branch = run_in(ranks, tmp_path / "branch", [*settings, branch_of(parent)], 2)
    assert any(name.startswith("ema.") for name in branch.masters)
    assert_same_bits(branch, parent)
    assert patience_of(branch) == patience_of(parent)
    assert read_loads(branch.folder / "loads.jsonl") == read_loads(parent.folder / "loads.jsonl")


def test_elsewhere_it_equals_one_plain_process(ranks: Ranks, tmp_path: Path, fp64: list[str], parent: Finished) -> None:
    branch = run_in(ranks, tmp_path, [*fp64, branch_of(parent), *PLACE], 4)
    assert worst(branch, plain_run(compose.compose(fp64))) < FP64


# --- random changes ---


def changes(dice: random.Random) -> list[str]:
    """Settings that a branch changes, each with a chance of its own."""
    seq_len = dice.choice([24, 24, 9, 31, 48])
    batch = dice.choice([8, 8, 4, 12])
    yarn = "model.rope_scaling={type:yarn,factor:4,original_max_position_embeddings:24}"
    every = [
        f"train.seq_len={seq_len}",
        f"train.global_batch_size={batch}",
        f"train.batch_ramp={{start:4,tokens:{dice.choice([700, 1000])},quantum:4}}" if batch == 12 else "",
        yarn if seq_len > 24 else "",
        "model.rope_theta=500",
        dice.choice(["lr_scheduler.lr=0.001", "lr_scheduler.warmup_steps=6"]),
        dice.choice(
            [
                "lr_scheduler.phases=[{kind:constant,until_tokens:576},{kind:linear,end_lr:0}]",
                "lr_scheduler.phases=[{until_tokens:576},{kind:linear,lr:0,end_lr:0.002,tokens:400},{lr:0.002}]",
                "lr_scheduler.phases=[{share:0.5},{kind:cosine,end_lr:1e-4}]",
            ]
        ),
        "optimizer.beta1=0.8",
        "optimizer.beta2=0.99",
        "optimizer.weight_decay=0.01",
        dice.choice(["optimizer.clip_grad_norm=0.05", "optimizer.clip_grad_norm=0"]),
        "optimizer.moments_dtype=bf16",
        dice.choice(["moe.bias_update_rate=0.002", "moe.bias_update_until_tokens=900"]),
        "moe.seq_aux_coeff=0.01",
        "mtp.loss_weight=0.1",
        "data.document_mask=true",
        "train.seed=9",
        "evaluate.interval=1",
        f"train.max_steps={dice.choice([5, 7])}",
        dice.choice(["train.freeze=[embed_tokens.*,*.mlp.gate.*]", "train.freeze=[layers.0.*,mtp.*,*.experts.*]"]),
    ]
    return [
        each for each in every if each and (each.startswith(("train.seq_len", "train.global")) or dice.random() < 0.4)
    ]


@pytest.mark.parametrize("index", range(int(os.environ.get("HALOCLINE_BRANCHES", 2))), ids=lambda i: f"{SEED}-{i}")
def test_random_changes_equal_one_plain_process(
    ranks: Ranks, tmp_path: Path, fp64: list[str], parent: Finished, plain_parent: PlainRun, index: int
) -> None:
    dice = random.Random(f"{SEED}/{index}")
    drawn = changes(dice)
    place, num_ranks = dice.choice([([], 1), (["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"], 2)])
    print(f"HALOCLINE_SEED={SEED}", *drawn, *place, sep="\n")
    settings = [*fp64, *drawn, branch_of(parent), f"run.dir={tmp_path}"]
    branch = run_in(ranks, tmp_path, [*settings, *place], num_ranks)
    assert worst(branch, plain_run(compose.compose(settings), plain_parent)) < FP64


# --- the life of a branch ---

CHANGED = ["train.seq_len=31", "train.global_batch_size=4", "lr_scheduler.lr=0.001", "train.max_steps=9"]


def test_it_goes_on_by_itself_and_can_be_left_in_turn(
    ranks: Ranks, tmp_path: Path, text: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*PARENT, *text, "precision=fp32", "checkpoint.interval=1"]
    parent = run_in(ranks, tmp_path / "parent", [*settings, "train.max_steps=5"], 1)
    capfd.readouterr()
    child = [*settings, *CHANGED, f"checkpoint.branch_from={parent.folder}"]
    undisturbed = run_in(ranks, tmp_path / "child", child, 1)
    assert numbers(undisturbed)[:5] == numbers(parent)
    assert [row["step"] for row in undisturbed.rows] == list(range(1, 10))
    assert [row["train/consumed_tokens"] for row in undisturbed.rows[4:6]] == [5 * 192, 5 * 192 + 4 * 31]

    # Killed, and its parent gone on or gone away: what it was left at stands in its own checkpoints.
    killed = tmp_path / "killed"
    shutil.copytree(undisturbed.folder, killed)
    forget_after(killed, 7)
    shutil.rmtree(parent.folder)
    assert_same_bits(run_in(ranks, killed, child, 1), undisturbed)

    grandchild = [*settings, "train.max_steps=11", f"checkpoint.branch_from={killed}"]
    last = run_in(ranks, tmp_path / "grandchild", grandchild, 1)
    config = yaml.safe_load((last_checkpoint(last.folder) / "config.yaml").read_text())
    first, second = ancestors(config["checkpoint"]["ancestry"])
    assert (first.run, first.step, second.run, second.step) == (str(parent.folder), 5, str(killed), 9)
    assert [(each.key, each.was, each.now) for each in first.changes] == [
        ("train.seq_len", 24, 31),
        ("train.global_batch_size", 8, 4),
        ("train.max_steps", 5, 9),
        ("lr_scheduler.lr", 0.003, 0.001),
    ]
    assert numbers(last)[:9] == numbers(undisturbed)


def test_it_says_what_it_changes_before_its_first_step(
    tmp_path: Path, fp64: list[str], parent: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "branch"
    settings = [*fp64, *CHANGED, branch_of(parent), f"run.dir={folder}", "track.wandb=offline"]
    assert train_main(settings) == 0
    said = capfd.readouterr().out
    before, _ = said.split("step=4/9", 1)
    assert f"branches off {parent.folder} after step 3 and 576 tokens" in before
    assert "lr_scheduler.lr was 0.003 and is 0.001" in before and "train.seq_len was 24 and is 31" in before
    assert "576 tokens of the epoch have been read" in before
    assert train_main(settings) == 0
    assert "branches off" not in capfd.readouterr().out
    # The parent's steps are the first ones of the branch's own run in wandb.
    (kept,) = (folder / "wandb").glob("offline-run-*")
    history = wandb_history(kept)
    assert [step for step, _ in history] == list(range(1, 10))
    assert [values["train/loss"] for _, values in history[:3]] == [row["train/loss"] for row in parent.rows[:3]]


def test_an_average_that_the_parent_had_not_begins_with_the_weights(
    ranks: Ranks, tmp_path: Path, fp64: list[str], parent: Finished
) -> None:
    branch = run_in(ranks, tmp_path, [*fp64, branch_of(parent), "optimizer.ema_decay=0.5", "train.max_steps=4"], 1)
    before, after = read_checkpoint(parent.folder / "checkpoints" / "step-00000003"), branch.masters
    for name in (name for name in after if name.startswith("ema.")):
        master = "master." + name.removeprefix("ema.")
        assert torch.allclose(after[name], (before[master] + after[master]) / 2, rtol=1e-12, atol=0)


def test_patience_counts_anew_where_another_loss_is_measured(
    ranks: Ranks, tmp_path: Path, fp64: list[str], parent: Finished
) -> None:
    """No loss comes below one that is said to be lower by more than `min_improvement`: the first stays the best."""
    first = {row["step"]: row["valid/loss"] for row in parent.rows if "valid/loss" in row}[2]
    settings = [*fp64, branch_of(parent), "evaluate.min_improvement=100"]
    # Another bound on improvement is a change of what is evaluated, so the losses before it are forgotten.
    branch = run_in(ranks, tmp_path / "anew", [*settings, "train.max_steps=4"], 1)
    best, since = patience_of(branch)
    assert best == next(row["valid/loss"] for row in branch.rows if row["step"] == 4) and since == 0
    kept = run_in(ranks, tmp_path / "kept", [*fp64, branch_of(parent), "lr_scheduler.lr=0"], 1)
    assert patience_of(parent, LEFT_AT) == (first, 0)
    assert patience_of(kept)[0] <= first


def test_all_are_refused_in_a_sentence(
    tmp_path: Path, fp64: list[str], parent: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "model.hidden_size=48": "model.hidden_size was 32 there and is 48 here",
        "model.num_hidden_layers=4": "model.num_hidden_layers was 3 there and is 4 here",
        "model.n_routed_experts=16": "model.n_routed_experts was 8 there and is 16 here",
        "model.vocab_size=301": "model.vocab_size was 300 there and is 301 here",
        "train.max_steps=3": "the branch begins after step 3 and 576 tokens: it must end later",
        "train.freeze=[layer.0.*]": "train.freeze has layer.0.*, which matches no parameter of the model; did you mean",
        "train.freeze=['*']": "freezes every parameter",
        f"checkpoint.init_from={parent.folder}": "a run begins in one way",
        f"checkpoint.resume={parent.folder}": "a run begins in one way",
        f"run.dir={parent.folder}": "a branch is a new run, so choose another run.dir",
        "checkpoint.branch_from=nowhere": "checkpoint.branch_from=nowhere does not exist",
        "checkpoint.branch_from=''": "checkpoint.branch_from is empty",
    }
    for setting, said in cases.items():
        branch = [] if "branch_from" in setting else [branch_of(parent)]
        place = [] if "run.dir" in setting else [f"run.dir={tmp_path}/none"]
        assert train_main([*fp64, *branch, *place, setting]) == 2, setting
        assert said in capfd.readouterr().err, setting
    assert not (tmp_path / "none").exists()
    # The refusal of a resume names the way on, which is one.
    assert train_main([*fp64, f"run.dir={parent.folder}", "lr_scheduler.lr=0.5"]) == 2
    words = capfd.readouterr().err.split()
    named = next(word for word in words if word.startswith("checkpoint.branch_from="))
    compose.compose([*fp64, named, f"run.dir={tmp_path}/new", "lr_scheduler.lr=0.5", "train.max_steps=9"])


# --- frozen parts ---


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("native", marks=pytest.mark.slow)])
def test_frozen_parts_keep_every_bit_until_they_are_thawed(
    ranks: Ranks, tmp_path: Path, text: list[str], engine: str
) -> None:
    settings = [*PARENT, *text, "precision=bf16", f"zero.engine={engine}", "parallel.dp=2", "optimizer.ema_decay=0.9"]
    parent = run_in(ranks, tmp_path / "parent", [*settings, "train.max_steps=3"], 2)
    freeze = "train.freeze=[layers.1.*,embed_tokens.*]"
    frozen = run_in(ranks, tmp_path / "frozen", [*settings, freeze, branch_of(parent), "train.max_steps=6"], 2)
    thawed = run_in(ranks, tmp_path / "thawed", [*settings, branch_of(frozen, 6), "train.max_steps=7"], 2)
    before, after, last = parent.masters, frozen.masters, thawed.masters
    assert before.keys() == after.keys() == last.keys()
    for name in before:
        parameter = name.removeprefix("master.").removeprefix("exp_avg.").removeprefix("exp_avg_sq.")
        if name.startswith("ema."):
            continue
        stays = parameter.startswith(("layers.1.", "embed_tokens."))
        assert before[name].equal(after[name]) == stays, name
        assert not after[name].equal(last[name]), name


def test_frozen_from_the_first_step_on(ranks: Ranks, tmp_path: Path, fp64: list[str]) -> None:
    settings = [*fp64, "train.freeze=[layers.2.*,'*norm.weight',lm_head.weight]", "optimizer.clip_grad_norm=0.05"]
    run = run_in(ranks, tmp_path, [*settings, *PLACE], 4)
    assert worst(run, plain_run(compose.compose(settings))) < FP64
