"""What is recorded of a step: on a clock of the test's own, and of real runs against their schedules and metrics."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from launch.__main__ import main
from parallel.pipeline.actions import parse_action
from parallel.pipeline.events import Event, Timeline, Wait, read_trace, write_trace
from parallel.pipeline.measure import bubble_s, check_recorded, exposed_s, idle_s
from parallel.pipeline.record import Recorder, Times
from parallel.pipeline.registry import build
from parallel.watch import Need, Watch
from tests.runs import SMALL, prepare_text, run_in
from tests.spawn import Ranks

INPUT, EXPERTS, OPTIMIZER = (Need(kind, "{what} from {peers}", None) for kind in ("input", "experts", "optimizer"))


class Hand:
    """A clock and the work of a rank on it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.watch = Watch()
        self.watch.clock = lambda: self.now_s
        self.recorder = Recorder(1, self.watch)

    def work(self, time_s: float) -> None:
        self.now_s += time_s

    def wait(self, need: Need, time_s: float) -> None:
        self.watch.wait(need, lambda: self.work(time_s))

    def step(self, events: bool) -> None:
        """F with an input, then a pair whose second input is late, then W; then the optimizer."""
        self.recorder.open(events)
        self.work(7)
        self.recorder.begin(parse_action("F1.0"))
        self.wait(INPUT, 1)
        self.recorder.started()
        self.work(2)
        self.wait(EXPERTS, 0.5)
        self.recorder.end()
        self.recorder.begin(parse_action("F1.1&D1.0"))
        self.wait(INPUT, 3)
        self.recorder.started()
        self.work(1)
        self.wait(INPUT, 2)
        self.recorder.started()
        self.work(1)
        self.recorder.end()
        self.work(0.25)
        self.recorder.begin(parse_action("W1.1"))
        self.recorder.started()
        self.work(4)
        self.recorder.end()
        self.wait(OPTIMIZER, 10)


def waited(hand: Hand) -> dict[str, float]:
    """The waits that a step reports."""
    return {kind: hand.recorder.waited_s(kind) for kind in ("experts", "optimizer")}


def test_what_counts_as_what() -> None:
    hand = Hand()
    hand.step(events=True)
    assert hand.recorder.times() == Times(1008, 1021.75, 2.5 + 2 + 4)
    assert waited(hand) == {"experts": 0.5, "optimizer": 10}
    forward, pair, weights = hand.recorder.events
    assert forward == Event(
        1, 1008, 1010.5, parse_action("F1.0"), (Wait("input", 1007, 1008), Wait("experts", 1010, 1010.5))
    )
    assert (pair.start_s, pair.stop_s, pair.busy_s, pair.exposed_s) == (1013.5, 1017.5, 2, 0)
    assert pair.waits == (Wait("input", 1010.5, 1013.5), Wait("input", 1014.5, 1016.5))
    assert (weights.start_s, weights.busy_s, weights.waits) == (1017.75, 4, ())
    # The idle time of the events is that of the sums.
    length, idle = idle_s([event.moved(-1000) for event in hand.recorder.events], 2)
    times = hand.recorder.times()
    assert (length, idle[1]) == (times.stop_s - times.start_s, length - times.busy_s)


def test_every_step_starts_anew_and_events_only_where_asked() -> None:
    hand = Hand()
    hand.step(events=True)
    first, waits_s = hand.recorder.times(), waited(hand)
    hand.recorder.meet()
    hand.step(events=False)
    second = hand.recorder.times()
    assert not hand.recorder.events
    assert (second.start_s, second.stop_s) == (8, 21.75), "counted from where the ranks met"
    assert (second.busy_s, waited(hand)) == (first.busy_s, waits_s)


def test_the_bubble_is_the_mean_over_the_ranks_of_all_pipelines() -> None:
    # Ranks 0 and 2 are pipeline 0, which takes 10 s; 1 and 3 are pipeline 1, which takes 4 s, at another time.
    steps = [Times(0, 8, 6), Times(100, 103, 3), Times(2, 10, 8), Times(101, 104, 1)]
    assert bubble_s(steps, 2) == ((10 - 6) + (10 - 8) + (4 - 3) + (4 - 1)) / 4


