"""How long a launcher waits for the ranks that live on when one has failed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Ranks whose peer is gone fail within moments of work, and say what they did. One that has had so much of a processor
# meanwhile, or has stood still for so long, is not about to.
WORK_S, STILL_S = 2.0, 2.0
# What is not asleep: it runs, waits for a processor, or for a disk.
_AWAKE = "RD"


class Patience:
    """Counts what ranks do, not what the clock says: on a busy machine a moment of work may take a minute."""

    def __init__(self) -> None:
        self._begun_s: dict[int, float] = {}
        self._worked_s: dict[int, float] = {}
        self._moved_at_s: float | None = None

    def is_over(self, now_s: float, living: Sequence[int]) -> bool:
        """Whether none of these processes is going to say anything more. To be asked again and again from a failure on.

        now_s: of a clock that goes evenly.
        """
        if self._moved_at_s is None:
            self._moved_at_s = now_s
        for pid in living:
            worked_s, is_awake = _looked_at(pid)
            began_s = self._begun_s.setdefault(pid, worked_s)
            has_moved = is_awake or worked_s > self._worked_s.get(pid, worked_s)
            self._worked_s[pid] = worked_s
            if has_moved and worked_s - began_s < WORK_S:
                self._moved_at_s = now_s
        return now_s - self._moved_at_s > STILL_S


def _looked_at(pid: int) -> tuple[float, bool]:
    """Seconds of processor time that a process has had, and whether a thread of it is awake; nothing is known of it
    where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        threads = [path.read_text().rsplit(")", 1)[1].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return 0.0, False
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), any(state in _AWAKE for state in threads)
