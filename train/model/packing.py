"""What the documents of a packed row see of each other: everything before, or nothing.

DeepSeek-V3 packs documents into rows without masks between them (technical report, section 4.1): `OneText`. With
`ByDocument` a row is its documents side by side and nothing more: attention stops at a document's first token,
positions count from there, and a token of another document is no target, of the head or of any prediction depth. A
depth that reads a token of the next document has no target there either, so nothing crosses a border and comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model.attention.kernels import Attend, attend_causally, attend_masked, attend_one_by_one
from train.model.cross_entropy import NO_TARGET


@dataclass(frozen=True)
class Places:
    """Where the positions of a micro-batch stand, and what each of them attends to.

    table: their rotations (rope.rotation_table), complex [S, rope / 2], or [B, S, rope / 2] where rows differ.
    documents: which document of its row each position is of, int64 [B, S]; None where rows are one text.
    """

    table: Tensor
    attend: Attend
    documents: Tensor | None = None


class Packing(Protocol):
    """How rows are made of documents, as the model sees it."""

    reads_tokens: bool
    """Whether every part of the model needs the tokens, not its two ends alone."""

    def places(self, table: Tensor, tokens: Tensor | None) -> Places:
        """Places of the S positions of `table` in rows of tokens [B, S + 1]."""
        ...

    def first(self, places: Places, num_positions: int) -> Places:
        """Places of the first positions of the same rows."""
        ...

    def labels(self, tokens: Tensor, depth: int) -> Tensor:
        """What position i predicts at a depth (0 is the head): token i + depth + 1 of tokens [B, S + 1], or NO_TARGET.

        int64 [B, S - depth].
        """
        ...


class OneText:
    """A row is one text: every position attends to all before it and predicts what comes."""

    reads_tokens = False

    def places(self, table: Tensor, tokens: Tensor | None) -> Places:
        return Places(table, attend_causally)

    def first(self, places: Places, num_positions: int) -> Places:
        return Places(places.table[:num_positions], attend_causally)

    def labels(self, tokens: Tensor, depth: int) -> Tensor:
        return tokens[:, depth + 1 :]


class ByDocument:
    """A row is documents, each ended by the token `end_of_document`, which sees and predicts its own document alone.

    one_by_one: attend in one call per document, for which the host must know their lengths: right where it holds the
    tokens itself. Otherwise one call takes a mask that all layers of a micro-batch share; it reads S² scores where the
    documents alone have fewer.
    """

    reads_tokens = True

    def __init__(self, end_of_document: int, one_by_one: bool) -> None:
        self.end_of_document, self.one_by_one = end_of_document, one_by_one

    def places(self, table: Tensor, tokens: Tensor | None) -> Places:
        assert tokens is not None
        documents = self._documents(tokens)[:, :-1]
        steps = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        starts = torch.where(_begins(documents), steps, 0).cummax(1).values
        return Places(table[steps - starts], self._attend(documents, table), documents)

    def first(self, places: Places, num_positions: int) -> Places:
        assert places.documents is not None
        table, documents = places.table[:, :num_positions], places.documents[:, :num_positions]
        return Places(table, self._attend(documents, table), documents)

    def labels(self, tokens: Tensor, depth: int) -> Tensor:
        documents = self._documents(tokens)
        crosses = documents[:, depth + 1 :] != documents[:, : -depth - 1]
        return tokens[:, depth + 1 :].masked_fill(crosses, NO_TARGET)

    def _documents(self, tokens: Tensor) -> Tensor:
        """The number of each token's document within its row: tokens [B, N] -> int64 [B, N]."""
        ends = (tokens == self.end_of_document).cumsum(1)
        return F.pad(ends[:, :-1], (1, 0))

    def _attend(self, documents: Tensor, table: Tensor) -> Attend:
        if self.one_by_one:
            return partial(attend_one_by_one, _lengths(documents))
        same = documents.unsqueeze(2) == documents.unsqueeze(1)
        # Once in the type of the scores: from booleans each layer would make its own, and keep it for the backward.
        dtype = torch.float64 if table.dtype == torch.complex128 else torch.float32
        hidden = torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill_(~same.tril_(), float("-inf"))
        return partial(attend_masked, hidden.unsqueeze(1))


def _begins(documents: Tensor) -> Tensor:
    """Whether a row or a document begins at each position: bool, as documents [B, S]."""
    return torch.cat([torch.ones_like(documents[:, :1]), documents.diff(dim=1)], 1) != 0


def _lengths(documents: Tensor) -> list[int]:
    """Positions of each document, row after row: documents [B, S] -> numbers that sum to B S."""
    starts = _begins(documents).flatten().nonzero().flatten()
    return starts.diff(append=starts.new_tensor([documents.numel()])).tolist()
