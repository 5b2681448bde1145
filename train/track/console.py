"""Progress of a run for people: one moving line on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from train.track.metrics import StepReport  # which needs torch; the launcher reads this file


def short(count: float) -> str:
    """A count in three digits, as 491k or 14.8T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


class ConsoleWarnings(logging.Handler):
    """Shows a rank's warnings on the console and what it tells (`sinks.tell`), each text once; its log has all of them.

    Python's own warnings come as `logging.captureWarnings` makes them. Those about the future of a library are for
    who changes this program, and stay in the log, as do errors of this program: they end the run and are said then.
    """

    _OF_PYTHON = re.compile(r"\S.*?:\d+: (\w+): (.*)")
    _FOR_DEVELOPERS = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints it above the moving line, if there is one."""
        text = record.getMessage().strip()
        is_warning = record.levelno >= logging.WARNING
        if not is_warning and not getattr(record, "told", False):
            return
        if record.name == "py.warnings" and (found := self._OF_PYTHON.match(text)):
            if found[1] in self._FOR_DEVELOPERS:
                return
            text = f"{found[1]}: {found[2]}"
        is_ours = record.name.split(".")[0] == "train"
        if text in self._said or (is_ours and record.levelno >= logging.ERROR):
            return
        self._said.add(text)
        tqdm.write(f"warning: {text}" if is_warning else text, file=sys.stdout)
        sys.stdout.flush()


class ConsoleSink:
    """Progress for people: one moving line on a terminal, plain `key=value` lines in a log.

    A log gets every `log_interval`-th step, the first, the last and those with a validation loss. The time left is
    what the tokens left take at the rate of the last 20 reports, all between them included.
    """

    def __init__(
        self,
        log_interval: int,
        total_steps: int,
        total_tokens: int,
        consumed_tokens: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._log_interval, self._total_steps, self._total_tokens = log_interval, total_steps, total_tokens
        self._clock = clock
        self._seen = deque([(clock(), consumed_tokens)], maxlen=20)
        self._is_first = True
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty():
            layout = "{percentage:3.0f}% |{bar:24}| {desc}"
            self._bar = tqdm(
                total=total_tokens, initial=consumed_tokens, file=self._stream, bar_format=layout, dynamic_ncols=True
            )

    def _time_left(self, report: StepReport) -> str:
        self._seen.append((self._clock(), report.consumed_tokens))
        (first_s, first_tokens), (last_s, last_tokens) = self._seen[0], self._seen[-1]
        seconds_per_token = (last_s - first_s) / max(1, last_tokens - first_tokens)
        return str(timedelta(seconds=round(seconds_per_token * max(0, self._total_tokens - report.consumed_tokens))))

    def write(self, report: StepReport) -> None:
        """Moves the line, or prints one when it is due."""
        values, time_left = report.values, self._time_left(report)
        if report.step == 0:
            self._say(f"step=0/{self._total_steps} valid_loss={values['valid/loss']:.4f}")
            return
        if self._bar is not None:
            loss, valid = values["train/loss"], values.get("valid/loss")
            rate = f"{short(values['perf/tokens_per_s'])} tokens/s"
            self._bar.n = min(report.consumed_tokens, self._total_tokens)
            if valid is not None:
                self._bar.write(f"step {report.step}: loss {loss:.4f} valid {valid:.3f}", file=self._stream)
            self._bar.set_description_str(
                f"step {report.step}/{self._total_steps}  loss {loss:.4f}  {rate}  ETA {time_left}"
            )
            return
        is_last = report.step >= self._total_steps
        if self._is_first or is_last or report.step % self._log_interval == 0 or "valid/loss" in values:
            print(self._line(report, time_left), file=self._stream, flush=True)
        self._is_first = False

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def _line(self, report: StepReport, time_left: str) -> str:
        values = report.values
        optional = (
            ("valid_loss", "valid/loss", ".4f"),
            ("mtp_loss", "train/mtp_loss", ".4f"),
            ("max_vio", "moe/max_vio", ".2f"),
            ("mfu", "perf/mfu", ".3f"),
        )
        parts = [
            f"step={report.step}/{self._total_steps}",
            f"tokens={short(report.consumed_tokens)}",
            f"loss={values['train/loss']:.4f}",
            *(f"{word}={values[name]:{style}}" for word, name, style in optional if name in values),
            f"grad_norm={values['train/grad_norm']:.3f}",
            f"lr={values['train/lr']:.2e}",
            f"tokens_per_s={values['perf/tokens_per_s']:.0f}",
            f"eta={time_left}",
        ]
        return " ".join(parts)

    def checkpoint(self) -> None:
        """Nothing to show: the checkpoint speaks for itself."""

    def close(self, failed: bool) -> None:
        """Leaves the moving line where it stands."""
        if self._bar is not None:
            self._bar.close()
