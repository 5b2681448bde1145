"""The core of attention: what heads mix, of queries, keys and values that are projected and rotated.

A core has two forms. `causally` is for rows that are one text; `by_document` makes, once for all layers of a
micro-batch, the form for rows whose documents see nothing of each other. Here are the protocol and what torch computes
on any device; `gpu_cores` has the kernels of GPUs, `choice` says which of them a run takes.

Queries are [B, S, H, qk], keys [B, S, G, qk] and values [B, S, G, v]; H / G heads of queries share a head of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# q [B, S, H, qk], k [B, S, G, qk], v [B, S, G, v], factor of the scores -> [B, S, H, v]; G divides H.
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Documents:
    """The documents of rows, as the host knows them and as the device does.

    numbers: which document of its row each position is of, int64 [B, S], rising.
    num_at_most: documents of all rows together, or more. longest_at_most: positions of the longest one, or more. None
        for a core that does not ask (`Core.asks_for_lengths`).
    dtype: of queries, keys and values.
    """

    numbers: Tensor
    dtype: torch.dtype
    num_at_most: int | None = None
    longest_at_most: int | None = None


class Core(Protocol):
    """Who computes attention's core."""

    name: str
    asks_for_lengths: bool
    """Whether `by_document` needs on the host how many documents there are, and how long the longest one is."""

    def value_width(self, qk_width: int, v_width: int) -> int:
        """How wide it wants a head's values, of which the last elements are then zero; so wide is its result."""
        ...

    def causally(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Every position attends to all before it and to itself. An `Attend`."""
        ...

    def by_document(self, documents: Documents) -> Attend:
        """Every position attends to those before it in its document, and to itself."""
        ...


class TorchCore:
    """torch's scaled dot product by the kernel that torch takes, in any type and on any device.

    Documents are apart by a mask [B, 1, S, S], made once for a micro-batch in the type that the layers take.
    """

    name = "torch"
    asks_for_lengths = False

    def value_width(self, qk_width: int, v_width: int) -> int:
        """The fast kernels of a CPU want equal widths; padding costs less than the kernel that takes any."""
        return max(qk_width, v_width)

    def causally(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return scaled_dot_product(q, k, v, scale, is_causal=True)

    def by_document(self, documents: Documents) -> Attend:
        numbers = documents.numbers
        same = numbers.unsqueeze(2) == numbers.unsqueeze(1)
        # Added to the scores: from booleans each layer would make its own, and keep it for the backward.
        hidden = torch.zeros(same.shape, dtype=documents.dtype, device=same.device)
        hidden.masked_fill_(~same.tril_(), float("-inf"))
        return partial(scaled_dot_product, attn_mask=hidden.unsqueeze(1))


class HostCore(TorchCore):
    """The same where the host computes itself, and so knows how long documents are: each is attended to by itself."""

    def by_document(self, documents: Documents) -> Attend:
        return partial(self._one_by_one, _lengths(documents.numbers))

    def _one_by_one(self, lengths: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Documents of these lengths, row after row."""
        parts = zip(*(each.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for each in (q, k, v)), strict=True)
        out = [self.causally(*part, scale) for part in parts]  # type: ignore[call-arg]
        return torch.cat(out, dim=1).squeeze(0).unflatten(0, q.shape[:2])


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False, attn_mask: Tensor | None = None
) -> Tensor:
    """torch's, over the layout of this file. attn_mask: as torch takes it."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    gqa = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def _lengths(numbers: Tensor) -> list[int]:
    """Positions of each document, row after row: numbers [B, S] -> lengths that sum to B S."""
    starts = begins(numbers).flatten().nonzero().flatten()
    return starts.diff(append=starts.new_tensor([numbers.numel()])).tolist()


def begins(numbers: Tensor) -> Tensor:
    """Whether a row or a document begins at each position: bool, as numbers [B, S]."""
    return torch.cat([torch.ones_like(numbers[:, :1]), numbers.diff(dim=1)], 1) != 0
