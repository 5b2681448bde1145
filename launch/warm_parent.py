"""Imported first by the process that ranks are forked from, for what it does: that process ends with the launcher, and
with nothing else."""

from __future__ import annotations

import signal

from launch.warm import IGNORED, follow_into_death

follow_into_death(signal.SIGKILL)
for number in IGNORED:
    signal.signal(number, signal.SIG_IGN)
