"""The quantisers of `blockwise` as training runs them: values rounded in float32, in few passes and without padding.

A matrix product of quantised operands needs their dequantised values, not their bytes; bytes are made only of what is
kept for the backward pass. Rounding to a format is adding and subtracting a constant that leaves the format's bits.
Every function takes bfloat16 or float32, contiguous or not, and any size, zero too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

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


def _scales(tiles: Tensor, dims: int | tuple[int, ...], power_of_two: bool, fmt: Format = E4M3) -> Tensor:
    if not tiles.numel():
        return tiles.new_ones([1 if dim == dims else size for dim, size in enumerate(tiles.shape, -tiles.dim())])
    # Two reductions make no tensor of the size of `tiles`, as taking magnitudes first would.
    amax = torch.maximum(tiles.amax(dims, keepdim=True), tiles.amin(dims, keepdim=True).neg_())
    return scales_of(amax, power_of_two, fmt)


def _over_scales(
    tiles: Tensor, dims: int | tuple[int, ...], power_of_two: bool, fmt: Format = E4M3
) -> tuple[Tensor, Tensor]:
    """(tiles over their scales, a float32 tensor of its own; the scales). A copy made to widen is used up."""
    wide = tiles.float()
    scales = _scales(wide, dims, power_of_two, fmt)
    return wide / scales if wide is tiles else wide.div_(scales), scales


def _scaled_rows(x: Tensor, power_of_two: bool = False, fmt: Format = E4M3) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """x [..., k] by runs of tiles along k: (columns, tiles over their scales [..., tiles, width], scales)."""
    for where, width in _spans(x.shape[-1]):
        yield where, *_over_scales(x[..., where].unflatten(-1, (-1, width)), -1, power_of_two, fmt)


def _widen(values: Tensor) -> Tensor:
    """E4M3 values -> float32, each 2^-8 of the value.

    Through float16, whose bits are E4M3's with another bias: several times faster than torch's own widening on a CPU.
    """
    # The sign, copied by the widening, ends in the two highest bits; the second belongs to the exponent.
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).float()


def _round_into(out: Tensor, scaled: Tensor, scales: Tensor) -> None:
    """Fill `out`, float32, with what E4M3 has for tiles that are `scaled` over their scales.

    By way of the bytes: fewer of them pass through memory than with arithmetic that rounds in float32.
    """
    torch.mul(_widen(scaled.to(torch.float8_e4m3fn)), scales * 256, out=out)


def round_rows(x: Tensor, power_of_two: bool = False) -> Tensor:
    """x [..., k] -> float32 [..., k]: quantised in tiles of 1 x 128 and dequantised."""
    return restore_rows(keep_rows(x, power_of_two))


def round_columns(x: Tensor, power_of_two: bool = False) -> Tensor:
    """x [T, k] -> float32 [T, k]: quantised in tiles of 128 x 1 and dequantised."""
    return round_group_columns(x, [slice(0, len(x))], power_of_two)[0]


def round_group_columns(x: Tensor, groups: Sequence[slice], power_of_two: bool = False) -> list[Tensor]:
    """The rows of x [T, k] that each group has, as `round_columns` makes them of those rows alone.

    All groups are rounded together, padded with zeros to whole tiles: with one group at a time, a step of many small
    experts would spend its time on starting operations.
    """
    lengths = [rows.stop - rows.start for rows in groups]
    height = max(1, min(TILE, max(lengths, default=0)))
    ends = list(accumulate(-(-length // height) * height for length in lengths))
    out = torch.empty((ends[-1] if ends else 0, x.shape[1]), device=x.device)
    found = []
    for rows, length, start, end in zip(groups, lengths, [0, *ends], ends, strict=False):
        found.append(out[start : start + length].copy_(x[rows]))
        out[start + length : end].zero_()
    tiles = out.unflatten(0, (-1, height))
    scales = _scales(tiles, -2, power_of_two)
    _round_into(tiles, tiles.div_(scales), scales)
    return found


def round_blocks(weight: Tensor, power_of_two: bool = False, out: Tensor | None = None) -> Tensor:
    """weight [..., n, k] -> float32, the same shape: quantised in blocks of 128 x 128 and dequantised.

    out: where the result goes; new memory without it.
    """
    out = torch.empty(weight.shape, device=weight.device) if out is None else out
    for rows, height in _spans(weight.shape[-2]):
        for columns, width in _spans(weight.shape[-1]):
            place = (..., rows, columns)
            blocks = weight[place].unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
            view = out[place].unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
            _round_into(view, *_over_scales(blocks, (-3, -1), power_of_two))
    return out


def keep_rows(x: Tensor, power_of_two: bool = False) -> Kept:
    """x [..., k] -> (E4M3 values [..., k], scales [..., ceil(k / 128)]): 1 + 4 / 128 bytes an element."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = []
    for where, tiles, of_tiles in _scaled_rows(x, power_of_two):
        values[..., where].copy_(tiles.flatten(-2))
        scales.append(of_tiles)
    return values, _joined(scales, x)


def enter_rows(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Kept]:
    """(`round_rows`, `keep_rows`) of x, whose values and scales are found once."""
    kept = keep_rows(x, power_of_two)
    return restore_rows(kept), kept


def restore_rows(kept: Kept) -> Tensor:
    """What `keep_rows` kept, as float32 [..., k]."""
    values, scales = kept
    return _times(_widen(values), scales * 256)


def keep_rows_e5m6(x: Tensor) -> Kept:
    """x [..., k] -> (sign, exponent and 2 bits [..., k], 4 bits [..., ceil(k / 2)], scales): 1.5 + 4 / 128 bytes each.

    Scales are powers of two. The report names the format and not how it is stored.
    """
    bits = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    scales = []
    for where, tiles, of_tiles in _scaled_rows(x, True, E5M6):
        bits[..., where] = round_to(tiles, E5M6).half().view(torch.int16).flatten(-2)
        scales.append(of_tiles)
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
