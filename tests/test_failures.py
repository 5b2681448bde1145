"""What ends a job ends it on all ranks, says why, and leaves the last good checkpoint as it was."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.launched import last_step, torchrun
from tests.runs import SMALL, Finished, prepare_text, read_checkpoint, run_in
from tests.spawn import STOP_S, Ranks
from train.compose import compose
from train.data.rows.blend import open_stream
from train.data.rows.epochs import Rows

FOUR = ["parallel.dp=4", "parallel.ep=2", "parallel.dispatch=flat"]
# Steps of the runs that a bad one ends; a checkpoint lies just before it.
STEPS = ["train.max_steps=4", "checkpoint.interval=2"]
BAD_STEP = 3
BAD_POSITION = (BAD_STEP - 1) * 8 + 5  # steps take 8 sequences, ranks 2 each: this one is rank 2's


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


def record_of(run: Finished) -> dict[str, Any]:
    return json.loads((run.folder / "not_finite.json").read_text())


def assert_last_good_is_whole(run: Finished, step: int) -> None:
    assert sorted(path.name for path in (run.folder / "checkpoints").glob("*")) == ["latest", f"step-{step:08d}"]
    values = read_checkpoint(run.folder / "checkpoints" / f"step-{step:08d}")
    assert all(bool(value.isfinite().all()) for value in values.values())


# --- not finite ---


@contextmanager
def a_sequence_spoils(what: str) -> Iterator[None]:
    """The micro-batch of the sequence at BAD_POSITION has a loss, or only a gradient, that is not finite."""
    from train.stage import Stage

    original, rows, bad = Stage.forward, Rows.rows, list[torch.Tensor]()

    def note(self: Rows, first: int, count: int) -> Any:
        found = rows(self, first, count)
        if self.order == "shuffled" and first <= BAD_POSITION < first + count:
            bad.append(found)  # by itself: it is read ahead, and by another thread
        return found

    def forward(self: Any, micro_batch: int, x: Any) -> Any:
        y = yield from original(self, micro_batch, x)
        tokens = self._tokens(micro_batch) if self.model.reads_tokens else None
        spoilt = any(tokens is each for each in bad)
        if spoilt and what == "loss":
            self.findings[micro_batch].metrics["train/loss"] = torch.tensor(torch.nan, dtype=torch.float64)
        if spoilt and what == "gradient":
            record = self._records[micro_batch]
            record._losses = [(number, factor * torch.inf) for number, factor in record._losses]
        return y

    with mock.patch.object(Stage, "forward", forward), mock.patch.object(Rows, "rows", note):
        yield


def loss_is_nan() -> Any:
    return a_sequence_spoils("loss")


def gradient_is_inf() -> Any:
    return a_sequence_spoils("gradient")


@pytest.mark.parametrize(("fault", "engine"), [(loss_is_nan, "native"), (gradient_is_inf, "deepspeed")])
def test_one_bad_sequence_stops_all_ranks_and_is_named(
    ranks: Ranks, tmp_path: Path, text: list[str], fault: Any, engine: str
) -> None:
    settings = [*SMALL, *text, *FOUR, *STEPS, f"zero.engine={engine}"]
    run = run_in(ranks, tmp_path, settings, 4, fault, exit_code=3)
    assert [row["step"] for row in run.rows] == [1, 2]
    record = record_of(run)
    assert record["step"] == BAD_STEP
    config = compose([*SMALL, *text])
    rows = open_stream(config.data, "train", config.train.seq_len, config.train.seed)
    documents = [document._asdict() for document in rows.documents(BAD_POSITION)]
    assert record["sequences"] == [{"rank": 2, "sequence": BAD_POSITION, "documents": documents}]
    assert documents and Path(config.data.source or "", documents[0]["file"]).exists()
    assert_last_good_is_whole(run, BAD_STEP - 1)
    # Without the fault the same command goes on from there.
    again = run_in(ranks, tmp_path, settings, 4)
    assert [row["step"] for row in again.rows] == [1, 2, 3, 4]


@contextmanager
def an_expert_overflows() -> Iterator[None]:
    """In the bad step the weight gradient of rank 1's experts is not finite, and no other gradient is."""
    from train import loop, not_finite

    original = loop.accumulate, not_finite.bad_gradients

    def spoil(job: Any) -> None:
        if job.groups.mesh.rank == 1 and job.step == BAD_STEP - 1:
            (model,) = job.models
            param = next(p for name, p in model.named_parameters() if model.is_expert(name))
            param.main_grad.view(-1)[0] = torch.inf

    def accumulate(job: Any, *rest: Any) -> Any:
        complete = job.optimizer.complete

        def spoilt(position: int) -> None:
            spoil(job)  # before it is summed
            complete(position)

        with mock.patch.object(job.optimizer, "complete", spoilt):
            return original[0](job, *rest)

    def bad(job: Any) -> Any:
        spoil(job)
        return original[1](job)

    with mock.patch.object(loop, "accumulate", accumulate), mock.patch.object(not_finite, "bad_gradients", bad):
        yield


