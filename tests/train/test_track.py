"""Sinks: what was written is what is read back, through kills and resumes, in metrics.jsonl and in wandb's files."""

from __future__ import annotations

import io
import json
import math
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
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_metrics import report
from train.console import ConsoleSink
from train.metrics_file import JsonlSink, read_metrics
from train.track import PictureSink, TrackConfig, Tracker, WandbSink, wandb_mode

# --- metrics.jsonl ---


def write_steps(path: Path, first: int, last: int, finished_steps: int = 0, **values: Any) -> list[str]:
    said: list[str] = []
    sink = JsonlSink(path, finished_steps, said.append)
    for step in range(first, last + 1):
        sink.write(report(step, **values))
    sink.close(failed=False)
    return said


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write_steps(path, 1, 3, loss=0.1 + 0.2, mfu=1 / 3)
    assert read_metrics(path) == [report(step, loss=0.1 + 0.2, mfu=1 / 3).values() for step in (1, 2, 3)]


def test_lines_are_strict_json_even_when_a_loss_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in enumerate((math.nan, math.inf, -math.inf), start=1):
        write_steps(path, step, step, finished_steps=step - 1, loss=loss)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    words = [json.loads(line, parse_constant=refuse)["train/loss"] for line in path.read_text().splitlines()]
    assert words == ["NaN", "Infinity", "-Infinity"]
    losses = [values["train/loss"] for values in read_metrics(path)]
    assert math.isnan(losses[0]) and losses[1:] == [math.inf, -math.inf]


@settings(max_examples=60, deadline=None)
@given(written=st.integers(0, 6), finished=st.integers(0, 6), lost_bytes=st.integers(0, 400))
def test_resume_keeps_each_step_once(
    tmp_path_factory: pytest.TempPathFactory, written: int, finished: int, lost_bytes: int
) -> None:
    """Whatever was written, and wherever a kill tore the file: steps up to the checkpoint, then the new ones."""
    path = tmp_path_factory.mktemp("resume") / "metrics.jsonl"
    write_steps(path, 1, written, loss=1.0)
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - lost_bytes)])
    whole = path.read_bytes().count(b"\n")
    said = write_steps(path, finished + 1, finished + 2, finished_steps=finished, loss=2.0)
    steps = [(values["step"], values["train/loss"]) for values in read_metrics(path)]
    kept = min(whole, finished)
    assert steps == [(step, 1.0) for step in range(1, kept + 1)] + [(finished + 1, 2.0), (finished + 2, 2.0)]
    assert bool(said) == (kept < finished)


def test_a_reader_passes_over_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    for tail in (b'{"step": 3, "train/lo', b'{"step": 3}', b"\x00\x00\x00\n", b"3\n"):
        whole = path.read_bytes()
        path.write_bytes(whole + tail)
        assert [values["step"] for values in read_metrics(path)] == [1, 2]
        path.write_bytes(whole)


def test_every_step_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import itertools, sys\nfrom pathlib import Path\nfrom tests.train.test_metrics import report\n"
        "from train.metrics_file import JsonlSink\nsink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in itertools.count(1):\n    sink.write(report(step))\n    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 50:
            break
    process.send_signal(signal.SIGKILL)
    last_said = max([50, *(int(line) for line in process.stdout.read().split()[:-1])])
    process.wait()
    steps = [values["step"] for values in read_metrics(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last_said


# --- console ---


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def console(stream: io.StringIO, total_steps: int, log_interval: int = 10) -> None:
    clock = Clock()
    sink = ConsoleSink(log_interval, total_steps, 1000 * total_steps, 0, stream, clock)
    for step in range(1, total_steps + 1):
        clock.now_s += 2
        sink.write(report(step, valid_loss=4.5 if step == 15 else None, max_vio=0.25))
    sink.close(failed=False)


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    console(stream, 25)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    rows = [dict(part.split("=", 1) for part in line.split(" ")) for line in text.splitlines()]
    assert [row["step"] for row in rows] == [f"{step}/25" for step in (1, 10, 15, 20, 25)]
    assert [row["valid_loss"] for row in rows if "valid_loss" in row] == ["4.5000"]
    assert rows[1] == {
        "step": "10/25",
        "tokens": "10k",
        "loss": "0.5000",
        "max_vio": "0.25",
        "grad_norm": "1.500",
        "lr": "1.00e-03",
        "tokens_per_s": "2000",
        "eta": "0:00:30",  # 15 steps of 2 s on the console's clock, not the 0.5 s that the report claims
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_moving_line() -> None:
    stream = Terminal()
    console(stream, 25)
    last = stream.getvalue().split("\r")[-1]
    assert stream.getvalue().count("\n") <= 4  # the validation's line, and the bar's own end
    assert "step 25/25" in last and "loss 0.2000" in last and "2k tokens/s" in last and "ETA 0:00:00" in last
    assert "step 15: loss 0.3333 valid 4.500" in stream.getvalue()


# --- wandb ---


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


def offline(folder: Path, first: int, last: int, **where: Any) -> WandbSink:
    sink = WandbSink(TrackConfig(wandb="offline"), folder, {"train": {"seq_len": 8}}, **where)
    for step in range(first, last + 1):
        sink.write(report(step, max_vio=1 / 3))
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
    write_steps(metrics, 1, 30, max_vio=1 / 3)
    first = offline(tmp_path, 1, 30)
    time.sleep(1.1)  # wandb names folders by the second
    write_steps(metrics, 31, 40, finished_steps=30, max_vio=1 / 3)
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
from train.metrics_file import JsonlSink
from train.track import TrackConfig, Tracker, WandbSink
print("wandb" in sys.modules, flush=True)
folder = Path(sys.argv[1])
sinks = [WandbSink(TrackConfig(wandb="offline"), folder, {}, 0, "0a1b2c3d"), JsonlSink(folder / "metrics.jsonl")]
tracker = Tracker(sinks)
for step in range(1, 201):
    tracker.write(report(step, max_vio=1 / 3))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed after 200 steps."""
    folder = tmp_path_factory.mktemp("killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    # Importing wandb takes most of a second: only a run that uses it pays for it.
    assert killed.stdout.startswith("False")
    deadline = time.monotonic() + 30  # wandb's own process outlives the run by a moment
    while len(wandb_history(runs_of(folder)[0])) < 40 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    return folder


@pytest.mark.parametrize("checkpoint_step", [20, 199])
def test_wandb_gets_every_step_once_through_a_kill(checkpoint_step: int, killed_run: Path, tmp_path: Path) -> None:
    """A kill leaves wandb's file some way behind metrics.jsonl, past the checkpoint or not: the next run fills in."""
    folder = tmp_path / "run"
    shutil.copytree(killed_run, folder, symlinks=True)
    assert 20 < len(wandb_history(runs_of(folder)[0])) < 199, "a step is about 700 bytes, wandb keeps blocks of 32 KiB"
    wandb = WandbSink(TrackConfig(wandb="offline"), folder, {}, checkpoint_step, "0a1b2c3d")
    tracker = Tracker([wandb, JsonlSink(folder / "metrics.jsonl", checkpoint_step)])
    for step in range(checkpoint_step + 1, 220):
        tracker.write(report(step, max_vio=1 / 3))
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
