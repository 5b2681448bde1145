"""Ranges of global tensors, which a checkpoint consists of.

Every state is a global tensor laid flat, under its full name, and a rank owns ranges of it. A range means the same
under any layout of ranks, so any layout can load what another one has saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class FlatRange(Protocol):
    """A contiguous range of a global tensor: `tensor` is 1-D and starts at flat `offset` (elements)."""

    @property
    def offset(self) -> int: ...

    @property
    def tensor(self) -> Tensor: ...


@dataclass(frozen=True)
class HostRange:
    """A `FlatRange` with memory of its own on the CPU."""

    offset: int
    tensor: Tensor


# State name to a rank's ranges of the global tensor of that name.
Pieces = Mapping[str, Sequence[FlatRange]]


def check_ranges(pieces: Pieces, sizes: Mapping[str, int]) -> None:
    """ValueError unless every piece is 1-D and lies inside its global tensor of `sizes[name]` elements."""
    for name, parts in pieces.items():
        for part in parts:
            last = part.offset + part.tensor.numel()
            if part.tensor.dim() != 1 or part.offset < 0 or last > sizes[name]:
                raise ValueError(
                    f"{name}: a piece of shape {list(part.tensor.shape)} at {part.offset} is not a range of its "
                    f"{sizes[name]} elements"
                )
