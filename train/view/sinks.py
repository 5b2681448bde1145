"""Sinks of a run that draw: the loss curve at every checkpoint, the report at the end.

What draws is imported when it is first drawn with: matplotlib takes half a second, which no start needs to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.files import in_words
from train.track.metrics import StepReport
from train.track.metrics_file import read_metrics
from train.track.sinks import say as say_to_people


class PictureSink:
    """Draws the loss curve from `metrics.jsonl` at every checkpoint and at the end."""

    def __init__(
        self,
        metrics: Path,
        out: Path,
        title: str = "",
        unigram_entropy: float | None = None,
        say: Callable[[str], None] = say_to_people,
    ) -> None:
        self._metrics, self._out, self._title, self._entropy = metrics, out, title, unigram_entropy
        self._say = say
        self._works = True

    def write(self, report: StepReport) -> None:
        """Nothing: the picture reads the file."""

    def checkpoint(self) -> None:
        """Draws what there is."""
        if not self._works:
            return
        try:
            from train.view.curves import draw_loss

            draw_loss({self._title: read_metrics(self._metrics)}, self._out, unigram_entropy=self._entropy)
        except Exception as error:
            self._works = False
            self._say(f"{self._out} could not be drawn ({_reason(error)}); the run goes on without it")

    def close(self, failed: bool) -> None:
        """Draws the whole run."""
        self.checkpoint()


class ReportSink:
    """Writes `report.html` when the run ends."""

    def __init__(
        self, run_dir: Path, unigram_entropy: float | None = None, say: Callable[[str], None] = say_to_people
    ) -> None:
        """unigram_entropy: of the validation text, in nats per token."""
        self._run_dir, self._entropy, self._say = run_dir, unigram_entropy, say

    def write(self, report: StepReport) -> None:
        """Nothing: the report reads the run's files."""

    def checkpoint(self) -> None:
        """Nothing: it is written at the end."""

    def close(self, failed: bool) -> None:
        """The report of the whole run."""
        out = self._run_dir / "report.html"
        try:
            from train.view.report.page import write_report
            from train.view.report.runs import read_run

            write_report([read_run(self._run_dir)], out, self._entropy)
        except Exception as error:
            self._say(f"{out} could not be written ({_reason(error)})")


def _reason(error: Exception) -> str:
    return in_words(error) if isinstance(error, OSError) else str(error) or type(error).__name__
