"""wandb: every step once, through kills, resumes and what was sent in between, and no start that loses the record."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.spawn import STOP_S
from tests.train.test_metrics import report
from tests.train.test_metrics_file import write_steps
from tests.wandb_case import KEY, serving, sync, wandb_history
from train.track import wandb as door
from train.track.config import TrackConfig
from train.track.metrics_file import JsonlSink, read_metrics
from train.track.sinks import Tracker
from train.track.wandb import WandbSink, wandb_mode

RUN_ID = "0a1b2c3d"
THIRD = {"moe/max_vio": 1 / 3}


def next_second(folder: Path) -> None:
    """Where a run has started before: wait until its next start has a name of its own. They are named by the second."""
    began = int(time.time())
    while any((folder / "wandb").glob("*run-*")) and int(time.time()) == began:
        time.sleep(0.01)


def offline(folder: Path, first: int, last: int, **where: Any) -> WandbSink:
    next_second(folder)
    sink = WandbSink(TrackConfig(wandb="offline"), folder, {"train": {"seq_len": 8}}, **where)
    for step in range(first, last + 1):
        sink.write(report(step, **THIRD))
    sink.close(failed=False)
    return sink


def runs_of(folder: Path) -> list[Path]:
    """Folders of offline starts, the oldest first: their names begin with the time."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def steps_of(folder: Path) -> list[list[int]]:
    return [[step for step, _ in wandb_history(run)] for run in runs_of(folder)]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


# --- offline ---


def test_wandb_files_equal_metrics_jsonl(tmp_path: Path) -> None:
    """A run of 30 steps, and a run that goes on from there: new steps only, each as in metrics.jsonl, under one id."""
    metrics = tmp_path / "metrics.jsonl"
    write_steps(metrics, 1, 30, **THIRD)
    first = offline(tmp_path, 1, 30)
    write_steps(metrics, 31, 40, finished_steps=30, **THIRD)
    second = offline(tmp_path, 31, 40, finished_steps=30, run_id=first.run_id)
    assert first.run_id == second.run_id
    histories = [wandb_history(folder) for folder in runs_of(tmp_path)]
    assert [[step for step, _ in history] for history in histories] == [list(range(1, 31)), list(range(31, 41))]
    assert all(first.run_id in folder.name for folder in runs_of(tmp_path))
    rows = [dict(values) for values in read_metrics(metrics)]
    assert histories[0] + histories[1] == [(row.pop("step"), row) for row in rows]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tests.train.test_metrics import report
from tests.train.test_metrics_file import write_steps
from train.track.metrics_file import JsonlSink
from train.track.config import TrackConfig
from train.track.sinks import Tracker
from train.track.wandb import WandbSink
print("wandb" in sys.modules, flush=True)
folder, first, last, num_bytes = Path(sys.argv[1]), *map(int, sys.argv[2:])
wandb = WandbSink(TrackConfig(wandb="offline"), folder, {}, first - 1, "0a1b2c3d")
tracker = Tracker([wandb, JsonlSink(folder / "metrics.jsonl", first - 1)])
for step in range(first, last + 1):
    tracker.write(report(step, **{"moe/max_vio": 1 / 3}))
while max(path.stat().st_size for path in folder.glob("wandb/offline-run-*/*.wandb")) < num_bytes:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_after(folder: Path, first: int, last: int, num_bytes: int = 0) -> None:
    """A run of these steps in a process that is killed behind them, when wandb's file has at least `num_bytes`: with
    some of them, and how many is wandb's. Its own process, which shares the pipe, has ended when this returns."""
    next_second(folder)
    words = [sys.executable, "-c", KILLED, str(folder), str(first), str(last), str(num_bytes)]
    killed = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=STOP_S)
    assert killed.returncode == -signal.SIGKILL
    # Importing wandb takes most of a second: only a run that uses it pays for it.
    assert killed.stdout.startswith("False")


