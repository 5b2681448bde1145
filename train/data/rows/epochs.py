"""Rows of tokens for training: an endless stream of epochs over the packed documents of one split."""

from __future__ import annotations

import numpy as np
import torch

from train.data.rows.cut import ORDERS, Cut
from train.data.rows.tokens import DocumentSpan, Tokens


class Rows:
    """The split's stream of tokens cut into rows: row i is tokens [i * seq_len, i * seq_len + seq_len + 1).

    Neighbouring rows share one token, so every token but the stream's first is predicted once an epoch (those after
    the last whole row excepted). Position p of the endless stream is in epoch p // num_rows; with order "shuffled"
    each epoch is its own permutation, drawn by (seed, epoch). Nothing here has a state: which rows a step reads is a
    function of (seed, position) alone.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        seed: int = 0,
        order: str = "shuffled",
        document_mask: bool = False,
        cut: Cut | None = None,
    ) -> None:
        """document_mask: whether the first token of a document is no target of the one before it.

        cut: in which order rows are read, where a run before has read some of them.

        Raises ValueError when the split is too short for one row.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len} must be at least 1")
        if order not in ORDERS:
            raise ValueError(f"order={order} must be one of {', '.join(ORDERS)}")
        self.cut = cut or Cut(tokens.num_tokens, seq_len, seed, order)
        self.num_rows = self.cut.num_rows
        if self.num_rows < 1:
            raise ValueError(
                f"seq_len={seq_len} needs at least {seq_len + 1} tokens, and the {tokens.split} split of "
                f"{tokens.folder} holds {tokens.num_tokens}: use more text, a larger share or a shorter seq_len"
            )
        self.tokens, self.seq_len, self.seed, self.order = tokens, seq_len, seed, order
        self.document_mask = document_mask

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
        return self.cut.indices(first, count)

    def documents(self, position: int) -> list[DocumentSpan]:
        """The documents that the row at this position is cut from: to find the text behind a bad step."""
        start = self.indices(position, 1)[0] * self.seq_len
        return self.tokens.documents(start, start + self.seq_len + 1)
