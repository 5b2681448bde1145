"""Jobs that start again by themselves: what is decided, and that a run which lost ranks is the run that lost none."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import supervise
from launch.__main__ import main
from launch.elastic import smaller
from launch.ranks import Ended
from launch.settings import LocalSettings
from launch.supervise import MAX_WAIT_S, supervised, wait_before
from parallel.mesh import ParallelConfig
from tests.deviation import worst
from tests.launched import Launched, last_step, local
from tests.plain_run import plain_run
from tests.runs import SMALL, Finished, prepare_text, run_in
from tests.spawn import Ranks
from tests.test_resume import FOUR, assert_the_same, dice, finished
from tests.wandb_case import wandb_history
from train.compose import compose
from train.config import RunConfig
from train.stopping import StopRequest
from train.track.events import EVENTS, Event, read_events

__all__ = ["dice"]  # a fixture

KILLED = Ended(137, "rank 1 was ended by SIGKILL; its log: x")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


def events_of(folder: Path) -> list[Event]:
    return read_events(folder / EVENTS)


# --- decisions ---


class Scripted:
    """A job that ends as its script says: (checkpoint that it leaves, its end) for each start."""

    def __init__(self, folder: Path, script: Sequence[tuple[int | None, Ended]]) -> None:
        self.folder, self.script = folder, list(script)
        self.started: list[RunConfig] = []

    def start(self, config: RunConfig) -> Scripted:
        self.started.append(config)
        step, self.ended = self.script.pop(0)
        if step is not None:
            write_checkpoint(self.folder, step)
        return self

    def poll(self) -> Ended:
        return self.ended

    def stop(self, at_once: bool = False) -> None: ...

    def kill(self) -> None: ...


def write_checkpoint(folder: Path, step: int) -> None:
    """As much of a checkpoint as says that it is whole."""
    from train.checkpoint import step_folders

    root = folder / "checkpoints"
    found = step_folders.step_folder(root, step)
    found.mkdir(parents=True)
    step_folders.write_manifest(found, {})
    (root / "latest").write_text(f"{found.name}\n")


def outcome(
    tmp_path: Path, script: Sequence[tuple[int | None, Ended]], *words: str, **settings: float
) -> tuple[Scripted, Ended, list[str]]:
    config = compose([*SMALL, f"run.dir={tmp_path}", *words])
    job, said = Scripted(tmp_path, script), list[str]()
    chosen = LocalSettings(**{"restart_wait_s": 0.0, **settings})  # type: ignore[arg-type]
    ended = supervised(config, chosen, job.start, StopRequest(), said.append)
    assert not job.script, "it was started as often as the script says"
    return job, ended, said


def test_restarts_are_counted_from_the_newest_checkpoint(tmp_path: Path) -> None:
    script = [(None, KILLED), (None, KILLED), (3, KILLED), (None, KILLED), (6, KILLED), (None, Ended(0))]
    _, ended, said = outcome(tmp_path, script, restarts=2)
    assert ended == Ended(0)
    events = events_of(tmp_path)
    assert [event.kind for event in events] == ["lost", "restart"] * 5
    restarts = [event.values for event in events if event.kind == "restart"]
    assert [(each["number"], each["step"]) for each in restarts] == [(1, 0), (2, 0), (1, 3), (2, 3), (1, 6)]
    assert len(said) == 5
    assert said[2] == (
        f"{KILLED.reason}; starts again from step-00000003 in 0 s, restart 1 of at most 2 without a new checkpoint"
    )


def test_restarts_have_an_end(tmp_path: Path) -> None:
    _, ended, said = outcome(tmp_path, [(3, KILLED), (None, KILLED), (None, KILLED)], restarts=2)
    assert ended == KILLED
    assert [event.kind for event in events_of(tmp_path)] == ["lost", "restart", "lost", "restart", "lost", "give_up"]
    assert said[-1] == "not started again: restarts=2 in a row have come to no new checkpoint"


@pytest.mark.parametrize("code", [1, 4, 5, 6, 128 + signal.SIGSEGV, 128 + signal.SIGKILL])
def test_what_another_start_may_change_is_started_again(tmp_path: Path, code: int) -> None:
    outcome(tmp_path, [(None, Ended(code, "x")), (None, Ended(0))], restarts=1)


@pytest.mark.parametrize("ended", [Ended(0), Ended(2, "refused"), Ended(3, "nan"), replace(KILLED, was_asked=True)])
def test_what_another_start_would_not_change_is_not(tmp_path: Path, ended: Ended) -> None:
    assert outcome(tmp_path, [(None, ended)], restarts=3)[1] == ended
    assert events_of(tmp_path) == []


def test_without_restarts_a_loss_is_an_event_all_the_same(tmp_path: Path) -> None:
    assert outcome(tmp_path, [(None, KILLED)])[1] == KILLED
    assert [(event.kind, event.values["code"]) for event in events_of(tmp_path)] == [("lost", 137)]


def test_a_run_that_began_elsewhere_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    """Once it has one: before that it begins as it was asked to, also beside checkpoints of an earlier time."""
    write_checkpoint(tmp_path, 9)
    other = tmp_path / "other" / "step-00000005"
    script = [(None, KILLED), (7, KILLED), (None, Ended(0))]
    job, _, _ = outcome(tmp_path, script, f"checkpoint.resume={other}", restarts=3)
    assert [config.checkpoint.resume for config in job.started] == [str(other), str(other), "auto"]


def test_waits_grow_and_stay_bounded() -> None:
    waits = [wait_before(number, 1.0) for number in range(1, 2000)]
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0] and waits[-1] == MAX_WAIT_S
    assert all(earlier <= later for earlier, later in pairwise(waits))
    assert wait_before(5, 0.0) == 0.0 and wait_before(1, 1e6) == wait_before(9, 1e6) == 1e6


def test_asked_to_stop_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(end=lambda code, sentence: None)
    stop.honour()

    def sleep(_: float) -> None:
        stop.take(signal.SIGTERM)

    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    job = Scripted(tmp_path, [(None, KILLED)])
    config, chosen = compose([*SMALL, f"run.dir={tmp_path}"]), LocalSettings(restarts=3, restart_wait_s=900.0)
    ended = supervised(config, chosen, job.start, stop, lambda _: None)
    assert ended.was_asked and "asked to stop before it was started again" in ended.reason


# --- fewer ranks ---


def test_elastic_goes_down_to_the_fewest_that_are_allowed(tmp_path: Path) -> None:
    words = [*FOUR, "parallel.elastic=true"]
    script = [(None, KILLED), (None, KILLED)]
    job, ended, said = outcome(tmp_path, script, *words, restarts=9, min_ranks=3)
    sizes = [(each.parallel.pp, each.parallel.dp, each.parallel.ep) for each in job.started]
    # Three ranks share no batch of eight sequences, but three layers.
    assert sizes == [(1, 4, 2), (3, 1, 1)] and ended == KILLED
    assert "with 3 ranks (pp=3 dp=1 ep=1)" in said[0]
    assert said[-1] == "not started again: no topology of 3 (min_ranks) to 2 ranks is legal for this run"


def legal(config: RunConfig, num_ranks: int) -> bool:
    """Whether any pp x dp x ep of so many ranks is: by trying them all, without an order or a shortcut."""
    for pp in range(1, num_ranks + 1):
        for ep in range(1, num_ranks + 1):
            for dispatch in ("local", "flat", "two_hop"):
                if num_ranks % pp:
                    continue
                try:
                    replace(config, parallel=ParallelConfig(pp, num_ranks // pp, ep, 1, dispatch)).check()
                    return True
                except ValueError:
                    continue
    return False


TOPOLOGIES = [
    "parallel.dp=8 parallel.ep=8",
    "parallel.dp=8 parallel.ep=4 parallel.nodes=2",
    "parallel.pp=2 parallel.dp=4 parallel.ep=2 pipeline.schedule=dualpipe train.global_batch_size=16",
    "parallel.pp=3 parallel.dp=2 pipeline.schedule=zbv",
    "parallel.pp=2 parallel.dp=2 pipeline.layers=[1,2]",
    "parallel.dp=4 train.micro_batch_size=2",
]


@given(topology=st.sampled_from(TOPOLOGIES), lost=st.integers(1, 7), least=st.integers(1, 4))
def test_the_next_smaller_topology_is_the_largest_legal_one(topology: str, lost: int, least: int) -> None:
    config = compose([*SMALL, *topology.split()])
    most = config.parallel.world_size - lost
    found = smaller(config, most, least)
    sizes = [size for size in range(most, max(1, least) - 1, -1) if legal(config, size)]
    if found is None:
        assert not sizes
        return
    found.check()
    assert found.parallel.world_size == sizes[0]
    assert replace(found, parallel=config.parallel) == config, "nothing but the topology has changed"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("restarts=-1", "restarts=-1 must not be negative"),
        ("restarts=a", "restarts=a must be a whole number"),
        ("restart_wait_s=-1", "restart_wait_s=-1 must be a number of at least 0"),
        ("restart_wait_s=inf", "restart_wait_s=inf must be a number of at least 0"),
        ("min_ranks=0", "min_ranks=0 must be at least 1"),
        ("min_ranks=2 parallel.dp=2", "min_ranks=2 belongs to parallel.elastic=true"),
        ("restarts=1 min_ranks=3 parallel.dp=2 parallel.elastic=true", "min_ranks=3 is above the 2 ranks of the run"),
        ("parallel.elastic=true", "it needs restarts above 0"),
        ("--multirun restarts=1 train.seq_len=8,16", "restarts=1 is a setting of one job"),
    ],
)
def test_refused_before_anything_starts(words: str, sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["local", *words.split()]) == 2
    assert sentence in capfd.readouterr().err


# --- real jobs ---


def strike_until_done(job: Launched, dice: random.Random, most: int, longest_s: float) -> int:
    """SIGKILL to random ranks at random moments of starts, steps and saves, each after the last one was answered by a
    restart; how many were."""
    for number in range(1, most + 1):
        job.wait_for(lambda: len(job.ranks()) == 4)
        time.sleep(dice.uniform(0, longest_s))
        rank = dice.randrange(4)
        print(f"SIGKILL to rank {rank} after step {last_step(job.run_dir)}")
        job.strike(rank)
        job.wait_for(lambda: restarts_of(job.run_dir) >= number)
        if restarts_of(job.run_dir) < number:
            return number - 1
    return most


def restarts_of(folder: Path) -> int:
    return sum(event.kind == "restart" for event in events_of(folder))


def assert_wandb_has_each_step_once(folder: Path, num_steps: int) -> None:
    """What `wandb sync` would send: the folders in their order, without those that were set aside."""
    histories = [wandb_history(each) for each in sorted((folder / "wandb").glob("offline-run-*"))]
    assert [step for history in histories for step, _ in history] == list(range(1, num_steps + 1))
    assert len({each.name.rsplit("-", 1)[1] for each in (folder / "wandb").glob("offline-run-*")}) == 1


STEPS = 12
RUN = [*SMALL, *FOUR, f"train.max_steps={STEPS}", "checkpoint.interval=3", "evaluate.interval=4"]


def test_ranks_killed_at_random_moments_cost_nothing_but_time(
    ranks: Ranks, tmp_path: Path, text: list[str], dice: random.Random
) -> None:
    settings = [*RUN, *text, "zero.engine=deepspeed"]
    undisturbed = run_in(ranks, tmp_path / "undisturbed", settings, 4)
    folder = tmp_path / "killed"
    more = ["track.wandb=offline", "restarts=9", "restart_wait_s=0.1"]
    with local([*settings, *more], folder) as job:
        job.wait_for_step(dice.randrange(1, 6))
        num = strike_until_done(job, dice, 2, 1.0)
        code, out, error = job.finish()
    assert (code, restarts_of(folder)) == (0, num), error
    assert f"done after step {STEPS}" in out and error.count("starts again from ") == num
    assert_the_same(finished(folder), undisturbed)
    assert_wandb_has_each_step_once(folder, STEPS)
    kinds = [event.kind for event in events_of(folder)]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("lost") == num
    assert events_of(folder)[-1].values["outcome"] == "done"
    saves = [event for event in events_of(folder) if event.kind == "save"]
    assert {event.step for event in saves} >= {STEPS} and all(each.values["num_bytes"] > 1000 for each in saves)
    assert all(0 <= each.values["stalled_s"] <= each.values["duration_s"] for each in saves)


NUM_KILLS = 200


@pytest.mark.slow
def test_two_hundred_kills(ranks: Ranks, tmp_path: Path, text: list[str], dice: random.Random) -> None:
    """`HALOCLINE_SEED=1 python -m pytest -m slow tests/launch/test_supervise.py -k two_hundred -s`: half an hour."""
    settings = [*RUN, *text, "zero.engine=deepspeed", "train.max_steps=60", "checkpoint.interval=7"]
    undisturbed = run_in(ranks, tmp_path / "undisturbed", settings, 4)
    num_kills = run = 0
    while num_kills < int(os.environ.get("HALOCLINE_KILLS", NUM_KILLS)):
        folder, run = tmp_path / f"killed-{run}", run + 1
        more = ["track.wandb=offline", "restarts=1000", "restart_wait_s=0"]
        with local([*settings, *more], folder) as job:
            num_kills += strike_until_done(job, dice, 25, 4.0)
            code, _, error = job.finish()
        print(f"{num_kills} kills, {run} runs", flush=True)
        assert code == 0, error
        assert_the_same(finished(folder), undisturbed)
        assert_wandb_has_each_step_once(folder, 60)


@pytest.mark.slow
def test_goes_on_with_fewer_ranks_and_the_same_numbers(tmp_path: Path, text: list[str], dice: random.Random) -> None:
    """In fp64, as design promises it between topologies: 1e-9 against one plain process."""
    settings = [*SMALL, *text, *FOUR, "precision=fp64", "checkpoint.interval=1"]
    folder = tmp_path / "run"
    more = ["parallel.elastic=true", "restarts=3", "restart_wait_s=0", "min_ranks=2"]
    with local([*settings, *more], folder) as job:
        job.wait_for_step(dice.randrange(1, 7))
        job.strike(dice.randrange(4))
        code, _, error = job.finish()
    assert code == 0, error
    starts = [event.values["num_ranks"] for event in events_of(folder) if event.kind == "start"]
    assert starts == [4, 3] or starts == [4], "whoever was struck when all was done was not missed"
    assert worst(Finished(folder, finished(folder).rows), plain_run(compose([*SMALL, *text, "precision=fp64"]))) < 1e-9
    assert last_step(folder) == 10
