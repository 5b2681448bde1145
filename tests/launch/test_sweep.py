"""A sweep: every job in a folder of its own, none lost to another's end, none run twice, none started in vain."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from launch.__main__ import main
from launch.ranks import Ended
from launch.sweep.build import build
from launch.sweep.config import SweepConfig
from launch.sweep.jobs import Outcome, hopeless_since
from launch.sweep.run import sweep
from launch.sweep.search import Proposal, Result
from tests.launched import Launched
from tests.runs import SMALL, prepare_text
from train import compose
from train.checkpoint import step_folders
from train.config import RunConfig
from train.settings import CONFIGS
from train.track.metrics_file import read_metrics

DIVERGED = Ended(3, "step 3: loss or gradient is not finite")
ROW = '{{"step": {step}, "train/loss": {loss}, "valid/loss": {loss}, "train/consumed_tokens": {step}}}\n'


class FakeJob:
    """A job that takes `num_polls` looks."""

    def __init__(self, machine: FakeMachine, ended: Ended, num_polls: int, finish: Callable[[Ended], None]) -> None:
        self.machine, self.ended, self.num_polls, self.finish = machine, ended, num_polls, finish

    def poll(self) -> Ended | None:
        self.num_polls -= 1
        if self.num_polls > 0:
            return None
        self.finish(self.ended)
        self.machine.num_running -= 1
        return self.ended

    def stop(self, at_once: bool = False) -> None:
        self.ended, self.num_polls = Ended(0, "", True), 1

    def kill(self) -> None:
        pass


class FakeMachine:
    """Stands for starting ranks: leaves what a run leaves, without training."""

    def __init__(self, ends: dict[int, Ended] | None = None, polls: dict[int, int] | None = None) -> None:
        self.ends, self.polls = ends or {}, polls or {}
        self.configs: list[RunConfig] = []
        self.num_running = self.most_running = 0

    def prepare(self, config: RunConfig) -> None:
        pass

    def start(self, config: RunConfig, num_parallel: int, console: Path | None) -> FakeJob:
        assert (console is None) == (num_parallel == 1)
        self.configs.append(config)
        number = len(self.configs)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        ended = self.ends.get(number, Ended(0))
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(compose.text(config))

        def finish(ended: Ended) -> None:
            loss = '"NaN"' if ended.code else config.lr_scheduler.lr
            (folder / "metrics.jsonl").write_text("".join(ROW.format(step=step, loss=loss) for step in (1, 2, 3)))
            if ended.code == 0 and not ended.was_asked:
                _checkpoint(folder, config.recipe().num_steps)

        return FakeJob(self, ended, self.polls.get(number, 1), finish)


def _checkpoint(folder: Path, step: int) -> None:
    path = step_folders.step_folder(folder / "checkpoints", step)
    path.mkdir(parents=True, exist_ok=True)
    step_folders.write_manifest(path, {})
    (folder / "checkpoints" / "latest").write_text(path.name)


def table(root: Path) -> list[dict[str, str]]:
    with (root / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_that_cannot_fit_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sweep.plan`: the others go on, and the table says why."""
    figures = tmp_path / "small.yaml"
    figures.write_text(re.sub(r"device_gb: .*", "device_gb: 2.5", (CONFIGS / "cluster" / "h800.yaml").read_text()))
    machine = FakeMachine()
    sizes = ["model.vocab_size=2048,2000000", "train.max_steps=3", f"run.dir={tmp_path / 'base'}"]
    assert sweep([*sizes, f"sweep.plan={figures}"], machine) == 1
    assert [config.model.vocab_size for config in machine.configs] == [2048]
    small, large = sorted(table(tmp_path / "base-sweep"), key=lambda row: row["status"], reverse=True)
    assert (small["status"], large["status"]) == ("finished", "failed")
    assert re.search(r"pipeline rank 0 needs \d+\.\d GB and a device has 2\.5", large["reason"])
    with pytest.raises(ValueError, match="h801"):
        sweep([*sizes, "sweep.plan=h801"], machine)
    assert len(machine.configs) == 1


