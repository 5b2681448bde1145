"""What the documents of a packed row see of each other: everything before, or nothing.

DeepSeek-V3 packs documents into rows without masks between them (technical report, section 4.1): `OneText`. With
`ByDocument` a row is its documents side by side and nothing more: attention stops at a document's first token,
positions count from there, and a token of another document is no target, of the head or of any prediction depth. A
depth that reads a token of the next document has no target there either, so nothing crosses a border and comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model.attention.cores import Attend, Core, Documents, TorchCore, begins
from train.model.cross_entropy import NO_TARGET


@dataclass(frozen=True)
class Places:
    """Where the positions of a micro-batch stand, and what each of them attends to.

    table: their rotations (rope.rotation_table), complex [S, rope / 2], or [B, S, rope / 2] where rows differ.
    documents: those of the rows; None where rows are one text.
    """

    table: Tensor
    attend: Attend
    documents: Documents | None = None


class Packing(Protocol):
    """How rows are made of documents, as the model sees it."""

    core: Core
    """Who computes attention's core."""
    reads_tokens: bool
    """Whether every part of the model needs the tokens, not its two ends alone."""

    def places(self, table: Tensor, tokens: Tensor | None, dtype: torch.dtype) -> Places:
        """Places of the S positions of `table` in rows of tokens [B, S + 1]. dtype: of queries, keys and values."""
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

    def __init__(self, core: Core | None = None) -> None:
        self.core = core or TorchCore()

    def places(self, table: Tensor, tokens: Tensor | None, dtype: torch.dtype) -> Places:
        return Places(table, self.core.causally)

    def first(self, places: Places, num_positions: int) -> Places:
        return Places(places.table[:num_positions], places.attend)

    def labels(self, tokens: Tensor, depth: int) -> Tensor:
        return tokens[:, depth + 1 :]


# Numbers of a tensor of the device's, read by the host, which waits for them.
ReadNumbers = Callable[[Tensor], list[int]]


class ByDocument:
    """A row is documents, each ended by the token `end_of_document`, which sees and predicts its own document alone.

    read: how the host reads how many documents a micro-batch has and how long the longest is, once, where the core asks
    for that. A kernel is launched for as many documents of that length: without it, for as many as there are tokens.
    """

    reads_tokens = True

    def __init__(self, end_of_document: int, core: Core | None = None, read: ReadNumbers = Tensor.tolist) -> None:
        self.end_of_document, self.core, self._read = end_of_document, core or TorchCore(), read

    def places(self, table: Tensor, tokens: Tensor | None, dtype: torch.dtype) -> Places:
        assert tokens is not None
        numbers = self._numbers(tokens)[:, :-1]
        steps = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        first = begins(numbers)
        positions = steps - torch.where(first, steps, 0).cummax(1).values
        documents = Documents(numbers, dtype)
        if self.core.asks_for_lengths:
            documents = self._measured(documents, torch.stack([first.sum(), positions.max() + 1]))
        return Places(table[positions], self.core.by_document(documents), documents)

    def first(self, places: Places, num_positions: int) -> Places:
        assert places.documents is not None
        documents = replace(places.documents, numbers=places.documents.numbers[:, :num_positions])
        return Places(places.table[:, :num_positions], self.core.by_document(documents), documents)

    def labels(self, tokens: Tensor, depth: int) -> Tensor:
        numbers = self._numbers(tokens)
        crosses = numbers[:, depth + 1 :] != numbers[:, : -depth - 1]
        return tokens[:, depth + 1 :].masked_fill(crosses, NO_TARGET)

    def _numbers(self, tokens: Tensor) -> Tensor:
        """The number of each token's document within its row: tokens [B, N] -> int64 [B, N]."""
        ends = (tokens == self.end_of_document).cumsum(1)
        return F.pad(ends[:, :-1], (1, 0))

    def _measured(self, documents: Documents, sizes: Tensor) -> Documents:
        """With their number and the length of the longest one, of which `sizes` tells; each row has one at least, so
        that a border without values may answer anything."""
        num_rows, num_positions = documents.numbers.shape
        num = max(num_rows, int((found := self._read(sizes))[0]))
        longest = max(int(found[1]), -(-num_rows * num_positions // num))
        return replace(documents, num_at_most=num, longest_at_most=longest)
