"""A device that runs behind its host, on a CPU: what is done is done at once, and passes for done later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

from parallel.host import Host
from parallel.watch import Mark


@dataclass
class Device:
    """One stream. Times in seconds on `clock`. What it is given begins when it is given, or when the rest is done."""

    clock: Callable[[], float]
    free_s: float = -math.inf

    def work(self, duration_s: float) -> None:
        self.free_s = max(self.free_s, self.clock()) + duration_s

    def wait_until(self, at_s: float) -> None:
        """math.inf for what never comes."""
        self.free_s = max(self.free_s, self.clock(), at_s)

    def mark(self) -> Mark:
        return _Mark(self.clock, max(self.free_s, self.clock()))


@dataclass
class _Mark:
    clock: Callable[[], float]
    at_s: float

    def passed(self) -> bool:
        return self.clock() >= self.at_s


class HostAhead(Host):
    """The border to such a device, which takes `lag_s` from one mark to the next."""

    runs_ahead = True

    def __init__(self, clock: Callable[[], float], lag_s: float) -> None:
        super().__init__()
        self.device, self._lag_s = Device(clock), lag_s

    def mark(self) -> Mark:
        self.device.work(self._lag_s)
        return self.device.mark()


@contextmanager
def behind(host: Host) -> Iterator[None]:
    """Inside, a rank that is started has this border to its device."""
    with mock.patch("parallel.process.host_of", lambda _device: host):
        yield
