"""A rank that dies or stands still: every other one says what it did and for whom it waited, and the job ends."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.launched import Forked, last_step, local, torchrun
from tests.runs import SMALL, prepare_text

FOUR = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"]
# The second step has so many micro-batches that whatever happens after the first happens in the pipeline.
LONG = ["train.max_steps=3", "train.global_batch_size=4008", "evaluate.interval=0"]
RAMP = ["train.batch_ramp.start=8", "train.batch_ramp.tokens=1", "train.batch_ramp.quantum=4000"]
TIMEOUT_S = 5
WHERE = r"(\S+ \(micro-batch \d+ on stage \d+[^)]*\)|start of the pipeline)"
WORDS = rf"step 2, {WHERE}: (has waited|waited|was about to wait)\b.* for .* ranks? \d"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


def settings(text: list[str]) -> list[str]:
    return [*SMALL, *text, *FOUR, *LONG, *RAMP, f"run.hang_timeout_s={TIMEOUT_S}"]


def settle() -> None:
    """The step in `metrics.jsonl` is over on rank 0; a moment later all ranks are in the next one's pipeline."""
    time.sleep(1)


def last_words(folder: Path, rank: int) -> str:
    lines = (folder / "logs" / f"rank_{rank}.log").read_text().splitlines()
    return next((line for line in reversed(lines) if " ERROR " in line), "")


def assert_others_say_what_they_did(folder: Path, struck: int) -> None:
    for rank in set(range(4)) - {struck}:
        who = rf"ERROR rank {rank} \(pipeline rank {rank // 2}, data rank {rank % 2}\), "
        assert re.search(who + WORDS, last_words(folder, rank)), last_words(folder, rank)
    assert not last_words(folder, struck)


def test_a_stopped_rank_is_found_and_ended(tmp_path: Path, text: list[str]) -> None:
    with local(settings(text), tmp_path) as job:
        job.wait_for_step(1)
        settle()
        ranks, start_s = job.ranks(), time.monotonic()
        job.strike(1, signal.SIGSTOP)
        code, _, error = job.finish()
    assert code == 5
    assert time.monotonic() - start_s < TIMEOUT_S + 60  # the rest is for a machine that is busy
    assert_others_say_what_they_did(tmp_path, 1)
    assert "has waited" in "".join(last_words(tmp_path, rank) for rank in (0, 2, 3))
    why = error.strip().splitlines()[-1]
    log = tmp_path / "logs" / "rank_1.log"
    assert why.startswith(f"rank 1 is stopped, and others wait for it; its log: {log}; rank "), why
    assert re.search(WORDS, why)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_killed_rank_is_missed_by_all_others(tmp_path: Path, text: list[str]) -> None:
    job = Forked(settings(text), tmp_path, 4)
    job.wait_for_step(1)
    settle()
    job.processes[2].kill()
    codes = job.codes()
    assert codes[2] == -signal.SIGKILL and [codes[rank] for rank in (0, 1, 3)] == [6, 6, 6]
    assert_others_say_what_they_did(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("struck", range(4))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_any_rank(tmp_path: Path, text: list[str], struck: int, number: signal.Signals) -> None:
    with local([*settings(text), "pipeline.schedule=dualpipe"], tmp_path) as job:
        job.wait_for_step(1)
        settle()
        job.strike(struck, number)
        code, _, error = job.finish()
    assert code == (5 if number == signal.SIGSTOP else 137)
    assert error.strip().splitlines()[-1].startswith(f"rank {struck} "), error
    assert_others_say_what_they_did(tmp_path, struck)


@pytest.mark.slow
def test_under_torchrun_every_rank_says_it_on_standard_error(tmp_path: Path, text: list[str]) -> None:
    with torchrun(settings(text), tmp_path, 4) as job:
        job.wait_for(lambda: last_step(tmp_path) >= 1)
        settle()
        job.strike(3, signal.SIGSTOP)
        code, _, error = job.finish()
    assert code != 0
    for rank in range(3):
        assert re.search(rf"^rank {rank} \(.*\), {WORDS}", error, re.M), error


@pytest.mark.slow
def test_work_that_takes_longer_than_the_timeout_is_no_hang(tmp_path: Path, text: list[str]) -> None:
    """All ranks compute for longer than the timeout between two exchanges of one step."""
    big = ["train.seq_len=2048", "model.max_position_embeddings=4096", "train.max_steps=1", "train.global_batch_size=2"]
    alone = ["parallel.dp=2", "run.hang_timeout_s=1", "train.micro_batch_size=1", "evaluate.num_sequences=2"]
    with local([*SMALL, *text, *alone, *big, "model.hidden_size=256", "model.intermediate_size=4096"], tmp_path) as job:
        code, _, error = job.finish()
    assert code == 0, error
