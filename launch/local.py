"""`python -m launch local key=value [--multirun]`: one job, or a sweep of jobs, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.job import LocalJob, check_folders, check_machine, warm
from launch.ranks import Ended, await_end, noted
from train import compose
from train.config import RunConfig
from train.stopping import end_now, stop_signals


def local(settings: Sequence[str]) -> int:
    """Compose once, prepare the data, start the ranks; returns the job's exit code.

    With `--multirun` among the settings it sweeps instead.
    """
    if "--multirun" in settings:
        from launch.sweep.machine import Machine
        from launch.sweep.run import sweep

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
    config.track.check_installed()
    with stop_signals(end_now, insist=noted) as stop:
        check_folders(config)
        check_machine(config)
        warm(config)  # so that it imports beside the preparation, and beside what that imports
        from launch.prepare import prepare_run

        prepare_run(config)
        stop.honour()
        job = LocalJob(config)
        try:
            return await_end(job, stop)
        finally:
            job.kill()
