"""The door to TensorBoard: reports as event files in the run's folder, over steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.track.metrics import Sample, StepReport
from train.track.metrics_file import read_metrics, read_samples
from train.track.sinks import say as say_to_people


class TensorboardSink:
    """Reports as scalars, samples as text, in `run_dir`/tensorboard; what fails is said once and ends no run.

    A run that goes on after `finished_steps` opens a file of its own, which tells readers to forget later steps of the
    files before it. So each step is there once: what a checkpoint holds is in the files before it was complete.
    """

    def __init__(self, run_dir: Path, finished_steps: int = 0, say: Callable[[str], None] = say_to_people) -> None:
        self._folder, self._run_dir, self._say = run_dir / "tensorboard", run_dir, say
        self._writer: Any = None
        self._try("start", lambda: self._start(finished_steps))

    def _start(self, finished_steps: int) -> None:
        # Imported here: it takes a second, which a run without it need not wait.
        from torch.utils.tensorboard import SummaryWriter

        is_new = not self._folder.exists()
        self._next_second()
        self._writer = SummaryWriter(str(self._folder), purge_step=finished_steps + 1 if finished_steps else 0)
        if is_new and finished_steps:
            self._catch_up(finished_steps)

    def _next_second(self) -> None:
        """Readers take files in the order of their names, which begin with the second of their start: let it pass."""
        seconds = (path.name.split(".")[3:4] for path in self._folder.glob("events.out.tfevents.*"))
        latest = max((int(second) for each in seconds for second in each if second.isdecimal()), default=0)
        # No longer where the clock has been set back: a run does not wait for that.
        time.sleep(min(max(0.0, latest + 1 - time.time()), 1.0))

    def _catch_up(self, finished_steps: int) -> None:
        """The steps of a run that was started without this sink."""
        metrics = self._run_dir / "metrics.jsonl"
        written = {each.step: each.samples for each in read_samples(self._run_dir / "samples.jsonl")}
        for row in read_metrics(metrics) if metrics.exists() else []:
            if (step := int(row["step"])) <= finished_steps:
                self._log(step, row, written.get(step, []))

    def _log(self, step: int, values: dict[str, float], samples: Sequence[Sample]) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        for number, sample in enumerate(samples, start=1):
            self._writer.add_text(f"samples/{number}", _verbatim(sample.prompt + sample.text), step)

    def _try(self, verb: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._say(f"TensorBoard could not {verb} ({reason}); the run goes on without it")
            self._writer = None

    def write(self, report: StepReport) -> None:
        """Hands the step to the writer, which has a thread of its own."""
        if self._writer is not None:
            self._try("take a step", lambda: self._log(report.step, dict(report.values), report.samples))

    def checkpoint(self) -> None:
        """All steps so far are in the file before the checkpoint is complete: a resumed run does not write them."""
        if self._writer is not None:
            self._try("write its file", self._writer.flush)

    def close(self, failed: bool) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._try("end its file", self._writer.close)


def _verbatim(text: str) -> str:
    """Markdown that shows a text as it is: each line indented as code."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