def test_an_expert_whose_gradient_overflows_accuses_all_whose_tokens_it_may_have_seen(
    ranks: Ranks, tmp_path: Path, text: list[str]
) -> None:
    settings = [*SMALL, *text, *FOUR, *STEPS]
    run = run_in(ranks, tmp_path, settings, 4, an_expert_overflows, exit_code=3)
    found = [(each["rank"], each["sequence"]) for each in record_of(run)["sequences"]]
    first = (BAD_STEP - 1) * 8
    assert found == [(number // 2, first + number) for number in range(8)]
    assert_last_good_is_whole(run, BAD_STEP - 1)


def test_a_learning_rate_that_diverges(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *FOUR, "zero.engine=deepspeed"]
    good = [*settings, "train.max_steps=2", "lr_scheduler.phases=[{kind:constant}]"]
    run_in(ranks, tmp_path / "good", good, 4)
    run = run_in(ranks, tmp_path / "bad", [*settings, "lr_scheduler.lr=1e30"], 4, exit_code=3)
    assert record_of(run)["step"] == len(run.rows) + 1
    assert len(record_of(run)["sequences"]) == 8
    assert not list((tmp_path / "bad" / "checkpoints").glob("step-*"))


@contextmanager
def valid_loss_is_nan() -> Iterator[None]:
    with mock.patch("train.loop.evaluate", lambda job: {"valid/loss": float("nan")}):
        yield


def test_weights_spoilt_by_the_last_update_are_not_saved(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, "checkpoint.interval=4"]
    run = run_in(ranks, tmp_path, settings, 1, valid_loss_is_nan, exit_code=3)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4] and record_of(run)["step"] == 5
    assert_last_good_is_whole(run, 4)


# --- disks and deaths ---


@contextmanager
def the_disk_is_full(*steps: int) -> Iterator[None]:
    """Rank 1 cannot write its share of the checkpoints of these steps."""
    from train.checkpoint.writer import FlatWriter

    original = FlatWriter.write_data

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        import torch.distributed as dist

        if dist.get_rank() == 1 and any(f"{step:08d}" in str(self.path) for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, plan, planner)

    with mock.patch.object(FlatWriter, "write_data", write_data):
        yield


def test_a_disk_that_one_rank_finds_full(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    """A checkpoint on the way is tried again when the next is due; the last one ends the job with a sentence."""
    settings = [*SMALL, *text, *FOUR, "train.max_steps=4", "checkpoint.interval=1", "checkpoint.keep_latest_k=1"]
    run = run_in(ranks, tmp_path, settings, 4, partial(the_disk_is_full, 2, 4), exit_code=4)
    assert_last_good_is_whole(run, 3)
    words = "could not be written to {}/checkpoints: No space left on device (on rank 1) (needs about "
    assert f"checkpoint of step 2 {words.format(tmp_path)}" in (tmp_path / "logs" / "rank_0.log").read_text()
    for rank in range(4):
        last = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()[-1]
        assert f"checkpoint of step 4 {words.format(tmp_path)}" in last
        assert last.endswith("step 3 is the newest whole one")
    # With space again, the same command goes on.
    assert len(run_in(ranks, tmp_path, settings, 4).rows) == 4


def test_torchrun_ends_when_a_rank_dies(tmp_path: Path, text: list[str]) -> None:
    with torchrun([*SMALL, *text, "parallel.dp=2", "train.max_steps=100000"], tmp_path, 2) as job:
        job.wait_for(lambda: last_step(tmp_path) >= 1)
        start_s = time.monotonic()
        job.strike(1)
        code, _, error = job.finish()
    assert code != 0
    assert "Signal 9 (SIGKILL)" in error and "local_rank: 1" in error
    # Far from the ten minutes that a collective would wait.
    assert time.monotonic() - start_s < STOP_S / 2


def test_a_mistake_is_said_once_under_torchrun(tmp_path: Path) -> None:
    with torchrun(["parallel.dp=2", "model.n_group=3"], tmp_path, 2) as job:
        code, _, error = job.finish()
    assert code != 0
    assert error.count("model.n_group=3") == 1
