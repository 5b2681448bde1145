"""The engine of fp8 on any device: products with the numerics of FP8 hardware.

Operands are rounded to E4M3 by tile or block, dequantised, and multiplied in float32 by one ordinary product. Tensor
cores that accumulate in few bits and are promoted every 128 elements, as the report has it, differ from that by far
less than the rounding of the operands does (benchmarks/fp8_error.py models them; docs/fp8.md has the numbers). Results
have the type of the weights; gradients of weights stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from train.precision import tiles
from train.precision.codec import Fp8Rows
from train.precision.coded import parts_of
from train.precision.config import Fp8
from train.precision.engine import Products, spans
from train.precision.tiles import Kept, keep_rows_e5m6, restore_rows_e5m6


class Rounding(Protocol):
    """Who rounds to E4M3: `tiles`, where each of these is told, or the same compiled."""

    def round_rows(self, x: Tensor, power_of_two: bool = False) -> Tensor: ...

    def keep_rows(self, x: Tensor, power_of_two: bool = False) -> Kept: ...

    def enter_rows(self, x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Kept]: ...

    def restore_rows(self, kept: Kept) -> Tensor: ...

    def round_group_columns(self, x: Tensor, groups: Sequence[slice], power_of_two: bool = False) -> list[Tensor]: ...

    def round_blocks(self, weight: Tensor, power_of_two: bool = False, out: Tensor | None = None) -> Tensor: ...


class QuantisedWeights:
    """Weights rounded in blocks of 128 x 128, made when first used and used until they are told to have changed.

    One dequantised copy serves the forward product and the gradient of the input: a block is its own transpose's.
    """

    def __init__(self, power_of_two: bool = False, rounding: Rounding = tiles) -> None:
        """power_of_two: for all scales of weights. rounding: who rounds, for the engines of these weights too."""
        self.rounding = rounding
        self._power_of_two = power_of_two
        self._rounded: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._is_current: set[int] = set()

    def of(self, weight: Tensor) -> Tensor:
        """weight [..., n, k] -> float32, the same shape."""
        key = id(weight)
        found = self._rounded.get(key)
        # The count of in-place changes does not see those made through a flat buffer: `changed` says them.
        if found is None or key not in self._is_current or found[1] != weight._version:
            out = found[2] if found and (found[2].shape, found[2].device) == (weight.shape, weight.device) else None
            rounded = self.rounding.round_blocks(weight.detach(), self._power_of_two, out)
            found = self._rounded[key] = weight, weight._version, rounded
            self._is_current.add(key)
        return found[2]

    def changed(self) -> None:
        """An optimizer has stepped, or a checkpoint was read: weights are rounded anew when next used.

        Into the memory that they have had, which the system would have to fill with zeros if it were new.
        """
        self._is_current.clear()


class Fp8Engine(Products):
    """Fprop and Dgrad on tiles of 1 x 128, Wgrad on tiles of 128 x 1 (tokens), weights in blocks of 128 x 128.

    Rows that come coded (`codec.Fp8Rows`), inputs and gradients, are not rounded again.
    """

    def __init__(self, fp8: Fp8, weights: QuantisedWeights, power_of_two: bool = False) -> None:
        """power_of_two: for all scales of inputs and gradients, whatever `fp8` says."""
        self._fp8, self._weights, self._rounding = fp8, weights, weights.rounding
        self._round_input = fp8.round_input or power_of_two
        self._round_gradient = fp8.round_gradient or power_of_two

    def operand(self, x: Tensor) -> Tensor:
        return self._rounded(x, self._round_input)

    def _rounded(self, x: Tensor, power_of_two: bool) -> Tensor:
        """x [..., k], rounded and not coded or coded already -> float32."""
        parts = parts_of(x)
        return self._rounding.round_rows(x, power_of_two) if parts is None else self._rounding.restore_rows(parts)

    def keep(self, x: Tensor) -> Kept:
        parts = parts_of(x)
        if parts is not None:
            return parts
        return self._rounding.keep_rows(x, self._round_input) if self._fp8.keep == "e4m3" else keep_rows_e5m6(x)

    def enter(self, x: Tensor) -> tuple[Tensor, Kept]:
        if self._fp8.keep == "e4m3" and parts_of(x) is None:
            return self._rounding.enter_rows(x, self._round_input)
        # Another format is kept of another rounding; coded rows are kept as they are.
        return self.operand(x), self.keep(x)

    def operand_of_kept(self, kept: Kept) -> Tensor:
        assert self._fp8.keep == "e4m3", "what is kept in another format was not multiplied"
        return self._rounding.restore_rows(kept)

    def restore(self, kept: Kept) -> Tensor:
        return self._rounding.restore_rows(kept) if self._fp8.keep == "e4m3" else restore_rows_e5m6(kept)

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(operand, self._weights.of(weight).t()).to(weight.dtype)

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(self.gradient_operand(dy), self._weights.of(weight)).to(weight.dtype)

    def gradient_operand(self, dy: Tensor) -> Tensor:
        """dy [T, n] as `dgrad` multiplies it."""
        return self._rounded(dy, self._round_gradient)

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        self.add_products_([accumulator], self.received(dy), x, [slice(0, len(dy))])

    def grouped(self, splits: list[int]) -> Products:
        return Fp8Groups(self, self._weights, splits)

    def codec(self, width: int) -> Fp8Rows:
        return Fp8Rows(width)

    def received(self, dy: Tensor) -> Tensor:
        """The gradient dy [T, n] of which the weight gradient makes its columns."""
        return self._rounded(dy, self._round_gradient) if self._fp8.round_gradient else dy

    def add_products_(self, accumulators: Sequence[Tensor], dy: Tensor, x: Tensor, groups: Sequence[slice]) -> None:
        """accumulators[i] [n, k] += dyᵀ x of the rows of group i, both in columns."""
        columns = zip(self.gradient_columns(dy, groups), self.input_columns(x, groups), strict=True)
        for accumulator, (of_dy, of_x) in zip(accumulators, columns, strict=True):
            accumulator.addmm_(of_dy.t(), of_x)

    def gradient_columns(self, dy: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        """The rows of dy [T, n] of each group as the weight gradient multiplies them."""
        return self._rounding.round_group_columns(dy, groups, self._round_gradient)

    def input_columns(self, x: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        """The rows of x [T, k] of each group as the weight gradient multiplies them."""
        return self._rounding.round_group_columns(x, groups, self._round_input)


class Fp8Groups(Products):
    """Group by group; tiles of rows know nothing of groups, and no tile of tokens reaches from one into the next."""

    def __init__(self, engine: Fp8Engine, weights: QuantisedWeights, splits: list[int]) -> None:
        self._engine, self._weights, self._spans = engine, weights, spans(splits)

    def operand(self, x: Tensor) -> Tensor:
        return self._engine.operand(x)

    def keep(self, x: Tensor) -> Kept:
        return self._engine.keep(x)

    def enter(self, x: Tensor) -> tuple[Tensor, Kept]:
        return self._engine.enter(x)

    def operand_of_kept(self, kept: Kept) -> Tensor:
        return self._engine.operand_of_kept(kept)

    def restore(self, kept: Kept) -> Tensor:
        return self._engine.restore(kept)

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return self._product(operand, self._weights.of(weight).transpose(1, 2)).to(weight.dtype)

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self._product(self._engine.gradient_operand(dy), self._weights.of(weight)).to(weight.dtype)

    def _product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        for e, where in self._spans:
            torch.mm(rows[where], matrices[e], out=out[where])
        return out

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        experts, groups = [e for e, _ in self._spans], [where for _, where in self._spans]
        self._engine.add_products_([accumulator[e] for e in experts], self._engine.received(dy), x, groups)

    def grouped(self, splits: list[int]) -> Products:
        return self._engine.grouped(splits)
