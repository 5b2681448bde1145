"""How the ranks of a run begin, and how a run that is asked to stop ends, as people start it."""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.launched import Forked, Launched, alone, last_step, local, torchrun
from tests.runs import SMALL, last_checkpoint, prepare_text, run_in, train_main
from tests.spawn import STOP_S, Ranks

TWO = ["parallel.dp=2"]
# Ranks that wait say so after a quarter of the limit; none may be taken for dead however busy the machine is.
WATCHED = [*TWO, "run.hang_timeout_s=20"]
ENDLESS = ["train.max_steps=1000000", "lr_scheduler.phases=[{kind:constant}]"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@contextmanager
def another_prepares(folder: Path) -> Iterator[None]:
    """Rank 0's preparation waits in this folder, for as long as the block lasts."""
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_ranks_with_other_settings_do_not_train(tmp_path: Path, text: list[str]) -> None:
    lr = ["lr_scheduler.lr=0.003", "lr_scheduler.lr=0.3"]
    job = Forked([*SMALL, *text, *TWO], tmp_path / "run", 2, own=lambda rank: [lr[rank], f"train.seed={rank}"])
    assert job.codes(patience_s=STOP_S) == [2, 2]
    assert job.said() == (
        "the ranks were not started alike: train.seed is 0 on rank 0 and 1 on rank 1; "
        "lr_scheduler.lr is 0.003 on rank 0 and 0.3 on rank 1. Start all in the same way\n"
    )
    assert not (tmp_path / "run").exists()


def test_ranks_wait_for_rank_0_and_take_its_config(tmp_path: Path, text: list[str]) -> None:
    """Rank 0 prepares for a while, and the run's folder is named by a clock that shows each rank another time."""
    settings = [*SMALL, *text, *WATCHED, f"data.dir={tmp_path / 'tokens'}", "train.max_steps=1"]
    with another_prepares(tmp_path / "tokens"):
        job = Forked(settings, tmp_path / "runs", 2, own=lambda _: [f"run.dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}"])
        waits = f"s for rank 0, which prepares the data: another process is preparing {tmp_path / 'tokens'}: waiting"
        job.wait_for(lambda: waits in job.said())
    assert job.codes(patience_s=STOP_S) == [0, 0], job.said()
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert waits in (run / "logs" / "rank_1.log").read_text()
    assert last_checkpoint(run).name == "step-00000001"


def test_a_rank_0_that_dies_while_it_prepares_is_missed_at_once(tmp_path: Path, text: list[str]) -> None:
    with another_prepares(tmp_path / "tokens"):
        job = Forked([*SMALL, *text, *TWO, f"data.dir={tmp_path / 'tokens'}"], tmp_path / "run", 2)
        log = tmp_path / "run" / "logs" / "rank_0.log"
        job.wait_for(lambda: log.exists() and "is preparing" in log.read_text())
        job.processes[0].kill()
        assert job.codes(patience_s=STOP_S) == [-signal.SIGKILL, 6]
    # One line, and none of the library's.
    assert len(job.said().splitlines()) == 1
    assert job.said().startswith("rank 1") and " from rank 0, and that failed: " in job.said()


@pytest.mark.slow
def test_a_rank_0_that_is_stopped_while_it_prepares_is_given_up(tmp_path: Path, text: list[str]) -> None:
    """It keeps the ranks' meeting point, which then does not answer at all."""
    with another_prepares(tmp_path / "tokens"):
        job = Forked([*SMALL, *text, *WATCHED, f"data.dir={tmp_path / 'tokens'}"], tmp_path / "run", 2)
        log = tmp_path / "run" / "logs" / "rank_0.log"
        job.wait_for(lambda: log.exists() and "is preparing" in log.read_text())
        assert job.processes[0].pid is not None
        os.kill(job.processes[0].pid, signal.SIGSTOP)
        job.wait_for(lambda: False)  # until a rank has ended
        assert job.codes() == [-signal.SIGKILL, 5]


def test_asked_to_stop_while_it_prepares_a_run_ends_at_once(tmp_path: Path, text: list[str]) -> None:
    with (
        another_prepares(tmp_path / "tokens"),
        alone([*SMALL, *text, f"data.dir={tmp_path / 'tokens'}"], tmp_path / "run") as job,
    ):
        log = tmp_path / "run" / "logs" / "rank_0.log"
        job.wait_for(lambda: log.exists() and "is preparing" in log.read_text())
        job.process.send_signal(signal.SIGINT)
        code, out, error = job.finish()
    assert (code, out, error) == (130, "", "stopped by SIGINT before the first step: there was nothing to save\n")


def torchrun_two(settings: Sequence[str], folder: Path) -> Launched:
    return torchrun([*settings, *TWO], folder, 2)


@pytest.mark.parametrize(
    ("start", "number"),
    [
        pytest.param(alone, signal.SIGINT, id="one process, SIGINT"),
        pytest.param(torchrun_two, signal.SIGINT, id="torchrun, SIGINT"),
        pytest.param(local, signal.SIGHUP, id="launch local, SIGHUP"),
        pytest.param(alone, signal.SIGUSR1, id="one process, SIGUSR1", marks=pytest.mark.slow),
        pytest.param(torchrun_two, signal.SIGHUP, id="torchrun, SIGHUP", marks=pytest.mark.slow),
        pytest.param(local, signal.SIGINT, id="launch local, SIGINT", marks=pytest.mark.slow),
        pytest.param(local, signal.SIGUSR1, id="launch local, SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves(
    tmp_path: Path, text: list[str], start: Callable[[Sequence[str], Path], Launched], number: signal.Signals
) -> None:
    with start([*SMALL, *text, *ENDLESS], tmp_path / "run") as job:
        job.wait_for_step(1)
        job.process.send_signal(number)
        code, out, _ = job.finish()
    assert code == 0 or start is torchrun_two  # torchrun itself ends by its own exception
    step = last_step(tmp_path / "run")
    assert f"stopped and saved after step {step}\n" in out
    assert last_checkpoint(tmp_path / "run").name == f"step-{step:08d}"


@contextmanager
def asked_in(where: str, name: str) -> Iterator[None]:
    """Rank 1 alone gets SIGTERM as it enters this function, for the first time."""
    module = importlib.import_module(where)
    original, asked = getattr(module, name), list[int]()

    def ask(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1" and not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with mock.patch.object(module, name, ask):
        yield


def test_asked_in_an_evaluation_a_run_saves_after_it(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *TWO, "evaluate.interval=2"]
    run = run_in(ranks, tmp_path, settings, 2, partial(asked_in, "train.loop", "evaluate"))
    assert len(run.rows) == 2 and "valid/loss" in run.rows[-1]
    assert last_checkpoint(tmp_path).name == "step-00000002"


def test_asked_before_the_first_step_a_run_ends_without_one(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *TWO, "train.max_steps=2"]
    run = run_in(ranks, tmp_path, settings, 2, partial(asked_in, "train.rank", "assemble"))
    assert run.rows == [] and not list(tmp_path.rglob("step-*"))
    assert len(run_in(ranks, tmp_path, settings, 2).rows) == 2, "and the same command begins"


def test_a_mistake_of_one_rank_alone_is_said_by_it(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Nobody ends it, so no other one has said it."""
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("train.__main__.LET_RANK_0_SPEAK_S", 0.1)
    assert train_main([*SMALL, *TWO, "lr_scheduler.lr=-1"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("rank 1: lr_scheduler.lr=-1") and len(said.splitlines()) == 1


# A step of many sequences, in which a first request is not honoured before the second one.
LONG = ["train.global_batch_size=100000", "train.batch_ramp.start=8", "train.batch_ramp.tokens=1"]
LONG += ["train.batch_ramp.quantum=99992"]


def test_a_second_signal_ends_at_once(tmp_path: Path, text: list[str]) -> None:
    with local([*SMALL, *text, *ENDLESS, *LONG], tmp_path / "run") as job:
        job.wait_for_step(1)
        pids = job.ranks()
        job.process.send_signal(signal.SIGINT)
        log = tmp_path / "run" / "logs" / "rank_0.log"
        job.wait_for(lambda: "asked to stop by SIGTERM" in log.read_text())
        job.process.send_signal(signal.SIGINT)
        code, _, error = job.finish()
    assert code == 137 and error == "asked a second time to stop: the ranks were ended at once\n"
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert last_step(tmp_path / "run") == 1 and not list((tmp_path / "run").rglob("step-*"))
