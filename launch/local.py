"""`python -m launch local key=value [--multirun]`: one job, or a sweep of jobs, on this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.prepare import prepare_run
from launch.ranks import Ended, start_ranks
from launch.sweep import sweep
from train import compose, run_folder
from train.config import RunConfig


def local(settings: Sequence[str]) -> int:
    """Compose once, prepare the data, start the ranks; returns the job's exit code.

    With `--multirun` among the settings it sweeps instead.
    """
    if "--multirun" in settings:
        return sweep([setting for setting in settings if setting != "--multirun"], run)
    ended = run(compose.compose(settings))
    if ended.reason:
        print(ended.reason, file=sys.stderr)
    return ended.code


def run(config: RunConfig) -> Ended:
    """One job: pp x dp processes on this machine that all read the same resolved config."""
    folder = Path(config.run.dir)
    run_folder.refuse_if_in_use(folder)
    prepare_run(config)
    with tempfile.NamedTemporaryFile("w", prefix="halocline-", suffix=".yaml") as resolved:
        resolved.write(compose.text(config))
        resolved.flush()
        num_ranks = config.parallel.pp * config.parallel.dp
        return start_ranks([sys.executable, "-m", "train", "--config", resolved.name], num_ranks, folder / "logs")
