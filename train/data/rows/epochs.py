"""Rows of tokens for training: an endless stream of epochs over the packed documents of one split."""

from __future__ import annotations

import functools

import numpy as np
import torch

from train.data.rows.permutation import Permutation
from train.data.rows.tokens import DocumentSpan, Tokens

ORDERS = ("shuffled", "sequential")
# Positions are permuted this many at a time and the last results kept: a micro-batch asks for only a few.
_BLOCK_ROWS = 1024


class Rows:
    """The split's stream of tokens cut into rows: row i is tokens [i * seq_len, i * seq_len + seq_len + 1).

    Neighbouring rows share one token, so every token but the stream's first is predicted once an epoch (those after
    the last whole row excepted). Position p of the endless stream is in epoch p // num_rows; with order "shuffled"
    each epoch is its own permutation, drawn by (seed, epoch). Nothing here has a state: which rows a step reads is a
    function of (seed, position) alone.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, seed: int = 0, order: str = "shuffled", document_mask: bool = False
    ) -> None:
        """document_mask: whether the first token of a document is no target of the one before it.

        Raises ValueError when the split is too short for one row.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")
        if order not in ORDERS:
            raise ValueError(f"order={order} must be one of {', '.join(ORDERS)}")
        self.num_rows = (tokens.num_tokens - 1) // seq_len
        if self.num_rows < 1:
            raise ValueError(
                f"seq_len={seq_len} needs at least {seq_len + 1} tokens, and the {tokens.split} split of "
                f"{tokens.folder} holds {tokens.num_tokens}: use more text, a larger share or a shorter seq_len"
            )
        self.tokens, self.seq_len, self.seed, self.order = tokens, seq_len, seed, order
        self.document_mask = document_mask
        self._block = functools.lru_cache(maxsize=4)(self._permuted)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows at positions [first, first + count) of the endless stream: int64 [count, seq_len + 1].

        Inputs are `[:, :-1]`, labels `[:, 1:]`.
        """
        seq_len, copy = self.seq_len, self.tokens.copy
        indices = self.indices(first, count)
        out = np.empty((count, seq_len + 1), dtype=np.int64)
        for row, index in zip(out, indices, strict=True):
            copy(index * seq_len, row)
        return torch.from_numpy(out)

    def num_targets(self, first: int, count: int) -> int:
        """How many tokens the rows at positions [first, first + count) have to predict.

        From the table of documents, without reading a token, so that every rank can ask for the whole batch.
        """
        if not self.document_mask:
            return count * self.seq_len
        starts = np.array(self.indices(first, count), dtype=np.int64) * self.seq_len
        return count * self.seq_len - self.tokens.num_ends(starts, starts + self.seq_len)

    def indices(self, first: int, count: int) -> list[int]:
        """Which rows of the split lie at positions [first, first + count): `count` numbers below num_rows."""
        if first < 0 or count < 0:
            raise ValueError(f"first={first} and count={count} must not be negative")
        found: list[int] = []
        while True:
            epoch, place = divmod(first + len(found), self.num_rows)
            block, offset = divmod(place, _BLOCK_ROWS)
            found += self._block(epoch, block)[offset : offset + count - len(found)]
            if len(found) == count:
                return found

    def _permuted(self, epoch: int, block: int) -> list[int]:
        """The rows at one block of an epoch's places; the last block of an epoch is shorter."""
        places = np.arange(block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, self.num_rows))
        return (Permutation(self.num_rows, self.seed, epoch)(places) if self.order == "shuffled" else places).tolist()

    def documents(self, position: int) -> list[DocumentSpan]:
        """The documents that the row at this position is cut from: to find the text behind a bad step."""
        start = self.indices(position, 1)[0] * self.seq_len
        return self.tokens.documents(start, start + self.seq_len + 1)
