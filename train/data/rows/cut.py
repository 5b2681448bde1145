"""In which order the rows of a source are read: epochs of permutations, also where a run goes on from another cut."""

from __future__ import annotations

import functools
from bisect import bisect_right

import numpy as np

from train.data.rows.permutation import Permutation

SHUFFLED, SEQUENTIAL = "shuffled", "sequential"
ORDERS = (SHUFFLED, SEQUENTIAL)
# Positions are permuted this many at a time and the last results kept: a micro-batch asks for only a few.
_BLOCK_ROWS = 1024
# Rows of which it is counted how many an earlier cut has left over; of a larger source it is estimated from so many.
_MAX_COUNTED_ROWS = 1 << 20


class Cut:
    """A stream of `num_tokens` tokens cut into rows, and their order; row i is [i * seq_len, (i + 1) * seq_len + 1).

    An endless sequence of epochs, each a permutation of its own, drawn by (seed, epoch). Nothing here has a state:
    which row lies at a position is a function of the arguments alone.

    A run that goes on under another seed, another length of rows or with more tokens has a cut that follows a `past`
    one from position `at` on, up to where the past one was read. It first brings the rest of the epoch: those of its
    rows of which nothing has been read in that epoch, in the order of its own permutation. Then its own epochs begin.
    So no token is read twice within an epoch; tokens that share a row with read ones wait for the next epoch.
    """

    def __init__(
        self,
        num_tokens: int,
        seq_len: int,
        seed: int,
        order: str = SHUFFLED,
        past: Cut | None = None,
        at: int = 0,
    ) -> None:
        self.num_rows = (num_tokens - 1) // seq_len
        self.num_tokens, self.seq_len, self.seed, self.order = num_tokens, seq_len, seed, order
        self.past, self.at = past, at
        self._first_epoch = 0 if past is None else past.epoch(at)
        # Of the rest of the past epoch: rows in its blocks of places up to each, as far as they have been counted.
        self._ends: list[int] = []
        self._block = functools.lru_cache(maxsize=4)(self._permuted)
        self._rest = functools.lru_cache(maxsize=4)(self._rest_places)

    def indices(self, first: int, count: int) -> list[int]:
        """Which rows lie at positions [first, first + count): `count` numbers below `num_rows`."""
        if first < 0 or count < 0:
            raise ValueError(f"first={first} and count={count} must not be negative")
        assert first >= self.at or not count, "these positions are of the past"
        found: list[int] = []
        while len(found) < count:
            found += self._from(first + len(found))[: count - len(found)]
        return found

    def epoch(self, position: int) -> int:
        """The number of the epoch that a position is in."""
        return self._place(position)[0]

    def epochs(self, position: int) -> float:
        """How often all positions before this one have read the source."""
        before = 0.0 if self.past is None else self.past.epochs(self.at)
        return before + (position - self.at) / self.num_rows

    def tokens(self, position: int) -> int:
        """How many tokens all positions before this one have predicted."""
        before = 0 if self.past is None else self.past.tokens(self.at)
        return before + (position - self.at) * self.seq_len

    def tokens_in_epoch(self, position: int) -> int:
        """How many of them in the epoch that the position is in."""
        first = self.at
        if self.past is not None and self._is_rest(position):
            return self.past.tokens_in_epoch(self.at) + (position - first) * self.seq_len
        if self.past is not None:
            first += self._ends[-1]
        return (position - first) % self.num_rows * self.seq_len

    def is_read(self, position: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Whether any of each range [start, stop) of predicted tokens lies before a position in its epoch.

        A row predicts `seq_len` tokens, beginning with its second one; ranges are counted like the starts of rows.
        """
        epoch, place = self._place(position)
        if not self._is_rest(position):
            return self._touches(epoch, place, starts, stops)
        assert self.past is not None
        return self.past.is_read(self.at, starts, stops) | self._touches(epoch, place, starts, stops)

    def rest(self) -> tuple[float, bool]:
        """How many of its rows are the rest of the past epoch, and whether that is a count rather than an estimate."""
        counted = min(self._num_blocks, max(1, _MAX_COUNTED_ROWS // _BLOCK_ROWS))
        self._count(counted)
        num_places = min(counted * _BLOCK_ROWS, self.num_rows)
        return self._ends[counted - 1] * self.num_rows / num_places, counted == self._num_blocks

    def _from(self, position: int) -> list[int]:
        """The row at a position and some of those that follow it."""
        epoch, place = self._place(position)
        block, offset = divmod(place, _BLOCK_ROWS)
        if not self._is_rest(position):
            return self._block(epoch, block)[offset:]
        rows, places = self._rest(block)
        return rows[int(np.searchsorted(places, place)) :]

    def _place(self, position: int) -> tuple[int, int]:
        """(epoch, place in its permutation) of a position."""
        index = position - self.at
        if self.past is None:
            epoch, place = divmod(index, self.num_rows)
            return epoch, place
        if (block := self._rest_block(index)) is not None:
            before = self._ends[block - 1] if block else 0
            return self._first_epoch, int(self._rest(block)[1][index - before])
        epoch, place = divmod(index - self._ends[-1], self.num_rows)
        return self._first_epoch + 1 + epoch, place

    def _is_rest(self, position: int) -> bool:
        return self.past is not None and self._rest_block(position - self.at) is not None

    @property
    def _num_blocks(self) -> int:
        return -(-self.num_rows // _BLOCK_ROWS)

    def _count(self, num_blocks: int) -> None:
        """Count the rest's rows in the first blocks."""
        while len(self._ends) < num_blocks:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._rest(len(self._ends))[0]))

    def _rest_block(self, index: int) -> int | None:
        """The block of places that holds row number `index` of the rest; None where the rest has no such row."""
        while not self._ends or self._ends[-1] <= index:
            if len(self._ends) == self._num_blocks:
                return None
            self._count(len(self._ends) + 1)
        return bisect_right(self._ends, index)

    def _rest_places(self, block: int) -> tuple[list[int], np.ndarray]:
        """The rest's rows in one block of places of the epoch, and those places."""
        assert self.past is not None
        rows = np.array(self._permuted(self._first_epoch, block), dtype=np.int64)
        starts = rows * self.seq_len
        kept = ~self.past.is_read(self.at, starts, starts + self.seq_len)
        return rows[kept].tolist(), block * _BLOCK_ROWS + np.flatnonzero(kept)

    def _permuted(self, epoch: int, block: int) -> list[int]:
        """The rows at one block of an epoch's places; the last block of an epoch is shorter."""
        places = np.arange(block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, self.num_rows))
        if self.order == SEQUENTIAL:
            return places.tolist()
        return Permutation(self.num_rows, self.seed, epoch)(places).tolist()

    def _touches(self, epoch: int, place: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Whether any row that each range shares tokens with lies at a place before this one."""
        found = np.zeros(len(starts), dtype=bool)
        if not place or not len(starts):
            return found
        first, last = starts // self.seq_len, np.minimum((stops - 1) // self.seq_len, self.num_rows - 1)
        for offset in range(int((last - first).max()) + 1):
            at = np.flatnonzero(first + offset <= last)
            found[at] |= self._is_before(epoch, place, first[at] + offset)
        return found

    def _is_before(self, epoch: int, place: int, rows: np.ndarray) -> np.ndarray:
        if self.order == SEQUENTIAL:
            return rows < place
        before: np.ndarray = Permutation(self.num_rows, self.seed, epoch).inverse(rows) < place
        if self.past is not None and epoch == self._first_epoch:
            # Of the rest of an epoch only such rows were read.
            before &= ~self.past.is_read(self.at, rows * self.seq_len, (rows + 1) * self.seq_len)
        return before
