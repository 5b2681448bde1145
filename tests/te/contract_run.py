"""Whole runs over the library's modules: optimizer, checkpoints, resume, evaluation, against runs of the reference."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.rounding import order_free_products
from tests.runs import SMALL, prepare_text, read_checkpoint, run_in, train_main
from tests.spawn import Ranks
from tests.te import twin
from tests.te.twin import LOG
from train.precision import build
from train.track.metrics_file import read_metrics

STEPS = [
    *("model.kv_lora_rank=16", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16", "model.v_head_dim=16"),
    *("precision=fp8", "precision.power_of_two_scales=true", "train.max_steps=4", "checkpoint.interval=2"),
    *("checkpoint.keep_latest_k=0", "evaluate.interval=2", "evaluate.num_sequences=3", "recompute.norm=true"),
]
MEASURED = ("train/loss", "train/mtp_loss", "train/grad_norm", "moe/max_vio", "valid/loss")


class Run(NamedTuple):
    rows: list[dict]
    state: dict[str, Tensor]
    num_weights: int


@contextmanager
def claimed() -> Iterator[None]:
    """The run is on a CPU: the library can multiply there, because the twin can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "missing", lambda device: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _claimed() -> Iterator[None]:
    with claimed():
        yield


@contextmanager
def over_the_twin() -> Iterator[None]:
    """Transformer Engine over its twin in a rank, a process without this one's plugin. It ends with these tests."""
    if "transformer_engine" not in sys.modules:
        twin.install()
    with claimed(), order_free_products():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


def run(folder: Path, text: list[str], *settings: str) -> Run:
    LOG.take()
    assert train_main([*SMALL, *text, *STEPS, f"run.dir={folder}", *settings]) == 0
    state = read_checkpoint(folder / "checkpoints" / "step-00000004")
    return Run(read_metrics(folder / "metrics.jsonl"), state, LOG.num_weights)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("runs") / "library"
    return folder, run(folder, text, "precision.engine=transformer_engine")


def test_against_the_reference(library: tuple[Path, Run], tmp_path: Path, text: list[str]) -> None:
    """The first step is the same bits forward; its gradient differs where the report rounds inputs twice, above all by
    the E5M6 of o_proj (2^-5 of that matrix's gradient). Names, shapes and types of the state are the same."""
    ours, theirs = library[1], run(tmp_path / "reference", text, "precision.engine=reference")
    assert ours.num_weights > 0 == theirs.num_weights
    assert ours.rows[0]["train/loss"] == theirs.rows[0]["train/loss"]
    assert ours.rows[0]["train/mtp_loss"] == theirs.rows[0]["train/mtp_loss"]
    assert ours.rows[0]["train/grad_norm"] == pytest.approx(theirs.rows[0]["train/grad_norm"], rel=2**-5)
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=2e-3)
    kinds = [{name: (value.shape, value.dtype) for name, value in each.state.items()} for each in (ours, theirs)]
    assert kinds[0] == kinds[1]


def test_weights_are_quantised_once_a_step_and_for_its_evaluation(library: tuple[Path, Run]) -> None:
    """Four steps: after the last one weights are new once more, for the evaluation; after step 2 the evaluation's serve
    step 3. A model of 2 MoE layers and one of MTP has 3 * 8 experts with two matrices, 4 layers with 5 of attention and
    2 of a dense or shared MLP."""
    assert library[1].num_weights == 5 * (3 * 8 * 2 + 4 * (5 + 2))


def test_resumed_bit_for_bit(library: tuple[Path, Run], tmp_path: Path, text: list[str]) -> None:
    folder, whole = library
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    again = run(tmp_path / "again", text, "precision.engine=transformer_engine")
    for key in MEASURED:
        assert [row.get(key) for row in again.rows] == [row.get(key) for row in whole.rows], key
    assert all(torch.equal(value, again.state[name]) for name, value in whole.state.items())


def test_a_run_goes_on_with_the_other_engine(library: tuple[Path, Run], tmp_path: Path, text: list[str]) -> None:
    """The engine is like the device: a checkpoint does not know it."""
    shutil.copytree(library[0], tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-00000004")
    moved = run(tmp_path / "moved", text, "precision.engine=reference")
    assert moved.num_weights == 0
    assert moved.rows[2]["train/loss"] == library[1].rows[2]["train/loss"]


def test_widths_are_refused_before_a_step(tmp_path: Path, text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL, *text, *STEPS, "model.kv_lora_rank=8", f"run.dir={tmp_path / 'odd'}"]
    assert train_main([*settings, "precision.engine=auto"]) == 2
    assert "multiples of 16, not by layers.0.self_attn.kv_a_proj_with_mqa.weight" in capsys.readouterr().err


# Of the first loss, the first norm and all later losses, as tests/test_fp8.py has them for the reference.
# The same products in another order of float32 sums into `main_grad`.
SAME = (0.0, 1e-6, 1e-6)
# Tiles of an expert's tokens hold those of all ranks that share it.
OTHER_TILES = (1e-5, 1e-4, 1e-3)


@pytest.mark.parametrize(
    ("num_ranks", "topology", "tolerances"),
    [
        pytest.param(2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=dualpipev", SAME, id="pipeline"),
        pytest.param(2, "parallel.dp=2 parallel.ep=2", OTHER_TILES, id="experts"),
        pytest.param(
            4,
            "parallel.pp=2 parallel.dp=2 parallel.ep=2 pipeline.schedule=dualpipe",
            OTHER_TILES,
            id="pipeline and experts",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_on_several_ranks(
    ranks: Ranks,
    library: tuple[Path, Run],
    tmp_path: Path,
    text: list[str],
    num_ranks: int,
    topology: str,
    tolerances: tuple[float, float, float],
) -> None:
    """Weight gradients wait for their W action and rows for their experts' ranks: the numbers of one process."""
    words = [*SMALL, *text, *STEPS, "precision.engine=transformer_engine", "parallel.dispatch=flat", *topology.split()]
    found, single = run_in(ranks, tmp_path, words, num_ranks, over_the_twin).rows, library[1].rows
    first_loss, first_norm, later = tolerances
    assert found[0]["train/loss"] == pytest.approx(single[0]["train/loss"], rel=first_loss, abs=0)
    assert found[0]["train/grad_norm"] == pytest.approx(single[0]["train/grad_norm"], rel=first_norm, abs=0)
    for ours, theirs in zip(found, single, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=later, abs=0)
