"""What benchmarks over several ranks share: settings, clocks that all ranks agree on, sleeping instead of computing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks._sides import wall
from train.settings import read

T = TypeVar("T")


def read_settings(kind: type[T], arguments: Sequence[str], benchmark: str) -> tuple[str, T]:
    """(the word without "=", empty if there is none; the benchmark's settings). SystemExit with a sentence for settings
    that cannot be."""
    part = next((word for word in arguments if "=" not in word), "")
    try:
        return part, read(kind, [word for word in arguments if "=" in word], benchmark)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def as_words(settings: Any) -> list[str]:
    """Settings as the `key=value` words that they are read from."""
    return [f"{name}={value}" for name, value in asdict(settings).items() if value is not None]


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
