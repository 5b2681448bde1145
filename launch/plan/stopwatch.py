"""How long a function takes on a machine on which other programs run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

# How long one figure is measured, and in how many blocks. The figure is the middle one: a run's typical step meets the
# machine as it typically is, and the best of ten blocks is what no step has from its first operation to its last.
FIGURE_S, NUM_BLOCKS = 0.02, 10
# Of a function that takes longer than a block: so many calls, unless one of them takes as long as ten figures.
FEW_BLOCKS = 4


class Stopwatch:
    """Times functions, and remembers how far the blocks of a figure lay apart."""

    def __init__(self, figure_s: float = FIGURE_S) -> None:
        self._figure_s = figure_s
        self._spreads: dict[str, list[float]] = {}

    def seconds(self, kind: str, function: Callable[[], object]) -> float:
        """What a call takes, the first apart. kind: under which its spread is counted."""
        function()
        once = block_s(function, 1)
        few = FEW_BLOCKS if once < 10 * self._figure_s else 1
        num_blocks = max(few, min(NUM_BLOCKS, int(self._figure_s / once)))
        count = max(1, int(self._figure_s / num_blocks / once))
        blocks = sorted(block_s(function, count) for _ in range(num_blocks))
        if num_blocks == NUM_BLOCKS:
            self._spreads.setdefault(kind, []).append(blocks[num_blocks // 2] / blocks[1] - 1)
        return figure(blocks)

    def spreads(self) -> dict[str, float]:
        """By kind, how much slower the middle block of a figure is than its second fastest, in the mean."""
        return {kind: statistics.mean(found) for kind, found in self._spreads.items()}


def figure(blocks: Sequence[float]) -> float:
    """The middle block, the faster one of two in the middle."""
    return sorted(blocks)[(len(blocks) - 1) // 2]


def block_s(function: Callable[[], object], count: int) -> float:
    """What a call takes in the mean of so many."""
    started = time.perf_counter()
    for _ in range(count):
        function()
    return max((time.perf_counter() - started) / count, 1e-8)
