"""`python -m launch local key=value [--multirun]`: one job, or a sweep of jobs, on this machine."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.prepare import check_epochs_of, prepare_command, prepare_run
from launch.ranks import POLITE, POLL_S, Ended, Ranks, forked, program, stop_signals
from launch.warm import may_fork, warm_up
from train import compose, run_folder
from train.config import RunConfig
from train.data.config import DataConfig


def local(settings: Sequence[str]) -> int:
    """Compose once, prepare the data, start the ranks; returns the job's exit code.

    With `--multirun` among the settings it sweeps instead.
    """
    if "--multirun" in settings:
        from launch.sweep.run import sweep  # its pictures cost a second, which a single job need not wait for

        return sweep([setting for setting in settings if setting != "--multirun"], Machine())
    if ours := [setting for setting in settings if setting.startswith("sweep.")]:
        raise ValueError(f"{ours[0]} is a setting of a sweep: add --multirun")

    def start(config: RunConfig) -> int:
        ended = run(config)
        if ended.reason:
            print(ended.reason, file=sys.stderr)
        return ended.code

    return compose.started(settings, start)


def run(config: RunConfig) -> Ended:
    """One job: pp x dp processes on this machine that all read the same resolved config."""
    run_folder.refuse_if_in_use(Path(config.run.dir))
    _warm_up(config)  # so that it imports beside the preparation
    prepare_run(config)
    job = LocalJob(config)
    try:
        with stop_signals() as asked:
            while (ended := job.poll()) is None:
                if asked:
                    job.stop()
                time.sleep(POLL_S)
            return ended
    finally:
        job.kill()


def _warm_up(config: RunConfig) -> bool:
    """Whether ranks are forked here; then the process that they are forked from is on its way."""
    if not may_fork(config.run.device):
        return False
    warm_up(POLITE)
    return True


class LocalJob:
    """A job whose ranks run; prepared before. Arguments as those of `Ranks`; kill it in the end."""

    def __init__(
        self,
        config: RunConfig,
        num_neighbours: int = 0,
        console: Path | None = None,
    ) -> None:
        self._resolved = tempfile.NamedTemporaryFile("w", prefix="halocline-", suffix=".yaml")  # noqa: SIM115
        self._resolved.write(compose.text(config))
        self._resolved.flush()
        num_ranks, logs = config.parallel.pp * config.parallel.dp, Path(config.run.dir) / "logs"
        arguments = ["--config", self._resolved.name]
        warm = _warm_up(config)
        start = forked("train.__main__", arguments) if warm else program([sys.executable, "-m", "train", *arguments])
        self._ranks = Ranks(start, num_ranks, logs, num_neighbours, console)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        return self._ranks.poll()

    def stop(self) -> None:
        """Ask the ranks to save and end."""
        self._ranks.stop()

    def kill(self) -> None:
        """End the ranks at once."""
        self._ranks.kill()
        self._resolved.close()


class Machine:
    """This machine, for jobs side by side: each data set is prepared once, each job meets at a port of its own."""

    def __init__(self) -> None:
        self._prepared: list[DataConfig] = []
        self._jobs: list[LocalJob] = []

    def prepare(self, config: RunConfig) -> None:
        """Prepare a job's data, unless it is. ValueError when that cannot be."""
        if config.data not in self._prepared:
            prepare_command(config.data)
            self._prepared.append(config.data)

    def start(self, config: RunConfig, num_parallel: int, console: Path | None) -> LocalJob:
        """One of `num_parallel` jobs. ValueError when its folder is in use, its data cannot be prepared or
        it would see them more often than `data.max_epochs`."""
        run_folder.refuse_if_in_use(Path(config.run.dir))
        self.prepare(config)
        check_epochs_of(config)
        self._jobs = [job for job in self._jobs if job.poll() is None]
        self._jobs.append(LocalJob(config, num_parallel - 1, console))
        return self._jobs[-1]