def resume(folder: Path, checkpoint_step: int, last: int) -> None:
    next_second(folder)
    wandb = WandbSink(TrackConfig(wandb="offline"), folder, {}, checkpoint_step, RUN_ID)
    tracker = Tracker([wandb, JsonlSink(folder / "metrics.jsonl", checkpoint_step)])
    for step in range(checkpoint_step + 1, last + 1):
        tracker.write(report(step, **THIRD))
    tracker.close()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, last + 1))


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after 200 steps."""
    folder = tmp_path_factory.mktemp("killed")
    kill_after(folder, 1, 200)
    return folder


@pytest.mark.parametrize("checkpoint_step", [20, 199])
def test_wandb_gets_every_step_once_through_a_kill(checkpoint_step: int, killed_run: Path, tmp_path: Path) -> None:
    """Whatever the killed run's file holds, the next run writes all steps, and that file is kept aside."""
    folder = tmp_path / "run"
    # wandb's own process may outlive the run by a moment: what it still writes and removes does not matter.
    shutil.copytree(killed_run, folder, symlinks=True, ignore=shutil.ignore_patterns("tmp", "logs", "files"))
    (torn,) = runs_of(folder)
    resume(folder, checkpoint_step, 219)
    assert steps_of(folder) == [list(range(1, 220))]
    assert [path.name for path in (folder / "wandb" / "replaced").iterdir()] == [torn.name] != [runs_of(folder)[0].name]


def test_a_start_that_ended_well_is_left_as_it_is(tmp_path: Path) -> None:
    """A kill costs the writing again of what came after it, not of the whole run; and of a second kill no more."""
    offline(tmp_path, 1, 30, run_id=RUN_ID)
    write_steps(tmp_path / "metrics.jsonl", 1, 30, **THIRD)
    (whole,) = runs_of(tmp_path)
    before = next(whole.glob("*.wandb")).read_bytes()
    kill_after(tmp_path, 31, 60)
    kill_after(tmp_path, 51, 70)
    resume(tmp_path, 65, 80)
    assert steps_of(tmp_path) == [list(range(1, 31)), list(range(31, 81))]
    assert runs_of(tmp_path)[0] == whole and next(whole.glob("*.wandb")).read_bytes() == before
    assert len(list((tmp_path / "wandb" / "replaced").iterdir())) == 2


def test_steps_before_an_older_checkpoint_are_not_there_twice(tmp_path: Path) -> None:
    """A run that goes on from further back than wandb's files end."""
    write_steps(tmp_path / "metrics.jsonl", 1, 30, **THIRD)
    offline(tmp_path, 1, 30, run_id=RUN_ID)
    resume(tmp_path, 20, 35)
    assert steps_of(tmp_path) == [list(range(1, 31)), list(range(31, 36))]


def test_a_run_without_wandb_before_has_all_its_steps_in_it_after(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 20)
    offline(tmp_path, 21, 25, finished_steps=20, run_id=RUN_ID)
    assert steps_of(tmp_path) == [list(range(1, 26))]


def test_a_run_that_was_online_sends_only_what_follows_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 20)
    (tmp_path / "wandb" / f"run-20300101_000000-{RUN_ID}").mkdir(parents=True)
    offline(tmp_path, 21, 25, finished_steps=20, run_id=RUN_ID)
    assert [step for step, _ in wandb_history(runs_of(tmp_path)[0])] == [21, 22, 23, 24, 25]


# --- sent later ---


def test_sync_sends_every_step_once(tmp_path: Path) -> None:
    """wandb's own command, to a server that counts: of a run of two starts, the first of which was killed."""
    kill_after(tmp_path, 1, 60)
    resume(tmp_path, 40, 70)
    with serving() as server:
        sync(tmp_path, server)
        assert server.steps == list(range(1, 71))
        sync(tmp_path, server)
        assert server.steps == list(range(1, 71))


@pytest.mark.slow
def test_sync_between_starts_sends_no_step_twice(tmp_path: Path) -> None:
    """The server has the beginning of a start that was killed and sent as it was; the next goes on from there."""
    with serving() as server:
        kill_after(tmp_path, 1, 60, num_bytes=20_000)  # of 45,000
        sync(tmp_path, server)
        there = list(server.steps)
        assert there == list(range(1, len(there) + 1)) and there
        resume(tmp_path, 40, 70)
        sync(tmp_path, server)
        # The end of a torn file may be half a step, of which wandb's summary has the one half: it is left out.
        assert server.steps in (list(range(1, 71)), [*there, *range(len(there) + 2, 71)])
        resume(tmp_path, 70, 75)
        sync(tmp_path, server)
        assert server.steps[-5:] == list(range(71, 76)) and len(set(server.steps)) == len(server.steps)


# --- online ---


