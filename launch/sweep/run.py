"""The sweep: asks for jobs, runs some at a time, keeps what became of each, and closes with a table and a picture."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch.ranks import GRACE_S, POLL_S, Ended, Running
from launch.sweep import table
from launch.sweep.build import build, sampler_of
from launch.sweep.config import SweepConfig, split
from launch.sweep.jobs import Outcome, conclude, configure, hopeless_since, is_finished, remembered
from launch.sweep.picture import draw_sweep
from launch.sweep.search import Proposal, Search
from launch.sweep.seeds import is_seed
from train import compose, run_folder
from train.compose import Swept
from train.config import RunConfig
from train.files import locked
from train.stopping import StopRequest, end_now, stop_signals
from train.view.report.page import write_report
from train.view.report.runs import read_run

PRUNE_INTERVAL_S = 1.0


class Machine(Protocol):
    """What starts jobs."""

    def prepare(self, config: RunConfig) -> None:
        """Prepare a job's data, unless it is. ValueError when that cannot be."""

    def start(self, config: RunConfig, num_parallel: int, console: Path | None) -> Running:
        """One of `num_parallel` jobs that share the machine; what it prints goes to `console`, if there is one."""


@dataclass
class _Job:
    outcome: Outcome
    config: RunConfig
    running: Running
    hopeless: str = ""
    looked_at_s: float = 0.0


def sweep(settings: Sequence[str], machine: Machine) -> int:
    """Every job of a grid, or as many as a sampler proposes, each in a folder of its own under `<run.dir>-sweep`.

    A job that does not finish does not lose the others. Asked to stop, a sweep asks its jobs to save and starts no
    more; the same command goes on: what ended is not run again, what was interrupted resumes from its checkpoint.
    Returns 0 if every job finished or was pruned, else 1.

    Raises ValueError, before any job starts, for settings of the sweep that cannot be, and when no job is legal.
    """
    config, rest = split(settings)
    fixed, swept = compose.space(rest)
    sampler_of(config, swept)
    first = _first_legal(fixed, swept)
    config.check_source(first.data.valid_names)
    root = Path(f"{first.run.dir}-sweep")
    fits = _fits(config)
    with _alone(root):
        jobs = _Sweep(config, fixed, swept, build(config, fixed, swept, root), root, machine, fits)
        with stop_signals(end_now, insist=jobs.end) as stop:
            machine.prepare(first)
            stop.honour()
            return jobs.run(stop)


