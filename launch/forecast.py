"""A plan of a run that is about to start on this machine's processors, for the run to compare itself with at its end.

Before the ranks start, as many others time the run's own layers, for about a second. Beside the run, at a low priority,
one process puts the plan together and leaves it in the run's folder; rank 0 reads it when it reports its last step. A
launcher needs no torch for any of it. Whatever goes wrong is a sentence at the run's end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launch.plan.here import OWN_LAYERS, found_by, too_many
from launch.warm import follow_into_death, may_fork
from train import compose
from train.config import RunConfig
from train.environment import PLAN_VARIABLE
from train.stopping import StopRequest

# Seconds in which layers are timed, behind a first step; and how long all of it may take before it is given up.
TIMED_S, LIMIT_S = 0.4, 15.0
NICE = 10
# A plan that nobody waits for any more has so long to end by itself, and give back what its libraries have taken.
END_S = 2.0
NAME = "plan.json"


class Forecast:
    """The plan of one run, on its way. A context manager, in which the run's ranks live."""

    def __init__(self, config: RunConfig, stop: StopRequest) -> None:
        """Times the run's layers, and starts to plan. Nothing of it happens with `track.plan=false`, on a GPU, or where
        ranks cannot be forked."""
        self.variables: dict[str, str] = {}
        self._process: BaseProcess | None = None
        self._resolved = tempfile.NamedTemporaryFile("w", prefix="halocline-", suffix=".yaml")  # noqa: SIM115
        if not config.track.plan or not may_fork(config.run.device):
            return
        self._resolved.write(compose.text(config))
        self._resolved.flush()
        out = (Path(config.run.dir) / NAME).absolute()
        self.variables = {PLAN_VARIABLE: str(out)}
        timed = self._timed(config, stop)
        stop.honour()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.unlink(missing_ok=True)
        except OSError:
            return  # the run itself will say what is wrong with its folder
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_plan, args=(self._resolved.name, timed, str(out)))
        self._process.start()

    def _timed(self, config: RunConfig, stop: StopRequest) -> str:
        """What the ranks have found, as JSON."""
        reason = too_many(config)
        try:
            arguments, num_ranks = [self._resolved.name, str(TIMED_S)], config.parallel.world_size
            found = {"reason": reason} if reason else found_by(OWN_LAYERS, arguments, num_ranks, stop, LIMIT_S)
        except ValueError as error:
            found = {"reason": f"the run's layers could not be timed: {error}"}
        return json.dumps(found)

    def __enter__(self) -> Forecast:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join(END_S)
            self._process.kill()
            self._process.join()
        self._resolved.close()


def _plan(resolved: str, timed: str, out: str) -> None:
    """Body of the process that plans."""
    follow_into_death(signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.setsid()
    os.nice(NICE)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nothing, descriptor)
    from launch.plan.forecast import write_plan

    write_plan(Path(resolved), json.loads(timed), Path(out))
