"""Jobs in processes of their own, for tests: started as a user starts them, watched and struck from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.ranks import HeldPort
from tests.runs import environment, train_main
from tests.spawn import STOP_S, imported
from train.track.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent


class Launched:
    """One running command; a context manager, so that a failing test leaves no process behind."""

    def __init__(self, command: Sequence[str], run_dir: Path) -> None:
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=dict(environment()),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.ranks():
            _strike(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()

    def finish(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=STOP_S)
        return self.process.returncode, out, err

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by rank, as /proc shows them: children of the command that have a RANK, or ranks
        forked from a child of it, which carry theirs as a name."""
        found: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                name, parent = _name_and_parent(entry)
                if (forked := re.fullmatch(r"halocline-r(\d+)", name)) is not None:
                    if _name_and_parent(Path(f"/proc/{parent}"))[1] == self.process.pid:
                        found[int(forked[1])] = int(entry.name)
                elif parent == self.process.pid:
                    settings = (entry / "environ").read_bytes().split(b"\0")
                    found |= {int(item[5:]): int(entry.name) for item in settings if item.startswith(b"RANK=")}
            except OSError:
                continue  # it ended while we looked
        return [found[rank] for rank in sorted(found)]

    def strike(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, if it still lives."""
        ranks = self.ranks()
        if rank < len(ranks):
            _strike(ranks[rank], number)

    def wait_for_step(self, step: int) -> None:
        """Return when `metrics.jsonl` has this step, or the command has ended."""
        self.wait_for(lambda: last_step(self.run_dir) >= step)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return when it has happened, or the command has ended."""
        end_s = time.monotonic() + STOP_S
        while not happened() and self.process.poll() is None:
            assert time.monotonic() < end_s, "nothing happened"
            time.sleep(0.01)


def _name_and_parent(process: Path) -> tuple[str, int]:
    """What /proc/PID/stat says: `PID (NAME) STATE PARENT ...`."""
    before, after = (process / "stat").read_text().rsplit(")", 1)
    return before.split("(", 1)[1], int(after.split()[1])


def local(settings: Sequence[str], run_dir: Path) -> Launched:
    """`python -m launch local`."""
    return Launched(["-m", "launch", "local", *settings, f"run.dir={run_dir}"], run_dir)


def alone(settings: Sequence[str], run_dir: Path) -> Launched:
    """`python -m train`, one process."""
    return Launched(["-m", "train", *settings, f"run.dir={run_dir}"], run_dir)


def torchrun(settings: Sequence[str], run_dir: Path, num_ranks: int) -> Launched:
    """`torchrun --standalone ... -m train`."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "train"]
    return Launched([*start, *settings, f"run.dir={run_dir}"], run_dir)


class Forked:
    """The ranks of one job, forked from a process that has everything imported: a start takes a moment, not seconds."""

    def __init__(
        self, settings: Sequence[str], run_dir: Path, num_ranks: int, own: Callable[[int], list[str]] = lambda _: []
    ) -> None:
        """own: settings of a rank that the others do not get. All print to `self.console`."""
        context = imported()
        arguments = [*settings, f"run.dir={run_dir}"]
        self.console = run_dir.with_suffix(".log")
        self._port = HeldPort()
        self.run_dir = run_dir
        self.processes = [
            context.Process(
                target=_forked_rank,
                args=(rank, num_ranks, self._port.number, [*arguments, *own(rank)], self.console),
                daemon=True,
            )
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    def said(self) -> str:
        """What all ranks have printed so far."""
        return self.console.read_text() if self.console.exists() else ""

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return when it has happened, or a rank has ended."""
        end_s = time.monotonic() + STOP_S
        while not happened() and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < end_s, "nothing happened"
            time.sleep(0.005)

    def codes(self, patience_s: float = 2.0) -> list[int | None]:
        """The exit codes of all ranks once they have ended; minus the signal's number for one ended by a signal.

        patience_s: when one has failed the others get so long and are killed then, as launchers do: those that still
        wait for it to join the job cannot know. More where all have joined, and each is to end by itself.
        """
        end_s = time.monotonic() + STOP_S
        while any(process.is_alive() for process in self.processes) and time.monotonic() < end_s:
            if any(process.exitcode for process in self.processes):
                end_s = min(end_s, time.monotonic() + patience_s)
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
            process.join()
        self._port.close()
        return [process.exitcode for process in self.processes]

    def wait_for_step(self, step: int) -> None:
        """Return when `metrics.jsonl` has this step, or a rank has ended."""
        self.wait_for(lambda: last_step(self.run_dir) >= step)


def _forked_rank(rank: int, num_ranks: int, port: int, arguments: list[str], log: Path) -> None:
    os.environ.update(environment())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks))
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    sys.exit(train_main(arguments))


def last_step(run_dir: Path) -> int:
    """The last step in a run's `metrics.jsonl`, 0 without any."""
    path = run_dir / "metrics.jsonl"
    return max((int(row["step"]) for row in read_metrics(path)), default=0) if path.exists() else 0


def _strike(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