def test_a_trace_of_several_pipelines_reads_back_with_its_waits(tmp_path: Path) -> None:
    hand = Hand()
    hand.step(events=True)
    schedule = build("dualpipev", 2, 4)
    pipelines = {"a": hand.recorder.events, "b": [event.moved(0.1) for event in hand.recorder.events]}
    write_trace(Timeline("two", schedule, pipelines), tmp_path / "trace.json")
    assert read_trace(tmp_path / "trace.json") == Timeline("two", schedule, pipelines)
    slices = [entry for entry in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if entry["ph"] == "X"]
    waits = [entry for entry in slices if entry["cat"] == "wait"]
    assert {entry["pid"] for entry in slices} == {0, 1} and len(waits) == 8


# --- real runs ---

FOUR = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "train.global_batch_size=8"]
SHORT = ["train.max_steps=2", "evaluate.interval=0", "evaluate.num_sequences=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.mark.parametrize(
    "name",
    [
        "dualpipev",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("1f1b", "interleaved_1f1b", "zbv", "dualpipe")),
    ],
)
def test_a_recorded_run_is_its_schedule_and_its_metrics(
    name: str, ranks: Ranks, tmp_path: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ["model.num_hidden_layers=4"]
    run = run_in(
        ranks, tmp_path, [*SMALL, *text, *FOUR, *SHORT, *layers, f"pipeline.schedule={name}", "profile.steps=[2]"], 4
    )
    (file,) = (tmp_path / "traces").iterdir()
    assert file.name == "step-00000002.json"
    timeline = read_trace(file)
    assert timeline.schedule == build(name, 2, 4) and list(timeline.pipelines) == ["pipeline 0", "pipeline 1"]
    idle = exposed = 0.0
    for events in timeline.pipelines.values():
        check_recorded(timeline.schedule, events)
        idle += sum(idle_s(events, 2)[1])
        exposed += sum(exposed_s(events, 2))
        assert all(0 <= event.busy_s <= event.stop_s - event.start_s for event in events)
    # Sums of the same differences, taken in another order; readings are some 1e5 s, of which fp64 keeps 1e-11.
    assert run.rows[1]["perf/bubble_s"] == pytest.approx(idle / 4, abs=1e-7)
    assert run.rows[1]["perf/exposed_comm_s"] == pytest.approx(exposed / 4, abs=1e-7)
    assert min(run.rows[1][f"perf/{key}_s"] for key in ("bubble", "exposed_comm", "zero_comm")) > 0
    for show in ("both", "recorded"):
        out = tmp_path / f"{show}.svg"
        assert main(["timeline", f"events={file}", "column=1", f"show={show}", f"out={out}", "json=true"]) == 0
        assert out.read_text().count("recorded</text>") == (2 if show == "both" else 0)
        length, idles = idle_s(timeline.pipelines["pipeline 1"], 2)
        found = json.loads(capsys.readouterr().out)["recorded"]
        assert [found["step"], *found["bubble"]] == pytest.approx([length, *idles])


SLOW_S = 0.02


class Steps:
    """Numbered steps that one rank takes, for another one to wait for; files in a folder, as ranks are processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def take(self) -> None:
        (self.folder / str(self.number)).touch()
        self.number += 1

    def wait_for_next(self) -> None:
        while not (self.folder / str(self.number)).exists():
            time.sleep(0.001)
        self.number += 1


@contextmanager
def waits_told(is_told: Callable[[Need], bool], steps: Steps) -> Iterator[None]:
    """Rank 0 takes a step in each of its waits of one kind, after the wait has begun."""
    original = Watch.wait

    def wait(self: Watch, need: Need, call: Callable[[], Any], peer: Any = None) -> Any:
        def told() -> Any:
            steps.take()
            return call()

        return original(self, need, told if is_told(need) else call, peer)

    with mock.patch.object(Watch, "wait", wait) if os.environ["RANK"] == "0" else nullcontext():
        yield


@contextmanager
def a_slow_stage(folder: Path) -> Iterator[None]:
    """The second rank of the pipeline takes longer for each forward: from when the first rank waits for what follows,
    however late it comes to that. All ranks are on one machine, and their clocks are one."""
    from train.stage import Stage

    original, steps = Stage.forward, Steps(folder)

    def forward(self: Any, micro_batch: int, x: Any) -> Any:
        if x is not None and self.model.training:
            steps.wait_for_next()
            time.sleep(SLOW_S)
        return (yield from original(self, micro_batch, x))

    with (
        waits_told(lambda need: need.kind == "input", steps),
        mock.patch.object(Stage, "forward", forward),
        mock.patch.object(Recorder, "meet", lambda self: None),
    ):
        yield


class Undisturbed:
    """A clock that stands still while this thread is kept from its processor, unless it waits for another rank."""

    def __init__(self) -> None:
        self._waited_s, self._waits_since_s = 0.0, None

    def __call__(self) -> float:
        now_s = 0.0 if self._waits_since_s is None else time.perf_counter() - self._waits_since_s
        return time.thread_time() + self._waited_s + now_s

    def wait(self, call: Callable[[], Any]) -> Any:
        self._waits_since_s = time.perf_counter()
        try:
            return call()
        finally:
            self._waited_s += time.perf_counter() - self._waits_since_s
            self._waits_since_s = None


@contextmanager
def slow_rows(folder: Path) -> Iterator[None]:
    """What rank 1 sends to experts leaves late: from when rank 0 waits for it."""
    from parallel.expert.dispatch import Dispatch

    original, wait, steps, clock = Dispatch._transfer, Watch.wait, Steps(folder), Undisturbed()

    def transfer(self: Any, *args: Any) -> Any:
        if os.environ["RANK"] == "1":
            steps.wait_for_next()
            time.sleep(SLOW_S)
        return original(self, *args)

    with (
        mock.patch.object(Watch, "clock", staticmethod(clock)),
        mock.patch.object(
            Watch, "wait", lambda self, need, call, *peer: wait(self, need, partial(clock.wait, call), *peer)
        ),
        waits_told(lambda need: need.kind == "experts" and "numbers" not in need.text, steps),
        mock.patch.object(Dispatch, "_transfer", transfer),
    ):
        yield


def test_a_slow_stage_shows_as_bubble_alone(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *SHORT, "parallel.pp=2", "parallel.dp=1", "train.global_batch_size=8"]
    (tmp_path / "steps").mkdir()
    rows = run_in(ranks, tmp_path / "run", settings, 2, partial(a_slow_stage, tmp_path / "steps")).rows
    for row in rows:
        # The first rank stands still through all 8 slow forwards.
        assert row["perf/bubble_s"] > 8 * SLOW_S / 2
        assert row["perf/exposed_comm_s"] == 0
        assert row["perf/bubble_s"] < row["perf/step_s"]


def test_slow_rows_show_as_exposed_communication_alone(ranks: Ranks, tmp_path: Path, text: list[str]) -> None:
    settings = [*SMALL, *text, *SHORT, "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"]
    (tmp_path / "steps").mkdir()
    rows = run_in(ranks, tmp_path / "run", settings, 2, partial(slow_rows, tmp_path / "steps")).rows
    for row in rows:
        # Rank 0 waits in each of 4 micro-batches and 3 MoE layers for rows and weights there, rows back, their
        # gradients, and the gradients of both.
        assert row["perf/exposed_comm_s"] > 4 * 3 * 6 * SLOW_S / 2
        # On one rank there is nothing to wait for between two actions: what is left is the recorder's own.
        assert row["perf/bubble_s"] < row["perf/exposed_comm_s"] / 10