class OnlineWandb:
    """Stands for a wandb whose server holds steps up to 12."""

    Settings = dict
    starting_step, dir = 13, "wandb/run/files"

    def __init__(self) -> None:
        self.sent: list[int] = []

    def init(self, mode: str, **_: Any) -> OnlineWandb:
        assert mode == "online"
        return self

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, values: dict[str, float], step: int, commit: bool) -> None:
        assert commit and "step" not in values
        self.sent.append(step)


@pytest.mark.parametrize("checkpoint_step", [8, 12, 15])
def test_an_online_run_sends_what_its_server_lacks(
    checkpoint_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    server = OnlineWandb()
    monkeypatch.setitem(sys.modules, "wandb", server)
    write_steps(tmp_path / "metrics.jsonl", 1, 17)
    names = {second: f"offline-run-20300101_00000{second}-{RUN_ID}" for second in (1, 2)}
    for name in names.values():
        (tmp_path / "wandb" / name).mkdir(parents=True)
    (tmp_path / "wandb" / names[1] / f"run-{RUN_ID}.wandb.synced").touch()
    sink = WandbSink(TrackConfig(), tmp_path, {}, finished_steps=checkpoint_step, run_id=RUN_ID)
    for step in range(checkpoint_step + 1, 20):
        sink.write(report(step))
    assert server.sent == list(range(13, 20))
    # Files that `wandb sync` would send on top of that are out of its way.
    assert [path.name for path in runs_of(tmp_path)] == [names[1]]
    assert [path.name for path in (tmp_path / "wandb" / "replaced").iterdir()] == [names[2]]


def test_a_server_gets_every_step_once_over_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb itself, online: the second start asks where the server stands, and sends what metrics.jsonl has beyond."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(door, "INIT_TIMEOUT_S", STOP_S)
    monkeypatch.setattr(door, "FINISH_TIMEOUT_S", STOP_S)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        sink = WandbSink(TrackConfig(), tmp_path, {}, run_id=RUN_ID)
        for step in range(1, 11):
            sink.write(report(step))
        sink.close(failed=False)
        assert server.steps == list(range(1, 11))
        write_steps(tmp_path / "metrics.jsonl", 1, 14)
        next_second(tmp_path)
        sink = WandbSink(TrackConfig(), tmp_path, {}, finished_steps=13, run_id=RUN_ID)
        for step in range(14, 18):
            sink.write(report(step))
        sink.close(failed=False)
        assert server.steps == list(range(1, 18))


def test_mode_follows_the_setting_then_the_environment_then_the_key(tmp_path: Path) -> None:
    key = {"WANDB_API_KEY": KEY}
    nothing = {"NETRC": os.fspath(tmp_path / "none")}
    login = tmp_path / "netrc"
    login.write_text("machine api.wandb.ai login user password secret\n")
    login.chmod(0o600)
    assert wandb_mode("auto", nothing) == "offline"
    assert wandb_mode("auto", key) == wandb_mode("auto", {"NETRC": str(login)}) == "online"
    assert wandb_mode("auto", {"NETRC": str(login), "WANDB_BASE_URL": "https://wandb.example"}) == "offline"
    assert wandb_mode("auto", key | {"WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode("auto", key | {"WANDB_MODE": "disabled"}) == "disabled"
    for word, mode in (("DRYRUN", "offline"), ("run", "online"), ("", "online")):
        assert wandb_mode("auto", key | {"WANDB_MODE": word}) == mode
    for word, mode in (("true", "disabled"), ("1", "disabled"), ("false", "online"), ("", "online")):
        assert wandb_mode("auto", key | {"WANDB_DISABLED": word}) == mode
    assert wandb_mode("auto", key | {"WANDB_DISABLED": "True", "WANDB_MODE": "online"}) == "disabled"
    assert wandb_mode("offline", key | {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}) == "offline"
    with pytest.raises(ValueError, match="WANDB_MODE=ofline is not one of online, offline, disabled"):
        wandb_mode("auto", key | {"WANDB_MODE": "ofline"})
    assert wandb_mode("online", nothing) == "offline"
    assert wandb_mode("disabled", key) == "disabled"


@contextmanager
def a_server_that(fails: str) -> Iterator[str]:
    """Its address."""
    if fails == "cannot be reached":
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    else:
        with serving(int(fails.split()[-1])) as server:
            yield server.url


@pytest.mark.parametrize("fails", ["cannot be reached", "answers 500", "answers 401"])
def test_an_online_run_whose_server_fails_is_kept_offline(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every step is in an offline file, and one warning says so; the next run goes on with it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(door, "INIT_TIMEOUT_S", 2)
    with a_server_that(fails) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        sink = WandbSink(TrackConfig(), tmp_path, {}, run_id=RUN_ID)
        lines = JsonlSink(tmp_path / "metrics.jsonl")
        for step in range(1, 11):
            sink.write(report(step))
            lines.write(report(step))
        sink.close(failed=False)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("train")]
    assert said.startswith("wandb could not start online (") and said.endswith("; the run keeps it offline")
    assert sink.mode == "offline"
    assert steps_of(tmp_path) == [list(range(1, 11))]
    offline(tmp_path, 11, 15, finished_steps=10, run_id=RUN_ID)
    assert steps_of(tmp_path) == [list(range(1, 11)), list(range(11, 16))]


@pytest.mark.parametrize(("status", "begins"), [(500, "finish ("), (401, "send every step (failed to upload: 401 ")])
def test_a_server_that_fails_in_the_middle_loses_no_step(
    status: int, begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """wandb's own file has all of them, and one warning names its folder. At 401 wandb finishes as if all were well."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(door, "INIT_TIMEOUT_S", STOP_S)
    monkeypatch.setattr(door, "FINISH_TIMEOUT_S", 2 if status == 500 else STOP_S)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        sink = WandbSink(TrackConfig(), tmp_path, {}, run_id=RUN_ID)
        for step in range(1, 6):
            sink.write(report(step))
        server.status = status
        for step in range(6, 11):
            sink.write(report(step))
        sink.close(failed=False)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("train")]
    (folder,) = (tmp_path / "wandb").glob(f"run-*-{RUN_ID}")
    assert said.startswith(f"wandb could not {begins}")
    assert said.endswith(f"; the run is whole in {folder}, which `wandb sync` sends")
    assert [step for step, _ in wandb_history(folder)] == list(range(1, 11))


class BrokenWandb:
    """Stands for wandb and for its run; one of the calls fails."""

    Settings = dict
    starting_step, dir = 0, "wandb/run/files"

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def _call(self, name: str) -> BrokenWandb:
        if name == self.failing:
            raise OSError("no route to host\nand why\nand more")
        return self

    def init(self, mode: str, **_: Any) -> BrokenWandb:
        return self._call(f"init {mode}")

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, *_: Any, **__: Any) -> None:
        self._call("log")

    def finish(self, exit_code: int) -> None:
        self._call("finish")

    def teardown(self, exit_code: int) -> None:
        pass


@pytest.mark.parametrize(
    ("failing", "sentences"),
    [
        ("init online", ["wandb could not start online (no route to host and why); the run keeps it offline"]),
        (
            "finish",
            [
                "wandb could not finish (no route to host and why); the run is whole in wandb/run, which `wandb sync` "
                "sends"
            ],
        ),
        (
            "log",
            ["wandb could not take a step (no route to host and why); the run goes on without it"],
        ),
    ],
)
def test_a_broken_wandb_says_so_once_and_the_run_goes_on(
    failing: str, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "wandb", BrokenWandb(failing))
    said: list[str] = []
    (tmp_path / "wandb").mkdir()  # as wandb makes it
    sink = WandbSink(TrackConfig(), tmp_path, {}, say=said.append)
    for step in (1, 2, 3):
        sink.write(report(step))
    sink.close(failed=True)
    assert said == sentences
    assert sink.mode == ("offline" if failing == "init online" else "online")


def test_online_without_a_key_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("wandb asked"))
    said: list[str] = []
    sink = WandbSink(TrackConfig(wandb="online"), tmp_path, {}, say=said.append)
    sink.write(report(1))
    sink.close(failed=False)
    assert said == ["track.wandb=online, but no API key is set: wandb keeps the run offline"]
    assert len(wandb_history(runs_of(tmp_path)[0])) == 1


def test_disabled_makes_an_id_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    sink = WandbSink(TrackConfig(wandb="disabled"), tmp_path, {}, run_id=RUN_ID)
    sink.write(report(1))
    sink.close(failed=False)
    assert sink.run_id == RUN_ID and not (tmp_path / "wandb").exists()
