"""A job that starts again by itself after it has lost a rank: whether, how soon, from where and with how many ranks.

Every decision is an event of the run and a line for people.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.elastic import smaller
from launch.ranks import POLL_S, Ended, Running, await_end
from launch.settings import LocalSettings
from train.checkpoint.step_folders import find_latest, step_of
from train.config import RunConfig
from train.stopping import StopRequest
from train.track.events import Events

# However often a job was lost in a row, it waits no longer than this before it starts again.
MAX_WAIT_S = 300.0
# A start that ends with these codes would end so again: its settings, data or checkpoints were refused; its numbers
# are not finite, and would be the same ones again.
FINAL = (0, 2, 3)


def is_lost(ended: Ended) -> bool:
    """Whether another start may do better: a rank was killed, hung, lost another one, could not write, or failed of
    something that nobody has foreseen; and nobody had asked the job to stop."""
    return ended.code not in FINAL and not ended.was_asked


def wait_before(number: int, first_s: float) -> float:
    """Seconds before the restart of this number, from 1, in a row: twice as many each time, up to `MAX_WAIT_S`."""
    return float(min(first_s * 2.0 ** min(number - 1, 60), max(MAX_WAIT_S, first_s)))


def told(sentence: str) -> None:
    """A decision, for people."""
    print(sentence, file=sys.stderr, flush=True)


def supervised(
    config: RunConfig,
    settings: LocalSettings,
    start: Callable[[RunConfig], Running],
    stop: StopRequest,
    say: Callable[[str], None] = told,
) -> Ended:
    """Run a job to an end that another start would not change, or to as many restarts in a row as are allowed.

    Restarts are counted since the newest checkpoint: a job that comes further between its losses may go on for ever.
    """
    job = _Supervised(config, settings, say)
    while True:
        running = start(job.config)
        try:
            ended = await_end(running, stop)
        finally:
            running.kill()
        if not is_lost(ended):
            return ended
        wait_s = job.lost(ended)
        if wait_s is None:
            return ended
        if not _waited(wait_s, stop):
            return replace(ended, reason=f"{ended.reason}; asked to stop before it was started again", was_asked=True)


def _waited(wait_s: float, stop: StopRequest) -> bool:
    """Wait; False as soon as the job is asked to stop."""
    end_s = time.monotonic() + wait_s
    while not stop.asked and (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left_s))
    return not stop.asked


class _Supervised:
    """What is known of a job from start to start; `config` is that of the next one."""

    def __init__(self, config: RunConfig, settings: LocalSettings, say: Callable[[str], None]) -> None:
        self.config, self._asked, self._settings, self._say = config, config, settings, say
        self._root = config.checkpoint.folder(config.run.dir)
        self._events = Events(Path(config.run.dir), say=say, alert=config.track.alert)
        self._number = 0  # restarts since the newest checkpoint
        self._first = self._newest = find_latest(self._root)

    def lost(self, ended: Ended) -> float | None:
        """Decide: seconds until the next start, whose config is then `config`; None where there is to be none."""
        self._events.add("lost", code=ended.code, reason=ended.reason)
        if not self._settings.restarts:
            return None
        newest = find_latest(self._root)
        self._number = 1 if newest != self._newest else self._number + 1
        self._newest = newest
        if self._number > self._settings.restarts:
            self._give_up(ended, f"restarts={self._settings.restarts} in a row have come to no new checkpoint")
            return None
        following = self._following(newest)
        if following is None:
            fewer = self.config.parallel.world_size - 1
            least = self._settings.min_ranks
            self._give_up(ended, f"no topology of {least} (min_ranks) to {fewer} ranks is legal for this run")
            return None
        self.config = following
        wait_s = wait_before(self._number, self._settings.restart_wait_s)
        self._note(ended, newest, wait_s)
        return wait_s

    def _following(self, newest: Path | None) -> RunConfig | None:
        """The config of the next start. From its own newest checkpoint the run goes on whatever it had begun with."""
        config = self.config
        if config.parallel.elastic:
            fewer = smaller(config, config.parallel.world_size - 1, self._settings.min_ranks)
            if fewer is None:
                return None
            config = fewer
        resume = "auto" if newest != self._first else self._asked.checkpoint.resume
        return replace(config, checkpoint=replace(config.checkpoint, resume=resume))

    def _note(self, ended: Ended, newest: Path | None, wait_s: float) -> None:
        parallel, own = self.config.parallel, self._asked.parallel
        topology = f"pp={parallel.pp} dp={parallel.dp} ep={parallel.ep}"
        limit, step = self._settings.restarts, 0 if newest is None else step_of(newest)
        self._events.add("restart", step=step, number=self._number, limit=limit, wait_s=wait_s, topology=topology)
        origin = "from the beginning" if newest is None else f"from {newest.name}"
        ranks = "" if parallel == own else f" with {parallel.world_size} ranks ({topology})"
        self._say(
            f"{ended.reason}; starts again {origin}{ranks} in {wait_s:g} s, restart {self._number} of at most {limit} "
            "without a new checkpoint"
        )

    def _give_up(self, ended: Ended, why: str) -> None:
        self._events.add("give_up", code=ended.code, reason=why)
        self._say(f"not started again: {why}")
