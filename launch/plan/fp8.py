"""Transformer Engine as a plan sees it: the kernels that it launches for what a run asks of it, without values.

It stands where `train.precision.transformer_engine` has the library, and answers the same calls: weights quantised in
blocks of 128 x 128, once for all micro-batches, and transposed for each backward pass; products. Experts are multiplied
by one kernel, as far as their weights are not: of them each is quantised and transposed by itself, and has its own
weight gradient. What quantises around the products are kernels of our own, which a trace sees as they are
(`kernels.operation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from train.precision.config import PrecisionConfig
from train.precision.kernel_passes import KernelPasses
from train.precision.quantised import Columns, Groups, Rows
from train.precision.transformer_engine import LibraryWeights

# The namespace of the operations below among torch's.
LIBRARY = "halocline_fp8"
TILE = 128
_SCHEMAS = (
    "quantize(Tensor weight) -> Tensor[]",
    "transpose(Tensor codes) -> Tensor",
    "multiply(Tensor a, Tensor[] b, *, Tensor(a!) out) -> Tensor(a!)",
    "multiply_add(Tensor a, Tensor b, Tensor(a!) into) -> ()",
)


def library_shapes(config: PrecisionConfig) -> LibraryWeights | None:
    """What multiplies in FP8 on a GPU with the library; None where a run there would multiply by the reference."""
    if config.name != "fp8" or config.engine == "reference" or config.is_fp8("lm_head"):
        return None
    return LibraryWeights(KernelPasses(), config.power_of_two_scales, _Shapes())


def library_sizes(name: str, operands: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(groups, m, n, k) of a product of the library."""
    a, b = operands["a"], operands["b"]
    if name == "multiply":
        return len(b), a.shape[0], operands["out"].shape[1], a.shape[1]
    n, k = operands["into"].shape
    return 1, n, k, a.shape[1]


class _Shapes:
    """The part of the library that is used."""

    def __init__(self) -> None:
        _operations()

    def quantise(self, weight: Tensor, power_of_two: bool) -> list[Tensor]:
        """Codes and their scales; a plan asks for no other values of scales."""
        kept: list[Tensor] = torch.ops.halocline_fp8.quantize(weight)
        return kept

    def with_columns(self, quantised: list[Tensor]) -> list[Tensor]:
        codes, scales = quantised
        return [codes, scales, torch.ops.halocline_fp8.transpose(codes), scales.t().contiguous()]

    def multiply(self, rows: Rows, groups: Groups, weights: Sequence[Any], out: Tensor, transposed: bool) -> None:
        torch.ops.halocline_fp8.multiply(rows.codes, [each[0] for each in weights], out=out)

    def multiply_add(self, of_dy: Sequence[Columns], of_x: Sequence[Columns], into: Sequence[Tensor]) -> None:
        for left, right, grad in zip(of_dy, of_x, into, strict=True):
            torch.ops.halocline_fp8.multiply_add(left.codes, right.codes, grad)


@lru_cache(maxsize=1)
def _operations() -> torch.library.Library:
    """Make the operations known to torch, for tensors without values alone."""
    library = torch.library.Library(LIBRARY, "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("quantize", _quantize, "Meta")
    library.impl("transpose", lambda codes: codes.new_empty(tuple(reversed(codes.shape))), "Meta")
    library.impl("multiply", lambda a, b, *, out: out, "Meta")
    library.impl("multiply_add", lambda a, b, into: None, "Meta")
    return library


def _quantize(weight: Tensor) -> list[Tensor]:
    """Values in E4M3 and scales in float32 of weight [n, k]."""
    tiles = -(-weight.shape[0] // TILE), -(-weight.shape[1] // TILE)
    codes = weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn)
    return [codes, weight.new_empty(tiles, dtype=torch.float32)]
