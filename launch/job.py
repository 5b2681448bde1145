"""One job on this machine: its ranks, started, watched and ended together. Needs no torch of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launch.ranks import POLITE, Ended, Ranks, forked, program
from launch.warm import may_fork, warm_up
from train import compose, environment, run_folder
from train.config import RunConfig
from train.files import check_takes_files, refusing


def check_machine(config: RunConfig) -> None:
    """ValueError for what a job's ranks would miss on this machine, before anything is prepared for them."""
    environment.num_threads()
    environment.wandb_mode()
    if config.run.kernels == "compiled":
        environment.check_compiler()
    if config.run.device == "cuda":
        from train.device import uses_cuda

        uses_cuda("run.device", config.run.device, config.parallel.pp * config.parallel.dp)
    if config.run.kernels == "triton":
        from train.device import uses_cuda
        from train.model.kernels import choose_kernels

        choose_kernels("triton", "cuda" if uses_cuda("run.device", config.run.device) else "cpu")


def check_folders(config: RunConfig) -> None:
    """ValueError when a job runs in the run's folder, or when nothing can be written there or where checkpoints go."""
    folder, checkpoints = Path(config.run.dir), config.checkpoint.folder(config.run.dir)
    with refusing(f"run.dir={folder}"):
        check_takes_files(folder)
    with refusing(f"checkpoint.dir={checkpoints}"):
        check_takes_files(checkpoints)
    run_folder.refuse_if_in_use(folder)


def warm(config: RunConfig) -> bool:
    """Whether the job's ranks are forked; then the process that they are forked from is on its way."""
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
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._resolved = tempfile.NamedTemporaryFile("w", prefix="halocline-", suffix=".yaml")  # noqa: SIM115
        self._resolved.write(compose.text(config))
        self._resolved.flush()
        num_ranks, logs = config.parallel.pp * config.parallel.dp, Path(config.run.dir) / "logs"
        arguments = ["--config", self._resolved.name]
        command = [sys.executable, "-m", "train", *arguments]
        start = forked("train.__main__", arguments) if warm(config) else program(command)
        self._ranks = Ranks(start, num_ranks, logs, num_neighbours, console, variables)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        return self._ranks.poll()

    def stop(self, at_once: bool = False) -> None:
        """Ask the ranks to save and end, or end them at once."""
        self._ranks.stop(at_once)

    def kill(self) -> None:
        """End the ranks at once."""
        self._ranks.kill()
        self._resolved.close()
