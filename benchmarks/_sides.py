"""Sides of a comparison, measured in turns: every round runs each side once, in rotating order, so that slow drift and
the neighbours' load fall on all of them alike. Figures are medians, and ratios are taken inside a round."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[Callable[[], object]], float]


def wall(side: Callable[[], object]) -> float:
    """Seconds that pass while a side runs."""
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


def cpu(side: Callable[[], object]) -> float:
    """Processor seconds that this process uses for a side: what one-thread work would take without neighbours."""
    began = time.process_time()
    side()
    return time.process_time() - began


def take_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, clock: Clock = wall
) -> dict[str, list[float]]:
    """Seconds of each round, by side. `clock` runs a side and says how long it took."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            took = clock(sides[name])
            if number >= 0:
                seconds[name].append(took)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """A ratio's median over the rounds and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}..{self.high:.2f}]"


def speedup(seconds: dict[str, list[float]], side: str, base: str) -> Ratio:
    """How many times faster `side` is than `base`, round by round."""
    ratios = [slow / fast for slow, fast in zip(seconds[base], seconds[side], strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


class Neighbours:
    """What other processes used of this machine during a `with` block; this process and its ended children are ours.

    Linux only: elsewhere it says that it does not know.
    """

    def __enter__(self) -> Neighbours:
        self._began, self._before = time.perf_counter(), self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        after = self._read()
        self.cores: float | None = None
        if self._before and after:
            busy, own = after[0] - self._before[0], after[1] - self._before[1]
            self.cores = max(0.0, busy - own) / self.seconds

    def __str__(self) -> str:
        if self.cores is None:
            return "neighbours: unknown on this system"
        return f"neighbours used {self.cores:.2f} of {os.cpu_count()} cores during {self.seconds:.0f} s"

    @staticmethod
    def _read() -> tuple[float, float] | None:
        """Busy seconds of the machine, and ours."""
        try:
            with open("/proc/stat") as file:
                ticks = [int(number) for number in file.readline().split()[1:9]]
        except OSError:
            return None
        own = os.times()
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), sum(own[:4])
