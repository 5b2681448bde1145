"""A real Slurm on this machine, posing as two nodes: runs are queued, disturbed in every way, and come to their end.

Skipped, in a sentence, where Debian's `slurm-wlm` and `munge` are not installed (tests/slurm_case.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launched import ROOT, last_step
from tests.runs import SMALL, Finished, environment, prepare_text, run_in
from tests.slurm_case import Slurm, running_slurm
from tests.spawn import Ranks
from tests.test_resume import CONSTANT, assert_the_same, finished
from train.track.events import EVENTS, Event, read_events


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


TWO_NODES = [*SMALL, "parallel.dp=2"]


def queue(slurm: Slurm, folder: Path, *words: str) -> list[str]:
    """What a user types; the ids of the jobs."""
    command = [sys.executable, "-m", "launch", "slurm", *TWO_NODES, "slurm.nodes=2", f"run.dir={folder}", *words]
    variables = {**environment(), **slurm.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"queued as job ([\d, ]+);", done.stdout)
    assert found, done.stdout
    return found[1].split(", ")


def events_of(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / EVENTS) if event.kind == kind]


def said(folder: Path) -> str:
    return (folder / "jobs" / "0001" / "job.log").read_text()


def test_a_chain_ends_with_its_run(slurm: Slurm, tmp_path: Path, text: list[str]) -> None:
    folder = tmp_path / "run"
    first, second = queue(slurm, folder, *text, "train.max_steps=3", "slurm.chain=2", "slurm.time=30")
    assert f"Dependency=afterany:{first}" in slurm.ask("scontrol", "--oneliner", "show", "job", second)
    assert [slurm.wait_for_end(job) for job in (first, second)] == ["COMPLETED", "COMPLETED"], said(folder)
    assert last_step(folder) == 3
    (start,) = events_of(folder, "start")
    assert (start.values["num_ranks"], start.values["num_nodes"]) == (2, 2)
    (place,) = events_of(folder, "allocated")
    assert (place.values["job_id"], place.values["nodes"]) == (first, "n[1-2]")
    assert said(folder).splitlines()[-1] == "done after step 3", "all that the second job had to say"


STEPS = 60
DISTURBED = [*CONSTANT, f"train.max_steps={STEPS}", "checkpoint.interval=10"]


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    words = [*TWO_NODES, *text, *DISTURBED, "parallel.nodes=2"]
    return run_in(ranks, tmp_path_factory.mktemp("undisturbed") / "run", words, 2)


class Queued:
    """The disturbed run, as one job."""

    def __init__(self, slurm: Slurm, folder: Path, text: list[str]) -> None:
        more = ["slurm.time=30", "slurm.partition=low", "slurm.restart_wait_s=0"]
        (self.job,) = queue(slurm, folder, *text, *DISTURBED, *more)
        self.slurm, self.folder = slurm, folder

    def train_on(self, num_starts: int, num_steps: int = 3) -> None:
        """Return after so many starts, and steps in the last one."""
        self.slurm.wait_for(self._has_started(num_starts))
        begun = last_step(self.folder)
        self.slurm.wait_for(lambda: last_step(self.folder) >= min(begun + num_steps, STEPS))

    def _has_started(self, num_starts: int) -> Callable[[], bool]:
        def happened() -> bool:
            self.slurm.hasten(self.job)
            return len(events_of(self.folder, "start")) >= num_starts

        return happened

    def check(self, undisturbed: Finished) -> None:
        """It comes to its end, and is the run that nothing has disturbed."""
        assert self.slurm.wait_for_end(self.job) == "COMPLETED", said(self.folder)
        assert events_of(self.folder, "end")[-1].values["outcome"] == "done"
        assert_the_same(finished(self.folder), undisturbed)


@pytest.mark.slow
def test_asked_to_leave_it_saves_and_comes_back(
    slurm: Slurm, undisturbed: Finished, tmp_path: Path, text: list[str]
) -> None:
    """The limit comes near; then a job of another partition takes the nodes."""
    run = Queued(slurm, tmp_path / "run", text)
    run.train_on(1)
    # What Slurm does itself slurm.signal_s before the limit: it signals the script, and nobody else.
    slurm.ask("scancel", "--batch", "--signal=USR1", run.job)
    slurm.wait_for(lambda: len(events_of(run.folder, "requeue")) == 1)
    run.train_on(2)
    high = tmp_path / "high.log"
    slurm.ask("sbatch", "-p", "high", "-N2", "--exclusive", f"--output={high}", "--wrap", "hostname")
    slurm.wait_for(lambda: high.exists() and len(events_of(run.folder, "requeue")) == 2)
    assert [each.values["reason"][:24] for each in events_of(run.folder, "requeue")] == ["stopped and saved after "] * 2
    run.check(undisturbed)


@pytest.mark.slow
def test_what_dies_is_started_again(slurm: Slurm, undisturbed: Finished, tmp_path: Path, text: list[str]) -> None:
    """A rank is killed; then a node loses its power, and comes back."""
    run = Queued(slurm, tmp_path / "run", text)
    run.train_on(1)
    os.kill(ranks_of(run.folder)[-1], signal.SIGKILL)
    run.train_on(2)
    assert len(events_of(run.folder, "restart")) == 1
    kill_node(slurm, "n2")
    slurm.wait_for(lambda: slurm.state(run.job) == "PENDING")
    slurm.start_node("n2")
    run.check(undisturbed)


@pytest.mark.slow
def test_cancelled_it_saves_and_stays_away(slurm: Slurm, tmp_path: Path, text: list[str]) -> None:
    folder = tmp_path / "run"
    (job,) = queue(slurm, folder, *text, *CONSTANT, "train.max_steps=100000", "checkpoint.interval=0")
    slurm.wait_for(lambda: last_step(folder) >= 3)
    slurm.ask("scancel", job)
    assert slurm.wait_for_end(job) == "CANCELLED"
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"))
    assert [event.values["outcome"] for event in events_of(folder, "end")] == ["stopped"]
    assert slurm.state(job) == "CANCELLED"


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks of a run that is a job."""
    done = subprocess.run(["pgrep", "-f", "--", f"-m train --config {folder}/jobs"], capture_output=True, text=True)
    found = [int(pid) for pid in done.stdout.split()]
    return [pid for pid in found if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill_node(slurm: Slurm, node: str) -> None:
    """As when a machine loses its power: its daemon, its steps' daemons and all that these have started."""
    doomed = [slurm.daemons[node].pid]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            logs = [os.readlink(each) for each in (entry / "fd").iterdir()]
        except OSError:
            continue
        if command.startswith(b"slurmstepd") and f"{slurm.folder}/{node}.log" in logs:
            doomed += below(int(entry.name))
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    slurm.daemons[node].wait()


def below(pid: int) -> list[int]:
    """A process and all that it has started."""
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [pid, *(each for child in done.stdout.split() for each in below(int(child)))]
