"""What benchmarks over several ranks share: settings, clocks that all ranks agree on, sleeping instead of computing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from benchmarks._sides import wall


def read_settings(arguments: Sequence[str], defaults: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """(the word without "=", empty if there is none; the settings over their defaults). SystemExit for unknown ones."""
    part = next((word for word in arguments if "=" not in word), "")
    settings = dict(defaults) | dict(word.split("=", 1) for word in arguments if "=" in word)
    if unknown := settings.keys() - defaults.keys():
        raise SystemExit(f"unknown settings: {', '.join(sorted(unknown))}; known: {', '.join(defaults)}")
    return part, settings


def total(number: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    """A number summed (or whatever `op` does) over all ranks."""
    cell = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(cell, op)
    return float(cell)


def slowest(side: Callable[[], object]) -> float:
    """Seconds of the slowest rank, all having started together."""
    dist.barrier()
    return total(wall(side), dist.ReduceOp.MAX)


def span(side: Callable[[], object]) -> float:
    """Seconds from the first rank's start to the last one's end. All ranks must be processes of one machine."""
    dist.barrier()
    began = time.monotonic()
    side()
    ended = time.monotonic()
    return total(ended, dist.ReduceOp.MAX) - total(began, dist.ReduceOp.MIN)


class Sleeper:
    """Sleeps in place of computing, and knows by how much sleeps end late: the noise of everything that sleeps."""

    def __init__(self) -> None:
        self.late_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.late_s.append(wall(lambda: time.sleep(seconds)) - seconds)

    def median_late_s(self) -> float:
        return statistics.median(self.late_s) if self.late_s else 0.0

    def mean_late_s(self) -> float:
        return statistics.fmean(self.late_s) if self.late_s else 0.0