def test_a_grid_over_keys_and_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine, base = FakeMachine(), tmp_path / "base"
    grid = ["lr_scheduler.lr=0.02,0.01", "precision=fp32,bf16", "train.max_steps=3", f"run.dir={base}"]
    assert sweep(grid, machine) == 0
    found = [(config.lr_scheduler.lr, config.precision.name, Path(config.run.dir).name) for config in machine.configs]
    assert found == [
        (lr, precision, f"lr_scheduler.lr={lr},precision={precision}")
        for lr in (0.02, 0.01)
        for precision in ("fp32", "bf16")
    ]
    assert {config.track.group for config in machine.configs} == {"base-sweep"}  # in wandb they lie together
    assert len({config.track.name for config in machine.configs}) == 4
    rows = table(tmp_path / "base-sweep")
    assert [row["lr_scheduler.lr"] for row in rows] == ["0.01", "0.01", "0.02", "0.02"]  # best first
    assert {(row["status"], row["step"], row["reason"]) for row in rows} == {("finished", "3", "")}
    out = capsys.readouterr().out
    assert "results.csv" in out and out.count("finished") == 4
    assert (tmp_path / "base-sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    # Again: nothing is left to run; with another grid only what is new.
    again = FakeMachine()
    assert sweep(grid, again) == 0
    assert again.configs == []
    assert sweep([grid[0], "precision=fp64,bf16", "zero.engine=native", *grid[2:]], again) == 0
    assert {config.precision.name for config in again.configs} == {"fp64", "bf16"}


def test_what_did_not_finish_is_told_apart_and_loses_nobody(tmp_path: Path) -> None:
    machine = FakeMachine({2: DIVERGED, 3: Ended(137, "rank 0 was ended by SIGKILL")})
    grid = ["model.num_experts_per_tok=4,99,3,2,1", "train.max_steps=3", f"run.dir={tmp_path / 'base'}"]
    assert sweep(grid, machine) == 1
    rows = {row["model.num_experts_per_tok"]: row for row in table(tmp_path / "base-sweep")}
    statuses = {key: row["status"] for key, row in rows.items()}
    assert statuses == {"4": "finished", "99": "failed", "3": "diverged", "2": "failed", "1": "finished"}
    assert list(statuses)[:2] == ["4", "1"] and set(list(statuses)[3:]) == {"99", "2"}
    assert "model.num_experts_per_tok=99" in rows["99"]["reason"]
    assert rows["3"]["reason"] == DIVERGED.reason and rows["3"]["valid/loss"] == "nan"
    # A failed job is tried again; one that diverged would do so again.
    again = FakeMachine()
    assert sweep(grid, again) == 1
    assert [config.model.num_experts_per_tok for config in again.configs] == [2]


@pytest.mark.parametrize("num_parallel", [1, 3])
def test_a_stopped_sweep_says_what_is_left(tmp_path: Path, num_parallel: int) -> None:
    class Stopping(FakeMachine):
        def start(self, config: RunConfig, num_parallel: int, console: Path | None) -> FakeJob:
            job = super().start(config, num_parallel, console)
            if len(self.configs) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return job

    grid = ["train.seed=1,2,3,4,5", "train.max_steps=3", f"run.dir={tmp_path / 'base'}"]
    grid.append(f"sweep.num_parallel={num_parallel}")
    assert sweep(grid, Stopping(polls=dict.fromkeys(range(1, 6), 1 if num_parallel == 1 else 99))) == 1
    statuses = [row["status"] for row in table(tmp_path / "base-sweep")]
    first = ["finished", "interrupted"] if num_parallel == 1 else ["interrupted"] * 2
    assert statuses == [*first, "not run", "not run", "not run"]
    again = FakeMachine()
    assert sweep(grid, again) == 0
    assert len(again.configs) == 5 - first.count("finished")


@pytest.mark.parametrize(("num_parallel", "seed"), [(1, 0), (2, 1), (4, 2)])
def test_jobs_side_by_side(tmp_path: Path, num_parallel: int, seed: int) -> None:
    """However long each takes: never more than allowed at once, each once, and the table does not depend on it."""
    random = Random(seed)
    root, bad, polls = tmp_path, random.randint(1, 6), [random.randint(1, 3) for _ in range(6)]
    machine = FakeMachine({bad: DIVERGED}, dict(enumerate(polls, 1)))
    grid = ["lr_scheduler.lr=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3", "train.max_steps=3", f"run.dir={root / 'base'}"]
    assert sweep([*grid, f"sweep.num_parallel={num_parallel}"], machine) == 1
    assert machine.most_running == num_parallel and machine.num_running == 0
    assert [config.lr_scheduler.lr for config in machine.configs] == [n * 1e-3 for n in range(1, 7)]
    good = [f"{n}e-3" for n in range(1, 7) if n != bad]
    rows = [(row["lr_scheduler.lr"], row["status"]) for row in table(root / "base-sweep")]
    assert [float(lr) for lr, _ in rows] == [float(lr) for lr in (*good, f"{bad}e-3")]
    assert [status for _, status in rows] == ["finished"] * 5 + ["diverged"]


@pytest.mark.parametrize("name", ["with space", "a=b", "a,b", "it's", 'say "hi"', "αβ", "50%", "what?"])
def test_folders_with_odd_names(tmp_path: Path, name: str) -> None:
    quoted = str(tmp_path / name).replace("'", "\\'")
    machine = FakeMachine()
    one = ["train.max_steps=3", f"run.dir='{quoted}'"]
    assert sweep(["train.seed=1,2", *one], machine) == 0
    assert [Path(config.run.dir).parent for config in machine.configs] == [tmp_path / f"{name}-sweep"] * 2
    assert len(table(tmp_path / f"{name}-sweep")) == 2
    # What the ranks read back from the resolved YAML is the same folder.
    for config in machine.configs:
        assert compose.load(Path(config.run.dir) / "config.yaml") == config
    assert sweep(["lr_scheduler.lr=interval(0,1)", "sweep.num_trials=1", *one], machine) == 0
    assert (tmp_path / f"{name}-sweep" / "study.db").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("train.sed=1,2", r"train\.sed is not a key of the config; did you mean train\.seed"),
        ("sweep.parallel=2", r"sweep\.parallel is not a key of sweep; did you mean sweep\.num_parallel"),
        ("sweep.num_parallel=0", "must be at least 1"),
        ("sweep.num_parallel=two", r"sweep\.num_parallel=two must be a whole number"),
        ("sweep.num_parallel=1,2", r"sweep\.num_parallel=1,2 must be a whole number"),
        ("sweep.sampler=tpee", "not one of grid, tpe, random"),
        ("sweep.sampler=tpe", "nothing to choose"),
        ("sweep.metric=loss", "not one of"),
        ("sweep.num_trials=3", "nothing to choose"),
        ("lr_scheduler.lr=range(3,3)", "empty range"),
        ("lr_scheduler.lr=choice()", r"choice\(\) cannot be read"),
        ("lr_scheduler.lr=interval(2,1)", "no interval"),
        ("lr_scheduler.lr=tag(log,interval(0,1))", "no logarithm"),
        ("train.max_steps=interval(2,5)", r"train\.max_steps"),
        ("lr_scheduler.lr=-1,-2", r"lr_scheduler\.lr=-1"),
        ("model=glob(*)", "glob"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(tmp_path: Path, setting: str, sentence: str) -> None:
    machine = FakeMachine()
    with pytest.raises(ValueError, match=sentence) as refused:
        sweep([setting, f"run.dir={tmp_path / 'base'}"], machine)
    assert "\n" not in str(refused.value)
    assert machine.configs == [] and not list(tmp_path.iterdir())


def test_a_grid_has_no_intervals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot visit an interval"):
        sweep(["lr_scheduler.lr=interval(0,1)", "sweep.sampler=grid", f"run.dir={tmp_path / 'b'}"], FakeMachine())


def test_without_optuna_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "launch.sweep.optuna_search", raising=False)
    assert main(["local", "--multirun", "lr_scheduler.lr=interval(0,1)", f"run.dir={tmp_path / 'b'}"]) == 2
    assert capsys.readouterr().err == (
        "an interval (lr_scheduler.lr) needs Optuna, which is not installed: pip install 'halocline[sweep]'\n"
    )
    assert main(["local", "sweep.num_parallel=2"]) == 2
    assert "add --multirun" in capsys.readouterr().err


def test_long_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    machine = FakeMachine()
    long = [f"/{'x' * 200}/{i}" for i in range(2)]
    assert sweep([f"data.source={long[0]},{long[1]}", "train.max_steps=3", f"run.dir={tmp_path / 'b'}"], machine) == 0
    names = {Path(config.run.dir).name for config in machine.configs}
    assert len(names) == 2 and all(len(name.encode()) < 255 for name in names)


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    class Nested(FakeMachine):
        def prepare(self, config: RunConfig) -> None:
            with pytest.raises(ValueError, match="in use by a running sweep"):
                sweep(["train.seed=1,2", f"run.dir={tmp_path / 'b'}"], FakeMachine())

    assert sweep(["train.seed=1,2", "train.max_steps=3", f"run.dir={tmp_path / 'b'}"], Nested()) == 0


# --- a sampler ---

SPACE = ["lr=tag(log, interval(1e-4,1e-1))", "width=int(interval(2,64))", "kind=a,b,c", "depth=range(2,12,3)", "x=1"]


def objective(values: dict[str, str]) -> float:
    return abs(math.log10(float(values["lr"])) + 2.5) + abs(int(values["width"]) - 40) / 40 + (values["kind"] == "a")


def search(path: Path, num_trials: int, sampler: str = "tpe", seed: int = 0) -> list[Proposal]:
    """Ask and tell until all have been proposed, one at a time."""
    config = SweepConfig(sampler=sampler, num_trials=num_trials, seed=seed)
    study = build(config, *compose.space(SPACE), path)
    found = []
    while (proposal := study.ask()) is not None:
        status = "diverged" if proposal.number % 5 == 4 else "pruned" if proposal.number % 5 == 3 else "finished"
        value = objective(proposal.values)
        study.tell(proposal.number, Result(status, value, {1: value + 1, 2: value}))
        found.append(proposal)
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_was_broken_off_goes_on_as_if_it_had_not_been(tmp_path: Path, sampler: str) -> None:
    """Broken off after any trial, or between a proposal and its result: the same proposals, to the last digit."""
    whole = search(tmp_path / "whole", 14, sampler)
    assert search(tmp_path / "whole", 14, sampler) == whole
    for num_first in (3, 12):  # the first ten learn from nothing
        path = tmp_path / str(num_first)
        config = SweepConfig(sampler=sampler, num_trials=14)
        search(path, num_first, sampler)
        study = build(config, *compose.space(SPACE), path)
        for _ in range(num_first + 1):  # the last of them is proposed and never told
            study.ask()
        assert search(path, 14, sampler) == whole
    other = search(tmp_path / "other", 2, sampler, seed=1)
    assert other != whole[:2]


def test_proposals_keep_to_their_space(tmp_path: Path) -> None:
    for proposal in search(tmp_path, 15):
        assert 1e-4 <= float(proposal.values["lr"]) <= 1e-1
        assert 2 <= int(proposal.values["width"]) <= 64
        assert proposal.values["kind"] in "abc" and proposal.values["depth"] in ("2", "5", "8", "11")
        assert proposal.name == f"trial-{proposal.number:04d}"


@pytest.mark.slow
def test_a_sampler_that_learns_finds_better_jobs_than_chance(tmp_path: Path) -> None:
    def later(sampler: str, seed: int) -> float:
        found = search(tmp_path / f"{sampler}-{seed}", 30, sampler, seed)
        return sum(objective(each.values) for each in found[15:]) / 15

    assert sum(later("tpe", seed) for seed in range(2)) < sum(later("random", seed) for seed in range(2))


def test_a_study_belongs_to_its_settings(tmp_path: Path) -> None:
    search(tmp_path, 2)
    search(tmp_path, 3)  # more trials are welcome
    with pytest.raises(ValueError, match="is the study of another sweep: its seed was 0 and is 1"):
        search(tmp_path, 3, seed=1)


def test_failed_trials_of_a_study_stay(tmp_path: Path) -> None:
    """Others were proposed in the knowledge of their end."""
    grid = ["lr_scheduler.lr=interval(0.001,0.1)", "sweep.num_trials=4", "train.max_steps=3"]
    grid.append(f"run.dir={tmp_path / 'base'}")
    assert sweep(grid, FakeMachine({2: Ended(1, "rank 0 failed")})) == 1
    again = FakeMachine()
    assert sweep(grid, again) == 1 and again.configs == []
    assert [row["status"] for row in table(tmp_path / "base-sweep")] == ["finished"] * 3 + ["failed"]


# --- pruning ---


def ended(*values: float, status: str = "finished") -> Outcome:
    return Outcome(Proposal(0, "", {}), Path(), status, history=dict(enumerate(values, 1)))


def test_the_median_rule() -> None:
    config = SweepConfig(pruner="median")
    others = [ended(5, 4, 3), ended(6, 5, 4), ended(7, 6, 5), ended(math.nan, status="diverged")]
    assert hopeless_since({1: 6, 2: 5, 3: 4}, others, config) is None  # as good as the median
    found = hopeless_since({1: 5, 2: 5.5, 3: 9}, others, config)
    assert found is not None and found[0] == 2 and "5.5000 at step 2" in found[1] and "median 5.0000" in found[1]
    # The same however many steps there are by now; later steps alone; not below three; the other way round.
    assert hopeless_since({1: 5, 2: 5.5}, others, config) == found
    assert hopeless_since({1: 5, 2: 5.5, 3: 4}, others, SweepConfig(pruner="median", prune_after_steps=2)) is None
    assert hopeless_since({1: 9}, others[1:], config) is None
    assert hopeless_since({1: 4}, others, SweepConfig(pruner="median", direction="maximize")) is not None
    assert hopeless_since({1: 9}, others, SweepConfig()) is None


@pytest.mark.parametrize("polls", [1, 1000])
def test_hopeless_jobs_are_pruned_whether_or_not_they_were_quicker(tmp_path: Path, polls: int) -> None:
    """A job that writes worse losses is stopped, or had ended just before: the table says the same."""

    class Writing(FakeMachine):
        def start(self, config: RunConfig, num_parallel: int, console: Path | None) -> FakeJob:
            job = super().start(config, num_parallel, console)
            job.finish(Ended(0, "", True))  # its metrics are there from the start
            return job

    machine = Writing(polls={4: polls})
    lrs = ["lr_scheduler.lr=0.001,0.002,0.003,0.009,0.0015", "train.max_steps=3", "sweep.pruner=median"]
    assert sweep([*lrs, f"run.dir={tmp_path / 'base'}"], machine) == 0
    rows = {row["lr_scheduler.lr"]: row for row in table(tmp_path / "base-sweep")}
    assert (rows["0.009"]["status"], rows["0.009"]["step"]) == ("pruned", "1")
    assert "worse than the median" in rows["0.009"]["reason"]


# --- real ones ---


def test_a_real_sweep_side_by_side_with_one_that_diverges(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = prepare_text(tmp_path / "tokens")
    grid = [*SMALL, *text, "train.max_steps=3", "lr_scheduler.lr=0.001,1e30,0.002", f"run.dir={tmp_path / 'a b'}"]
    assert main(["local", "--multirun", *grid, "sweep.num_parallel=2"]) == 1
    root = tmp_path / "a b-sweep"
    rows = {row["lr_scheduler.lr"]: row for row in table(root)}
    assert [row["status"] for row in rows.values()] == ["finished", "finished", "diverged"]
    assert "loss or gradient is not finite" in list(rows.values())[-1]["reason"]
    good = root / "lr_scheduler.lr=0.001"
    assert {path.name for path in (good / "logs").iterdir()} == {"rank_0.log", "console.log"}
    assert "step=3/3" in (good / "logs" / "console.log").read_text()
    out = capfd.readouterr().out
    assert "lr_scheduler.lr=0.002: finished, valid/loss" in out and "step=3/3" not in out
    assert dataclasses.is_dataclass(compose.load(good / "config.yaml"))


@pytest.mark.slow
def test_a_sweep_whose_launcher_was_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL in the middle of the second of three trials; the same command then gives what it would have."""
    common = [*SMALL, *prepare_text(tmp_path / "tokens"), "train.max_steps=60", "checkpoint.interval=10"]
    common += ["evaluate.num_sequences=2", "lr_scheduler.lr=tag(log,interval(1e-4,1e-2))", "sweep.num_trials=3"]
    command = ["-m", "launch", "local", "--multirun", *common, f"run.dir={tmp_path / 'killed'}"]
    second = tmp_path / "killed-sweep" / "trial-0001"
    with Launched(command, second) as launched:
        launched.wait_for_step(12)
        launched.process.kill()
    first_before = (second.with_name("trial-0000") / "metrics.jsonl").stat().st_mtime_ns
    with Launched(command, second) as launched:
        code, out, err = launched.finish()
    assert code == 0, err
    assert "finished before" in out
    assert (second.with_name("trial-0000") / "metrics.jsonl").stat().st_mtime_ns == first_before
    assert "resumed from" in (second / "logs" / "rank_0.log").read_text()
    with Launched([*command[:-1], f"run.dir={tmp_path / 'whole'}"], tmp_path) as launched:
        assert launched.finish()[0] == 0
    for name in ("trial-0000", "trial-0001", "trial-0002"):
        runs = [read_metrics(tmp_path / f"{which}-sweep" / name / "metrics.jsonl") for which in ("killed", "whole")]
        losses = [[(row["step"], row["train/loss"], row.get("valid/loss")) for row in run] for run in runs]
        assert losses[0] == losses[1] and len(losses[0]) == 60
    assert table(tmp_path / "killed-sweep") == table(tmp_path / "whole-sweep")
