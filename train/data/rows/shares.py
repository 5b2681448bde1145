"""Which source each position of an endless stream is taken from: exact shares, random order, no state."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple


class _Split(NamedTuple):
    """Two parts of a blend, the first no heavier than the other, and what draws their order."""

    small: _Split | str
    large: _Split | str
    ratio: Fraction  # both together over the small one: at least 2
    key: bytes


class Shares:
    """Deals positions 0, 1, 2, ... out to sources by their weights, as a function of (seed, position).

    The sources are paired off like letters in Huffman's code, the two lightest parts first. Between the two parts of a
    pair, the lighter one gets one random position of each window that is due to it: with a share of 1/3, one of 0..2,
    one of 3..5, and so on. So neither part is ever more than 1 off its share of the pair's positions, and nothing
    repeats with a period that batches or ranks could fall in step with. Over any first n positions a source is within
    1 of weight * n in a blend of two, within 2 in one of three, and within 3.36 (the sum of the reciprocals of the
    Fibonacci numbers) in any: an error goes down from a part to its own parts by their shares alone, and along a path
    of Huffman's tree weights grow as those numbers do. In the long run shares are exact.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        """weights: of any sum, above 0, taken as the decimal numbers that they are written as."""
        self.weights = {name: Fraction(repr(weights[name])) for name in sorted(weights)}
        total = sum(self.weights.values())
        self.weights = {name: weight / total for name, weight in self.weights.items()}
        heap: list[tuple[Fraction, str, _Split | str]] = [(weight, name, name) for name, weight in self.weights.items()]
        heapq.heapify(heap)
        while len(heap) > 1:
            weight, names, small = heapq.heappop(heap)
            other, other_names, large = heapq.heappop(heap)
            both = f"{names}+{other_names}"
            key = hashlib.blake2b(f"{seed} {both}".encode(), digest_size=32).digest()
            split = _Split(small, large, (weight + other) / weight, key)
            heapq.heappush(heap, (weight + other, both, split))
        self._root = heap[0][2]

    def at(self, position: int) -> tuple[str, int]:
        """The source of a position, and how many earlier positions are that source's."""
        part, index = self._root, position
        while not isinstance(part, str):
            before, after = _num_small(part, index), _num_small(part, index + 1)
            part, index = (part.small, before) if after > before else (part.large, index - before)
        return part, index

    def counts(self, num_positions: int) -> dict[str, int]:
        """How many of the first positions are each source's."""
        counts: dict[str, int] = {}
        waiting = [(self._root, num_positions)]
        while waiting:
            part, count = waiting.pop()
            if isinstance(part, str):
                counts[part] = count
            else:
                small = _num_small(part, count)
                waiting += [(part.small, small), (part.large, count - small)]
        return {name: counts[name] for name in self.weights}


def _num_small(split: _Split, count: int) -> int:
    """How many of a pair's first `count` positions are the lighter part's."""
    over, under = split.ratio.numerator, split.ratio.denominator
    window = count * under // over
    first, stop = -(-window * over // under), -(-(window + 1) * over // under)
    digest = hashlib.blake2b(b"%d" % window, digest_size=8, key=split.key).digest()
    return window + (first + int.from_bytes(digest, "little") % (stop - first) < count)
