"""The quantisers of `blockwise` as training runs them: values rounded in float32, in few passes and without padding.

A matrix product of quantised operands needs their dequantised values, not their bytes; bytes are made only of what is
kept for the backward pass. Rounding to a format is adding and subtracting a constant that leaves the format's bits.
Every function takes bfloat16 or float32, contiguous or not, and any size, zero too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from train.precision.blockwise import E4M3, E5M6, TILE, Format, scales_of

Kept = tuple[Tensor, ...]


def round_to(x: Tensor, fmt: Format) -> Tensor:
    """float32 x, at most the format's largest in magnitude -> nearest value of the format, ties to even. Overwrites x.

    1.5 * 2^(e + 23 - bits), for x of exponent e, moves what the format has no bits for out of the mantissa.
    """
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_(min=(127 + fmt.least_exponent) << 23)
    magic = exponent.add_(((23 - fmt.mantissa_bits) << 23) | 0x400000).view(torch.float32)
    return x.add_(magic).sub_(magic)


def _spans(size: int, width: int = TILE) -> list[tuple[slice, int]]:
    """A dim of `size` as runs of whole tiles and the rest: (where, width of its tiles)."""
    whole = size // width * width
    spans = [(slice(0, whole), width), (slice(whole, size), size - whole)]
    return [(where, each) for where, each in spans if where.stop > where.start]


def _rows(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """x [..., k] by runs of tiles along k: (columns, float32 view or copy [..., tiles, width])."""
    for where, width in _spans(x.shape[-1]):
        yield where, x[..., where].float().unflatten(-1, (-1, width))


def _scales(tiles: Tensor, dims: int | tuple[int, ...], power_of_two: bool, fmt: Format = E4M3) -> Tensor:
    if not tiles.numel():
        return tiles.new_ones([1 if dim == dims else size for dim, size in enumerate(tiles.shape, -tiles.dim())])
    return scales_of(tiles.abs().amax(dims, keepdim=True), power_of_two, fmt)


def round_rows(x: Tensor, power_of_two: bool = False) -> Tensor:
    """x [..., k] -> float32 [..., k]: quantised in tiles of 1 x 128 and dequantised."""
    out = torch.empty(x.shape, device=x.device)
    for where, tiles in _rows(x):
        scales = _scales(tiles, -1, power_of_two)
        torch.mul(round_to(tiles / scales, E4M3), scales, out=out[..., where].unflatten(-1, (-1, tiles.shape[-1])))
    return out


def round_columns(x: Tensor, power_of_two: bool = False) -> Tensor:
    """x [T, k] -> float32 [T, k]: quantised in tiles of 128 x 1 and dequantised."""
    out = torch.empty(x.shape, device=x.device)
    for where, width in _spans(x.shape[0]):
        tiles = x[where].float().unflatten(0, (-1, width))
        scales = _scales(tiles, -2, power_of_two)
        torch.mul(round_to(tiles / scales, E4M3), scales, out=out[where].unflatten(0, (-1, width)))
    return out


def round_blocks(weight: Tensor, power_of_two: bool = False) -> Tensor:
    """weight [..., n, k] -> float32, the same shape: quantised in blocks of 128 x 128 and dequantised."""
    out = torch.empty(weight.shape, device=weight.device)
    for rows, height in _spans(weight.shape[-2]):
        for columns, width in _spans(weight.shape[-1]):
            place = (..., rows, columns)
            blocks = weight[place].float().unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
            scales = scales_of(blocks.abs().amax((-3, -1), keepdim=True), power_of_two)
            view = out[place].unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
            torch.mul(round_to(blocks / scales, E4M3), scales, out=view)
    return out


def keep_rows(x: Tensor, power_of_two: bool = False) -> Kept:
    """x [..., k] -> (E4M3 values [..., k], scales [..., ceil(k / 128)]): 1 + 4 / 128 bytes an element."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = []
    for where, tiles in _rows(x):
        scales.append(_scales(tiles, -1, power_of_two))
        values[..., where] = (tiles / scales[-1]).to(values.dtype).flatten(-2)
    return values, _joined(scales, x)


def restore_rows(kept: Kept) -> Tensor:
    """What `keep_rows` kept, as float32 [..., k].

    Through float16, whose bits are E4M3's with another bias: several times faster than torch's own widening on a CPU.
    """
    values, scales = kept
    # The sign, copied by the widening, ends in the two highest bits; the second belongs to the exponent.
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return _times(bits.view(torch.float16).float(), scales * 256)


def keep_rows_e5m6(x: Tensor) -> Kept:
    """x [..., k] -> (sign, exponent and 2 bits [..., k], 4 bits [..., ceil(k / 2)], scales): 1.5 + 4 / 128 bytes each.

    Scales are powers of two. The report names the format and not how it is stored.
    """
    bits = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    scales = []
    for where, tiles in _rows(x):
        scales.append(_scales(tiles, -1, True, E5M6))
        bits[..., where] = round_to(tiles / scales[-1], E5M6).half().view(torch.int16).flatten(-2)
    low = torch.nn.functional.pad((bits >> 4) & 15, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return (bits >> 8).to(torch.uint8), (low[..., 0] | (low[..., 1] << 4)).to(torch.uint8), _joined(scales, x)


def restore_rows_e5m6(kept: Kept) -> Tensor:
    """What `keep_rows_e5m6` kept, as float32 [..., k]."""
    high, pairs, scales = kept
    low = torch.stack(((pairs & 15) << 4, pairs & 240), -1).flatten(-2)[..., : high.shape[-1]]
    bits = (high.to(torch.int16) << 8) | low
    return _times(bits.view(torch.float16).float(), scales)


def _joined(scales: list[Tensor], x: Tensor) -> Tensor:
    """Scales [..., tiles, 1] of the runs of a row -> [..., all tiles]."""
    return torch.cat(scales, -2).squeeze(-1) if scales else x.new_ones((*x.shape[:-1], 0), dtype=torch.float32)


def _times(x: Tensor, scales: Tensor) -> Tensor:
    """x [..., k] times the scale of each tile [..., ceil(k / 128)], in place."""
    for where, width in _spans(x.shape[-1]):
        first = where.start // TILE
        tiles = x[..., where].unflatten(-1, (-1, width))
        tiles.mul_(scales[..., first : first + tiles.shape[-2], None])
    return x
