"""precision=fp8 as a run: what multiplies in what, resumed bit for bit, and composed with experts and pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.runs import DENSE, SMALL, Finished, prepare_text, read_checkpoint, run_in, train_main
from tests.spawn import Ranks
from train import rank as program
from train.compose import load
from train.job import Job
from train.precision import reference, torch_engine
from train.precision.config import FP8_MODULES, MODULE_KEYS, Fp8, PrecisionConfig
from train.settings import group
from train.track.metrics_file import read_metrics

STEPS = ["precision=fp8", "train.max_steps=6", "checkpoint.interval=3", "checkpoint.keep_latest_k=0"]
MEASURED = ("train/loss", "train/mtp_loss", "train/seq_balance_loss", "train/grad_norm", "moe/max_vio", "valid/loss")
BYTES = "moe/internode_bytes"
OPERATIONS = {"fprop": 1, "dgrad": 1, "wgrad_": 0}  # name -> which argument says whose product it is


@dataclass
class Watched:
    """Which class took which product of which matrix, by where the matrix or its gradient lies."""

    taken: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    job: Job | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        classes = [reference.Fp8Engine, reference.Fp8Groups, torch_engine.TorchEngine, torch_engine._LoopedGroups]
        patches = [
            mock.patch.object(kind, name, self._wrap(kind, name, place))
            for kind in classes
            for name, place in OPERATIONS.items()
        ]
        assemble = program.assemble

        def remember(*args: Any) -> Job:
            self.job = assemble(*args)
            return self.job

        patches.append(mock.patch.object(program, "assemble", remember))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()

    def _wrap(self, kind: type, name: str, place: int) -> Any:
        inner = getattr(kind, name)

        def watched(engine: Any, *args: Tensor) -> Any:
            self.taken.setdefault((args[place].data_ptr(), name), set()).add(
                f"fp8 {engine_fp8(engine)}" if kind in (reference.Fp8Engine, reference.Fp8Groups) else "torch"
            )
            return inner(engine, *args)

        return watched


def engine_fp8(engine: Any) -> Any:
    return engine._fp8 if isinstance(engine, reference.Fp8Engine) else engine._engine._fp8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, text: list[str], watched: Watched) -> Finished:
    """One process, watched."""
    folder = tmp_path_factory.mktemp("fp8") / "single"
    torch.set_num_threads(1)
    with watched.watching():
        assert train_main([*SMALL, *text, *STEPS, f"run.dir={folder}"]) == 0
    return Finished(folder, read_metrics(folder / "metrics.jsonl"))


def modules_multiplied_as_the_table_says(watched: Watched, folder: Path) -> set[str]:
    """Those that the watched run has; every product of each was taken by the engine that the config in the run's folder
    names."""
    assert watched.job is not None
    precision = load(folder / "config.yaml").precision
    seen = set()
    for model in watched.job.models:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        for name, parameter in model.named_parameters():
            assert parameter.main_grad.dtype == torch.float32  # type: ignore[attr-defined]
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            module = f"experts.{module}" if ".experts." in name else module
            found = [
                watched.taken.get((place.data_ptr(), operation), set())
                for operation, place in (
                    ("fprop", parameter),
                    ("dgrad", parameter),
                    ("wgrad_", parameter.main_grad),  # type: ignore[attr-defined]
                )
            ]
            if module not in MODULE_KEYS:
                assert module in {"embed_tokens", "gate"} or parameter.ndim == 1, name
                assert found == [set()] * 3, name
                continue
            key = MODULE_KEYS[module]
            expected = {f"fp8 {FP8_MODULES[module]}" if precision.modules[key] == "fp8" else "torch"}
            assert found == [expected] * 3, name
            seen.add(module)
    return seen


# Those of grouped-query attention; latent attention without a latent for its queries has the first as well.
OF_GROUPED_ATTENTION = {"q_proj", "k_proj", "v_proj"}


def test_every_matrix_is_multiplied_as_the_table_says(single: Finished, watched: Watched) -> None:
    assert modules_multiplied_as_the_table_says(watched, single.folder) == set(MODULE_KEYS) - OF_GROUPED_ATTENTION


# The report's, and its opposite.
TABLE = group(PrecisionConfig, "precision", "fp8")
TURNED = [f"precision.modules.{key}={'fp8' if word == 'bf16' else 'bf16'}" for key, word in TABLE.modules.items()]


@pytest.mark.parametrize("table", [TURNED, [*TURNED[:2], *TURNED[4:]]], ids=["all turned", "half turned"])
def test_another_table_is_obeyed(tmp_path: Path, text: list[str], single: Finished, table: list[str]) -> None:
    watched = Watched()
    with watched.watching():
        assert train_main([*SMALL, *text, *STEPS, *table, f"run.dir={tmp_path}"]) == 0
    assert modules_multiplied_as_the_table_says(watched, tmp_path) == set(MODULE_KEYS) - OF_GROUPED_ATTENTION
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses != [row["train/loss"] for row in single.rows]
    assert losses == pytest.approx([row["train/loss"] for row in single.rows], rel=1e-3)


def test_a_run_is_resumed_with_its_own_table(
    tmp_path: Path, text: list[str], single: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(single.folder, tmp_path / "again")
    words = [*SMALL, *text, *STEPS, "precision.modules.o_proj=bf16", f"run.dir={tmp_path / 'again'}"]
    assert train_main(words) == 2
    assert "modules.o_proj" in capsys.readouterr().err


def test_every_matrix_of_a_dense_model_too(tmp_path: Path, text: list[str]) -> None:
    watched = Watched()
    with watched.watching():
        assert train_main([*DENSE, *text, *STEPS, "train.max_steps=1", f"run.dir={tmp_path}"]) == 0
    dense = {"o_proj", "gate_up_proj", "down_proj", "lm_head"}
    assert modules_multiplied_as_the_table_says(watched, tmp_path) == OF_GROUPED_ATTENTION | dense


def test_the_table_is_the_reports() -> None:
    """Sections 3.3.1 and 3.3.3, and the types of the published weights; docs/fp8.md names every module."""
    assert {module for module in MODULE_KEYS if not TABLE.is_fp8(module)} == {"eh_proj", "lm_head"}
    special = {module: fp8 for module, fp8 in FP8_MODULES.items() if fp8 != Fp8()}
    assert special == {
        "o_proj": Fp8(round_input=True, keep="e5m6"),
        "experts.gate_up_proj": Fp8(round_input=True),
        "experts.down_proj": Fp8(round_gradient=True),
    }
    page = (Path(__file__).resolve().parent.parent / "docs" / "fp8.md").read_text()
    assert all(f"`{module}`" in page for module in MODULE_KEYS)


def test_resumed_bit_for_bit(single: Finished, tmp_path: Path, text: list[str]) -> None:
    """Quantised weights are made anew from what a checkpoint holds."""
    folder = tmp_path / "again"
    shutil.copytree(single.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert train_main([*SMALL, *text, *STEPS, f"run.dir={folder}"]) == 0
    again = read_metrics(folder / "metrics.jsonl")
    for key in MEASURED:
        assert [row.get(key) for row in again] == [row.get(key) for row in single.rows]
    before, after = single.masters, read_checkpoint(folder / "checkpoints" / "step-00000006")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {before[name].dtype for name in before if name.startswith("master.")} == {torch.float32}


def test_it_is_not_bf16_and_close_to_it(single: Finished, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *STEPS[1:], "precision=bf16", f"run.dir={tmp_path}"]
    assert train_main(settings) == 0
    halves = [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    losses = [row["train/loss"] for row in single.rows]
    assert losses != halves
    assert losses == pytest.approx(halves, rel=1e-3)


# Between topologies: (of the first step's loss, of its gradient norm, of all later losses).
# Pipelines and data parallelism change neither tiles nor roundings, only the order of float32 sums into `main_grad`.
SAME = (0.0, 1e-6, 1e-6)
# Rows are quantised alike wherever they are multiplied, so the forward pass and gradients of inputs are the same, up to
# float32 sums of a product with another number of rows, which may turn a rounding to bfloat16. An expert's weight
# gradient quantises 128 tokens together, of all ranks that share it: its tiles are others.
SAME_ROWS = (1e-5, 1e-4, 1e-3)
# Tiles of tokens of every matrix are others.
OTHER_TILES = (1e-5, 1e-3, 1e-3)
# Two hops add a token's results in two rounds, each rounded to bfloat16, as in a bf16 run.
OTHER_SUMS = (1e-4, 1e-2, 1e-3)
COMPOSED = [
    (2, "parallel.dp=2 parallel.ep=2 parallel.dispatch=flat", SAME_ROWS),
    (2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=dualpipev", SAME),
    pytest.param(1, "train.micro_batch_size=8", OTHER_TILES, marks=pytest.mark.slow),
    pytest.param(2, "parallel.dp=2", SAME, marks=pytest.mark.slow),
    pytest.param(2, "parallel.pp=2 parallel.dp=1 pipeline.schedule=zb_h1", SAME, marks=pytest.mark.slow),
    pytest.param(
        4,
        "parallel.pp=2 parallel.dp=2 parallel.ep=2 parallel.dispatch=flat pipeline.schedule=dualpipe",
        SAME_ROWS,
        marks=pytest.mark.slow,
    ),
    pytest.param(2, "parallel.dp=2 zero.engine=deepspeed", SAME, marks=pytest.mark.slow),
    pytest.param(
        4,
        "parallel.dp=4 parallel.ep=4 parallel.dispatch=two_hop parallel.nodes=2",
        OTHER_SUMS,
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(
    ("world_size", "settings", "tolerances"), COMPOSED, ids=[str(getattr(case, "values", case)[1]) for case in COMPOSED]
)
def test_composed(
    ranks: Ranks,
    tmp_path: Path,
    text: list[str],
    single: Finished,
    world_size: int,
    settings: str,
    tolerances: tuple[float, float, float],
) -> None:
    run = run_in(ranks, tmp_path, [*SMALL, *text, *STEPS, *settings.split()], world_size)
    first_loss, first_norm, later = tolerances
    theirs, ours = single.rows, run.rows
    assert ours[0]["train/loss"] == pytest.approx(theirs[0]["train/loss"], rel=first_loss, abs=0)
    assert ours[0]["train/grad_norm"] == pytest.approx(theirs[0]["train/grad_norm"], rel=first_norm, abs=0)
    for row, twin in zip(ours, theirs, strict=True):
        assert row["train/loss"] == pytest.approx(twin["train/loss"], rel=later, abs=0)


@contextmanager
def uncoded() -> Iterator[None]:
    """Rows travel as they are."""
    with mock.patch("train.assemble.row_codec", lambda *_: None):
        yield


@pytest.mark.parametrize(
    "settings",
    [
        "parallel.dp=2 parallel.ep=2 parallel.dispatch=two_hop parallel.nodes=2",
        pytest.param("parallel.dp=2 parallel.ep=2 parallel.dispatch=flat parallel.nodes=2", marks=pytest.mark.slow),
    ],
)
def test_bytes_on_the_way_change_no_number(ranks: Ranks, tmp_path: Path, text: list[str], settings: str) -> None:
    """The rounding of what travels belongs to the model: without the codec the same bits, and more bytes."""
    words = [*SMALL, *text, *STEPS, "train.max_steps=3", *settings.split()]
    coded, plain = (run_in(ranks, tmp_path / str(fault is None), words, 2, fault) for fault in (None, uncoded))
    for key in MEASURED:
        assert [row.get(key) for row in coded.rows] == [row.get(key) for row in plain.rows]
    theirs = plain.masters
    assert all(torch.equal(value, theirs[name]) for name, value in coded.masters.items())
    assert coded.rows[0][BYTES] < plain.rows[0][BYTES]
    words += ["precision.modules.experts=bf16", "train.max_steps=1"]
    # Experts that multiply in bf16 are sent rows in bf16; here and there a token chooses another one.
    assert run_in(ranks, tmp_path / "bf16", words, 2).rows[0][BYTES] == pytest.approx(plain.rows[0][BYTES], rel=0.05)
