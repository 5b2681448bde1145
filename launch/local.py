"""`python -m launch local key=value [--multirun]`: one job, or a sweep of jobs, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch.forecast import Forecast
from launch.job import LocalJob, check_folders, check_machine, warm
from launch.ranks import Ended, noted
from launch.settings import LocalSettings
from launch.supervise import supervised
from train import compose
from train.config import RunConfig
from train.settings import leaves, read
from train.stopping import end_now, stop_signals


def local(settings: Sequence[str]) -> int:
    """Compose once, prepare the data, start the ranks; returns the job's exit code.

    With `--multirun` among the settings it sweeps instead.
    """
    own = [setting for setting in settings if setting.partition("=")[0] in dict(leaves(LocalSettings))]
    if "--multirun" in settings:
        from launch.sweep.machine import Machine
        from launch.sweep.run import sweep

        if own:
            raise ValueError(f"{own[0]} is a setting of one job: a sweep starts none of its jobs again")
        return sweep([setting for setting in settings if setting != "--multirun"], Machine())
    if ours := [setting for setting in settings if setting.startswith("sweep.")]:
        raise ValueError(f"{ours[0]} is a setting of a sweep: add --multirun")

    supervision = read(LocalSettings, own, "local")

    def start(config: RunConfig) -> int:
        supervision.check_for(config.parallel.world_size, config.parallel.elastic)
        ended = run(config, supervision)
        if ended.reason:
            print(ended.reason, file=sys.stderr)
        return ended.code

    return compose.started([setting for setting in settings if setting not in own], start)


def run(config: RunConfig, supervision: LocalSettings) -> Ended:
    """One job: pp x dp processes on this machine that all read the same resolved config, started again as is asked."""
    config.track.check_installed()
    with stop_signals(end_now, insist=noted) as stop:
        check_folders(config)
        check_machine(config)
        warm(config)  # so that it imports beside the preparation, and beside what that imports
        from launch.prepare import prepare_run

        prepare_run(config)
        stop.honour()
        with Forecast(config, stop) as forecast:

            def job(started: RunConfig) -> LocalJob:
                """A job of fewer ranks, as some are lost, is another run than the one that was planned."""
                return LocalJob(started, variables=forecast.variables if started == config else None)

            return supervised(config, supervision, job, stop)
