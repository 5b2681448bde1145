"""Ranks on this machine that measure something, started as those of a job are, and leave what rank 0 found as JSON.

Needs no torch: a launcher starts them too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.ranks import POLITE, POLL_S, Ranks, forked, noted, program
from launch.warm import may_fork, warm_up
from train.config import RunConfig
from train.stopping import StopRequest, end_now, stop_signals

# The module of the ranks that time a run's own layers.
OWN_LAYERS = "launch.plan.own_layers"
# Ranks for each core, above which a run is not timed: its step would be turns at cores and nothing else.
RANKS_PER_CORE = 4


def found_by(
    module: str, arguments: Sequence[str], num_ranks: int, stop: StopRequest | None = None, limit_s: float | None = None
) -> dict[str, Any]:
    """What `module.program([*arguments, OUT])` writes on rank 0 into the file OUT.

    stop: requests of the program that asks, which end the ranks; None: they are listened to here. limit_s: after which
    the ranks are given up. ValueError with the reason if there is nothing to be found.
    """
    if stop is None:
        with stop_signals(end_now, insist=noted) as own:
            return found_by(module, arguments, num_ranks, own, limit_s)
    with tempfile.TemporaryDirectory(prefix="halocline-measure-") as folder:
        out = Path(folder) / "found.json"
        words = [*arguments, str(out)]
        if may_fork("cpu"):
            warm_up(POLITE)
            start = forked(module, words)
        else:
            start = program([sys.executable, "-c", f"import {module} as m; m.program({words!r})"])
        end_s = None if limit_s is None else time.monotonic() + limit_s
        with Ranks(start, num_ranks, Path(folder) / "logs") as ranks:
            while (ended := ranks.poll()) is None:
                if stop.asked:
                    ranks.stop(at_once=True)
                if end_s is not None and time.monotonic() > end_s:
                    raise ValueError(f"it took longer than {limit_s:g} s")
                time.sleep(POLL_S)
        if ended.code:
            raise ValueError(ended.reason)
        found = json.loads(out.read_text())
        assert isinstance(found, dict)
        return found


def too_many(config: RunConfig) -> str:
    """Why a run of so many ranks is not timed here; empty where it can be."""
    num_ranks, most = config.parallel.world_size, RANKS_PER_CORE * (os.cpu_count() or 1)
    if num_ranks <= most:
        return ""
    return f"the run's layers were not timed: {num_ranks} ranks are above the {most} that this machine's cores take"
