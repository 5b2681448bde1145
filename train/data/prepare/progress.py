"""Progress of a long job in bytes: a bar with ETA on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

_LINE_EVERY_S = 10.0


class Progress:
    """Shows how much of `total_bytes` is done; `with Progress(...) as progress: progress.add(n)`.

    Of these `before_bytes` were done by an earlier call, and say nothing about the speed.
    """

    def __init__(self, what: str, total_bytes: int, say: Callable[[str], None], before_bytes: int = 0) -> None:
        self._what, self._total_bytes, self._say = what, total_bytes, say
        self._done_bytes = self._before_bytes = before_bytes
        self._start_s = self._line_s = time.monotonic()
        self._bar = (
            tqdm(total=total_bytes, initial=before_bytes, desc=what, unit="B", unit_scale=True, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, num_bytes: int) -> None:
        """Count `num_bytes` more as done."""
        self._done_bytes += num_bytes
        if self._bar is not None:
            self._bar.update(num_bytes)
        elif time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            elapsed_s = self._line_s - self._start_s
            new_bytes = self._done_bytes - self._before_bytes
            eta_s = elapsed_s * (self._total_bytes - self._done_bytes) / max(new_bytes, 1)
            self._say(
                f"{self._what}: {self._done_bytes / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, "
                f"{new_bytes / elapsed_s / 1e6:.2f} MB/s, {eta_s:.0f} s to go"
            )