class _Sweep:
    def __init__(
        self,
        config: SweepConfig,
        fixed: Sequence[str],
        swept: Sequence[Swept],
        search: Search,
        root: Path,
        machine: Machine,
        fits: Callable[[RunConfig], None],
    ) -> None:
        self.config, self.fixed, self.search, self.root, self.machine = config, fixed, search, root, machine
        self.fits = fits
        self.varied = [each.key for each in swept if len(each.choices) != 1]
        self.outcomes: list[Outcome] = []
        self.jobs: list[_Job] = []

    def run(self, stop: StopRequest) -> int:
        try:
            proposal = self.search.ask()
            while self.jobs or (proposal is not None and not stop.asked):
                while proposal is not None and not stop.asked and len(self.jobs) < self.config.num_parallel:
                    self._begin(proposal)
                    proposal = self.search.ask() if self._has_room(stop) else None
                self._look(stop)
                if proposal is None and self._has_room(stop):
                    proposal = self.search.ask()
            while not self.search.learns and (proposal := proposal or self.search.ask()) is not None:
                self.outcomes.append(Outcome(proposal, self.root / proposal.name))
                proposal = None
        finally:
            for job in self.jobs:
                job.running.kill()
        return self._close()

    def end(self, code: int, sentence: str) -> None:
        """At once, whatever this process is at; what was written of the table stays, and the same command goes on."""
        for job in list(self.jobs):
            job.running.stop(at_once=True)
        end_now(code, sentence)

    def _has_room(self, stop: StopRequest) -> bool:
        """A sampler is asked at the last moment: the more jobs have ended, the more it knows."""
        return not stop.asked and len(self.jobs) < self.config.num_parallel

    def _begin(self, proposal: Proposal) -> None:
        outcome = Outcome(proposal, self.root / proposal.name)
        self.outcomes.append(outcome)
        self._say(outcome, str(outcome.folder) if self.config.num_parallel == 1 else f"{outcome.folder}: starts")
        try:
            config = configure(self.fixed, proposal, self.root)
            if remembered(outcome, config, self.search.learns, self.config.pruner):
                outcome.read(self.config.metric)
                self._cut(outcome)
                self._ended(outcome, f"{outcome.status} before")
                return
            if is_finished(config):  # but killed before it could be noted
                self._conclude(outcome, config, Ended(0), "")
                return
            self.fits(config)
            _wait_until_free(outcome.folder)
            console = outcome.folder / "logs" / "console.log" if self.config.num_parallel > 1 else None
            self.jobs.append(_Job(outcome, config, self.machine.start(config, self.config.num_parallel, console)))
        except ValueError as error:
            outcome.status, outcome.reason = "failed", str(error)
            self._ended(outcome, "failed")

    def _look(self, stop: StopRequest) -> None:
        """Once over all running jobs, and a moment of rest."""
        for job in list(self.jobs):
            if stop.asked:
                job.running.stop()
            self._prune(job)
            ended = job.running.poll()
            if ended is not None:
                self.jobs.remove(job)
                self._conclude(job.outcome, job.config, ended, job.hopeless)
        if self.jobs:
            time.sleep(POLL_S)

    def _conclude(self, outcome: Outcome, config: RunConfig, ended: Ended, hopeless: str) -> None:
        outcome.read(self.config.metric)
        conclude(outcome, config, ended, self._cut(outcome) or hopeless)
        self._ended(outcome, outcome.status)

    def _prune(self, job: _Job) -> None:
        now_s = time.monotonic()
        if self.config.pruner == "none" or job.hopeless or now_s - job.looked_at_s < PRUNE_INTERVAL_S:
            return
        job.looked_at_s = now_s
        job.outcome.read(self.config.metric)
        found = hopeless_since(job.outcome.history, self._others(job.outcome), self.config)
        if found is not None:
            job.hopeless = found[1]
            job.running.stop()

    def _cut(self, outcome: Outcome) -> str:
        """Why a job is hopeless, with its history up to there: how far it came afterwards is chance. Empty: it is not.
        A job that was quicker than the pruner is treated as if it had not been."""
        found = hopeless_since(outcome.history, self._others(outcome), self.config)
        if found is None or outcome.status in ("finished", "diverged", "failed"):
            return ""
        outcome.history = {step: value for step, value in outcome.history.items() if step <= found[0]}
        outcome.step, outcome.value = found[0], outcome.history[found[0]]
        return found[1]

    def _others(self, outcome: Outcome) -> Iterator[Outcome]:
        return (each for each in self.outcomes if each is not outcome)

    def _ended(self, outcome: Outcome, what: str) -> None:
        """A job has ended: say so, let the search know unless it will go on, and write the table so far."""
        if outcome.status != "interrupted":
            self.search.tell(outcome.proposal.number, outcome.result())
        if self.config.num_parallel > 1 or what.endswith("before"):
            measured = f", {self.config.metric} {outcome.value:.4f} after step {outcome.step}" if outcome.step else ""
            self._say(outcome, f"{outcome.folder.name}: {what}{measured}")
        if outcome.reason:
            print(outcome.reason, file=sys.stderr, flush=True)
        table.write(self.outcomes, self.varied, self.config, self.root / "results.csv")

    def _say(self, outcome: Outcome, what: str) -> None:
        gap = "\n" if self.config.num_parallel == 1 else ""
        print(f"{gap}[{outcome.proposal.number + 1}/{self.search.num_jobs}] {what}", flush=True)

    def _close(self) -> int:
        rows = table.write(self.outcomes, self.varied, self.config, self.root / "results.csv")
        shown = [row[:-1] for row in rows]  # without the folders
        if any(is_seed(key) for key in self.varied):
            shown = table.write_means(self.outcomes, self.varied, self.config, self.root / "seeds.csv")
        print(f"\n{table.show(shown)}\n\nresults: {self.root / 'results.csv'}", flush=True)
        best = table.ranked(self.outcomes, self.config)
        if any(outcome.step for outcome in best):
            draw_sweep(best, self.varied, self.config, self.root / "sweep.png")
            print(f"picture: {self.root / 'sweep.png'}", flush=True)
            write_report([read_run(each.folder) for each in best if each.step], self.root / "report.html")
            print(f"report: {self.root / 'report.html'}", flush=True)
        return int(any(outcome.status not in ("finished", "pruned") for outcome in self.outcomes))


def _fits(config: SweepConfig) -> Callable[[RunConfig], None]:
    """What refuses jobs by their plan. ValueError for a cluster that is not known."""
    if config.plan is None:
        return lambda _: None
    # Not above: planning needs torch, and a launcher that plans nothing starts without it.
    from launch.sweep.fits import Fits

    return Fits(config.plan).check


def _first_legal(fixed: Sequence[str], swept: Sequence[Swept]) -> RunConfig:
    """The first legal job, of an interval's ends; the first job's error if none is."""
    first: ValueError | None = None
    for values in itertools.product(*(each.choices or each.ends for each in swept)):
        try:
            job = [f"{each.key}={value}" for each, value in zip(swept, values, strict=True)]
            return compose.compose([*fixed, *job])
        except ValueError as error:
            first = first or error
    assert first is not None, "a grid has at least one job"
    raise first


def _wait_until_free(folder: Path) -> None:
    """A job of a sweep that was killed saves before it ends; ValueError when it is still there after its grace."""
    end_s = time.monotonic() + GRACE_S
    while True:
        try:
            run_folder.refuse_if_in_use(folder)
            return
        except ValueError:
            if time.monotonic() > end_s:
                raise
        time.sleep(POLL_S)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """ValueError when another sweep runs in this folder."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{root} cannot be written: {error.strerror}") from None
    with locked(root / ".lock", f"{root} is in use by a running sweep: choose another run.dir"):
        yield
