"""wandb, the picture and the tracker: every step once, through kills and resumes, and nothing that ends a run."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_metrics import report
from tests.train.test_metrics_file import write_steps
from train.track.config import TrackConfig
from train.track.console import ConsoleSink
from train.track.metrics_file import JsonlSink, read_metrics
from train.track.sinks import Tracker
from train.track.wandb import WandbSink, wandb_mode
from train.view.sinks import PictureSink


def wandb_history(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of every history record in a folder's .wandb file: leveldb's log of 32 KiB blocks, in protobuf."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = data[at + 7 : at + 7 + size], at + 7 + size
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(parts)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                found.append((int(items["_step"]), {k: v for k, v in items.items() if not k.startswith("_")}))
    return found


THIRD = {"moe/max_vio": 1 / 3}


def offline(folder: Path, first: int, last: int, **where: Any) -> WandbSink:
    sink = WandbSink(TrackConfig(wandb="offline"), folder, {"train": {"seq_len": 8}}, **where)
    for step in range(first, last + 1):
        sink.write(report(step, **THIRD))
    sink.close(failed=False)
    return sink


def runs_of(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_wandb_files_equal_metrics_jsonl(tmp_path: Path) -> None:
    """A run of 30 steps, and a run that goes on from there: new steps only, each as in metrics.jsonl, under one id."""
    metrics = tmp_path / "metrics.jsonl"
    write_steps(metrics, 1, 30, **THIRD)
    first = offline(tmp_path, 1, 30)
    time.sleep(1.1)  # wandb names folders by the second
    write_steps(metrics, 31, 40, finished_steps=30, **THIRD)
    second = offline(tmp_path, 31, 40, finished_steps=30, run_id=first.run_id)
    assert first.run_id == second.run_id
    histories = [wandb_history(folder) for folder in runs_of(tmp_path)]
    assert [[step for step, _ in history] for history in histories] == [list(range(1, 31)), list(range(31, 41))]
    assert all(first.run_id in folder.name for folder in runs_of(tmp_path))
    rows = [dict(values) for values in read_metrics(metrics)]
    assert histories[0] + histories[1] == [(row.pop("step"), row) for row in rows]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train.test_metrics import report
from tests.train.test_metrics_file import write_steps
from train.track.metrics_file import JsonlSink
from train.track.config import TrackConfig
from train.track.sinks import Tracker
from train.track.wandb import WandbSink
print("wandb" in sys.modules, flush=True)
folder = Path(sys.argv[1])
sinks = [WandbSink(TrackConfig(wandb="offline"), folder, {}, 0, "0a1b2c3d"), JsonlSink(folder / "metrics.jsonl")]
tracker = Tracker(sinks)
for step in range(1, 201):
    tracker.write(report(step, **THIRD))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after 200 steps, some of which wandb's file lacks."""
    folder = tmp_path_factory.mktemp("killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    # Importing wandb takes most of a second: only a run that uses it pays for it.
    assert killed.stdout.startswith("False")
    deadline = time.monotonic() + 30  # wandb's own process outlives the run by a moment
    while len(wandb_history(runs_of(folder)[0])) < 40 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    # It writes blocks of 32 KiB, and the rest too where a busy machine lets it outlive the run by more: cut off here.
    (written,) = runs_of(folder)[0].glob("*.wandb")
    os.truncate(written, min(written.stat().st_size, 2 << 15))
    return folder


@pytest.mark.parametrize("checkpoint_step", [20, 199])
def test_wandb_gets_every_step_once_through_a_kill(checkpoint_step: int, killed_run: Path, tmp_path: Path) -> None:
    """A kill leaves wandb's file some way behind metrics.jsonl, past the checkpoint or not: the next run fills in."""
    folder = tmp_path / "run"
    shutil.copytree(killed_run, folder, symlinks=True)
    assert 20 < len(wandb_history(runs_of(folder)[0])) < 199, "a step is about 700 bytes"
    wandb = WandbSink(TrackConfig(wandb="offline"), folder, {}, checkpoint_step, "0a1b2c3d")
    tracker = Tracker([wandb, JsonlSink(folder / "metrics.jsonl", checkpoint_step)])
    for step in range(checkpoint_step + 1, 220):
        tracker.write(report(step, **THIRD))
    tracker.close()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, 220))
    steps = sorted(step for part in runs_of(folder) for step, _ in wandb_history(part))
    assert steps == list(range(1, 220))


