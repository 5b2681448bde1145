"""FP8 by tiles: what quantising means here, in plain torch. `tiles` computes the same bits in fewer passes.

Technical report, section 3.3.2: E4M3 for everything; a scale for each tile of 1 x 128 of activations and gradients
(along the inner dimension of the product they enter) and for each block of 128 x 128 of weights; the scale is the
tile's own largest magnitude over the format's, found as the tensor is quantised. Tiles at an edge that is no multiple
of 128 are smaller, which is what padding with zeros comes to.

Nothing is floored: a gradient of a mean over millions of tokens lives near 1e-9. Only the exponent range of float32
itself bounds a scale from below. A tile of zeros has scale 1. A tile that holds an infinity or a NaN has scale NaN and
becomes all NaN, so that an overflow reaches the loss or the gradient norm, which stop the run, instead of saturating.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128
ROWS = (1, TILE)
COLUMNS = (TILE, 1)
BLOCKS = (TILE, TILE)
# The least normal float32: a smaller scale would lose bits of its own.
LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Format:
    """A floating-point format: its largest finite value, bits of its mantissa, exponent of its least normal value."""

    largest: float
    mantissa_bits: int
    least_exponent: int


E4M3 = Format(448.0, 3, -6)
# The report's own format for the input of the projection behind attention; here float16 with four bits cut off.
E5M6 = Format(65024.0, 6, -14)


class Quantised(NamedTuple):
    """values [..., m, n] in float8_e4m3fn and scales [..., ceil(m / a), ceil(n / b)] in float32, for tiles of a x b."""

    values: Tensor
    scales: Tensor


def scales_of(amax: Tensor, power_of_two: bool, fmt: Format = E4M3) -> Tensor:
    """Scale of tiles whose largest magnitudes are `amax` (float32): a tile's values divided by it fit the format.

    power_of_two: the least power of two that does so, found on the bits, without rounding.
    """
    if power_of_two:
        (largest,) = struct.unpack("<i", struct.pack("<f", fmt.largest))
        # A mantissa above that of the largest value carries into the exponent.
        carry = 0x7FFFFF - (largest & 0x7FFFFF)
        exponent = ((amax.view(torch.int32) + carry) >> 23) - ((largest >> 23) - 127)
        scales = (exponent.clamp_(min=1) << 23).view(torch.float32)
    else:
        # By a tensor: on a GPU, torch multiplies by the reciprocal of a number, which rounds otherwise.
        scales = (amax / amax.new_full((), fmt.largest)).clamp_(min=LEAST_SCALE)
    scales.masked_fill_(amax == 0, 1.0)
    return scales.masked_fill_(~amax.isfinite(), torch.nan)


def _tiled(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """x [..., m, n] -> float32 [..., m', a, n', b], padded with zeros to whole tiles."""
    a, b = tile
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % b, 0, -x.shape[-2] % a))
    return padded.unflatten(-1, (padded.shape[-1] // b, b)).unflatten(-3, (padded.shape[-2] // a, a))


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(-4, -3).flatten(-2, -1)[..., : shape[-2], : shape[-1]]


def quantise(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> Quantised:
    """x [..., m, n], bfloat16 or float32 -> E4M3 with one scale per tile, rounded to nearest, ties to even."""
    tiles = _tiled(x, tile)
    scales = scales_of(tiles.abs().amax((-3, -1)), power_of_two)
    values = (tiles / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return Quantised(_untiled(values, x.shape).contiguous(), scales)


def dequantise(quantised: Quantised, tile: tuple[int, int]) -> Tensor:
    """float32 [..., m, n]: each value times the scale of its tile."""
    values, scales = quantised
    return _untiled(_tiled(values, tile) * scales[..., :, None, :, None], values.shape)
