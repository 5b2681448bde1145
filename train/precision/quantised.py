"""Operands of FP8 products as Transformer Engine multiplies them, and the passes over memory that make them.

A product takes both operands with the tiles of 1 x 128 along its inner dim: rows for the forward product and the
gradient of the input, columns (the transpose, whose inner dim are tokens) for the weight gradient. Tiles of tokens
begin at the first row of each group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from train.precision.blockwise import TILE
from train.precision.engine import Activation

# Rows of a group come in multiples of it: they are the inner dim of the weight gradient's product.
ROW_MULTIPLE = 16


class Rows(NamedTuple):
    """codes [P, k] in E4M3, P rows of all groups; scales, float32 [ceil(k / 128) P], of each group in turn
    [ceil(k / 128), its rows], as the library reads them."""

    codes: Tensor
    scales: Tensor


class Columns(NamedTuple):
    """codes [k P] in E4M3, of each group in turn [k, its rows]; scales, float32 [tiles of all groups, k]."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Groups:
    """How the rows of an operand are divided.

    Attributes:
        splits: rows of each group, multiples of `ROW_MULTIPLE`.
        starts: int32 [E + 1], the first row of each group and the end, where the rows are; None for one group alone.
    """

    splits: tuple[int, ...]
    starts: Tensor | None = None

    @staticmethod
    def of(splits: list[int], device: torch.device) -> Groups:
        assert not any(length % ROW_MULTIPLE for length in splits), "rows of groups come in multiples"
        if len(splits) == 1:
            return Groups(tuple(splits))
        starts = torch.tensor([0, *accumulate(splits)], dtype=torch.int32)
        if device.type == "cuda":
            # From pinned memory: any other copy would make the host wait for the device.
            starts = starts.pin_memory().to(device, non_blocking=True)
        return Groups(tuple(splits), starts)

    @property
    def num_rows(self) -> int:
        return sum(self.splits)

    @property
    def tiles(self) -> list[int]:
        """Tiles of 128 rows, or what is left, of each group."""
        return [-(-length // TILE) for length in self.splits]

    def rows(self, operand: Rows) -> list[Rows]:
        """The rows of each group."""
        width = operand.codes.shape[1]
        num_tiles = -(-width // TILE)
        scales = operand.scales.split([num_tiles * length for length in self.splits])
        parts = zip(operand.codes.split(list(self.splits)), scales, self.splits, strict=True)
        return [Rows(codes, scales.view(num_tiles, length)) for codes, scales, length in parts]

    def columns(self, operand: Columns) -> list[Columns]:
        """The columns of each group, codes [k, rows]."""
        width = operand.scales.shape[1]
        codes = operand.codes.split([width * length for length in self.splits])
        parts = zip(codes, operand.scales.split(self.tiles), self.splits, strict=True)
        return [Columns(codes.view(width, length), scales) for codes, scales, length in parts]


class Passes(Protocol):
    """What quantises around the products: `eager_passes`, where each is told, or kernels that do each at once."""

    def encode(self, x: Tensor) -> Tensor: ...

    def take(self, payload: Tensor, source: Tensor, groups: Groups, width: int) -> Rows: ...

    def quantise_rows(self, x: Tensor, power_of_two: bool) -> Rows: ...

    def quantise(self, x: Tensor, power_of_two: bool) -> tuple[Rows, Columns]: ...

    def columns(self, rows: Rows, groups: Groups, power_of_two: bool) -> Columns: ...

    def activate(
        self, activation: Activation, h: Tensor, row_weights: Tensor | None, groups: Groups, power_of_two: bool
    ) -> tuple[Rows, Rows]: ...

    def activate_backward(
        self,
        activation: Activation,
        da: Tensor,
        kept: Rows,
        row_weights: Tensor | None,
        groups: Groups,
        power_of_two: bool,
        gradient_power_of_two: bool,
    ) -> tuple[Columns, Rows, Columns, Tensor | None]: ...
