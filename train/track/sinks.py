"""Where step reports go: a `Tracker` hands them to sinks, which are files, the console, wandb and pictures.

Rank 0 opens a `Tracker` over a list of sinks; other ranks have one over none.
None of them is the work itself: a sink that breaks says so in one sentence, and the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from train.track.metrics import StepReport

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the reports of a run, one per finished step, in order."""

    def write(self, report: StepReport) -> None:
        """One finished step."""

    def checkpoint(self) -> None:
        """The step just written is being saved."""

    def close(self, failed: bool) -> None:
        """The run ends, well or not."""


def say(sentence: str) -> None:
    """A sentence for people: a warning of the log, which rank 0 also shows on the console."""
    log.warning("%s", sentence)


def tell(sentence: str) -> None:
    """A sentence for people that warns of nothing: a line of the log, which rank 0 also shows on the console."""
    log.info("%s", sentence, extra={"told": True})


class Tracker:
    """Fans every report out to the sinks it was handed, in their order; over none, on all ranks but 0, does nothing."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self.latest: dict[str, float] = {}

    def write(self, report: StepReport) -> None:
        """One finished step, to all; `latest` has every metric's last value, whatever became of the sinks."""
        self.latest |= report.values
        for sink in self._sinks:
            sink.write(report)

    def checkpoint(self) -> None:
        """Call after the step's `write` and before its checkpoint is complete."""
        for sink in self._sinks:
            sink.checkpoint()

    def close(self, failed: bool = False) -> None:
        """Closes all; call it once."""
        for sink in self._sinks:
            sink.close(failed)