def test_a_run_that_was_online_sends_only_what_follows_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 20)
    offline(tmp_path, 21, 25, finished_steps=20, run_id="0a1b2c3d")
    assert [step for step, _ in wandb_history(runs_of(tmp_path)[0])] == [21, 22, 23, 24, 25]


class OnlineWandb:
    """Stands for a wandb whose server holds steps up to 12."""

    Settings = dict
    starting_step = 13

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
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    server = OnlineWandb()
    monkeypatch.setitem(sys.modules, "wandb", server)
    monkeypatch.setattr(WandbSink, "_last_kept_step", lambda self: 0)
    write_steps(tmp_path / "metrics.jsonl", 1, 17)
    sink = WandbSink(TrackConfig(), tmp_path, {}, finished_steps=checkpoint_step, run_id="0a1b2c3d")
    for step in range(checkpoint_step + 1, 20):
        sink.write(report(step))
    assert server.sent == list(range(13, 20))


def test_mode_follows_the_setting_then_the_environment_then_the_key(tmp_path: Path) -> None:
    key = {"WANDB_API_KEY": "k" * 40}
    nothing = {"NETRC": os.fspath(tmp_path / "none")}
    login = tmp_path / "netrc"
    login.write_text("machine api.wandb.ai login user password secret\n")
    login.chmod(0o600)
    assert wandb_mode("auto", nothing) == "offline"
    assert wandb_mode("auto", key) == wandb_mode("auto", {"NETRC": str(login)}) == "online"
    assert wandb_mode("auto", {"NETRC": str(login), "WANDB_BASE_URL": "https://wandb.example"}) == "offline"
    assert wandb_mode("auto", key | {"WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode("auto", key | {"WANDB_MODE": "disabled"}) == "disabled"
    assert wandb_mode("offline", key | {"WANDB_MODE": "online"}) == "offline"
    assert wandb_mode("online", nothing) == "offline"
    assert wandb_mode("disabled", key) == "disabled"


class BrokenWandb:
    """Stands for wandb and for its run; one of the calls fails."""

    Settings = dict
    starting_step = 0

    def __init__(self, failing: str) -> None:
        self.failing = failing

    def _call(self, name: str) -> BrokenWandb:
        if name == self.failing:
            raise OSError("no route to host\nand more")
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
        ("init online", ["wandb could not start online (no route to host); the run keeps it offline"]),
        ("finish", ["wandb could not finish (no route to host); the run goes on without it"]),
        (
            "log",
            ["wandb could not take a step (no route to host); the run goes on without it"],
        ),
    ],
)
def test_a_broken_wandb_says_so_once_and_the_run_goes_on(
    failing: str, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setitem(sys.modules, "wandb", BrokenWandb(failing))
    said: list[str] = []
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
    sink = WandbSink(TrackConfig(wandb="disabled"), tmp_path, {}, run_id="0a1b2c3d")
    sink.write(report(1))
    sink.close(failed=False)
    assert sink.run_id == "0a1b2c3d" and not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (TrackConfig(wandb="cloud"), "track.wandb=cloud is not one of auto, online, offline, disabled"),
        (TrackConfig(log_interval=0), "track.log_interval=0 is below 1"),
    ],
)
def test_illegal_settings_are_refused(config: TrackConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config.check()


# --- all together ---


def test_a_tracker_feeds_all_its_sinks(tmp_path: Path) -> None:
    stream, metrics, out = io.StringIO(), tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    sinks = [JsonlSink(metrics), ConsoleSink(2, 4, 4000, 0, stream), PictureSink(metrics, out, "first", 5.5)]
    tracker = Tracker(sinks)
    for step in (1, 2, 3, 4):
        tracker.write(report(step))
        if step == 2:
            assert not out.exists()
            tracker.checkpoint()
            assert out.read_bytes().startswith(b"\x89PNG")
            out.unlink()
    tracker.close()
    assert out.exists() and len(read_metrics(metrics)) == 4
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["step=1/4", "step=2/4", "step=4/4"]


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    sink = PictureSink(tmp_path / "none.jsonl", tmp_path / "loss.png", say=said.append)
    sink.write(report(1))
    sink.checkpoint()
    sink.checkpoint()
    sink.close(failed=False)
    assert len(said) == 1 and said[0].startswith(f"{tmp_path / 'loss.png'} could not be drawn")
