"""A keyed permutation of [0, n) that is computed, not stored: any position of a shuffle of any length at once."""

from __future__ import annotations

import hashlib
import math

import numpy as np

_ROUNDS = 3
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, odd: products spread over the high bits
_SHIFT = np.uint64(32)


class Permutation:
    """A bijection of [0, n), drawn by (seed, epoch).

    A Feistel network over pairs (left, right) with left < a, right < b and a * b >= n: each half-round adds a hash of
    one half to the other, modulo that half's range, which can be undone and is thus a bijection of [0, a * b). With
    a = ceil(sqrt(n)) and b = ceil(n / a), at most a - 1 values lie beyond n; one that lands there is sent through
    again until it is back (cycle walking), which keeps the bijection.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise ValueError(f"n={n} must be at least 1: nothing can be permuted")
        self._n = n
        a = math.isqrt(n - 1) + 1
        self._a, self._b = np.uint64(a), np.uint64(-(-n // a))
        key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=16 * _ROUNDS).digest()
        self._keys = np.frombuffer(key, dtype="<u8").reshape(_ROUNDS, 2)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where the permutation sends `positions` (any shape, values in [0, n)): int64 of the same shape."""
        out = self._once(positions.astype(np.uint64))
        while (beyond := out >= self._n).any():
            out[beyond] = self._once(out[beyond])
        return out.astype(np.int64)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The positions that the permutation sends to `values` (any shape, in [0, n)): int64 of the same shape."""
        out = self._undone(values.astype(np.uint64))
        while (beyond := out >= self._n).any():
            out[beyond] = self._undone(out[beyond])
        return out.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._b)
        for key_left, key_right in self._keys:
            left = (left + _hash(right, key_left)) % self._a
            right = (right + _hash(left, key_right)) % self._b
        return left * self._b + right

    def _undone(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._b)
        for key_left, key_right in self._keys[::-1]:
            # Less than nothing cannot be told apart in unsigned numbers, so the range is added first.
            right = (right + self._b - _hash(left, key_right) % self._b) % self._b
            left = (left + self._a - _hash(right, key_left) % self._a) % self._a
        return left * self._b + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """32 well-mixed bits of each value and the key: multiplied and folded twice, the high bits of the result."""
    mixed = (values ^ key) * _MULTIPLIER
    mixed ^= mixed >> _SHIFT
    mixed *= _MULTIPLIER
    return mixed >> _SHIFT
