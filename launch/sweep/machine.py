"""This machine, for the jobs of a sweep."""

from __future__ import annotations

from pathlib import Path

from launch.job import LocalJob, check_folders, check_machine
from launch.prepare import check_epochs_of, prepare_command
from train.config import RunConfig
from train.data.config import DataConfig


class Machine:
    """This machine, for jobs side by side: each data set is prepared once, each job meets at a port of its own."""

    def __init__(self) -> None:
        self._prepared: list[DataConfig] = []
        self._jobs: list[LocalJob] = []

    def prepare(self, config: RunConfig) -> None:
        """Prepare a job's data, unless it is. ValueError when that cannot be, or this machine lacks what ranks need."""
        config.track.check_installed()
        check_machine(config)
        if config.data not in self._prepared:
            prepare_command(config.data)
            self._prepared.append(config.data)

    def start(self, config: RunConfig, num_parallel: int, console: Path | None) -> LocalJob:
        """One of `num_parallel` jobs. ValueError when its folder is in use or refuses, its data cannot be prepared or
        it would see them more often than `data.max_epochs`."""
        check_folders(config)
        self.prepare(config)
        check_epochs_of(config)
        self._jobs = [job for job in self._jobs if job.poll() is None]
        self._jobs.append(LocalJob(config, num_parallel - 1, console))
        return self._jobs[-1]
