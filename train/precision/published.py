"""Weights as published FP8 checkpoints hold them: E4M3 in blocks of 128 x 128 beside `weight_scale_inv`.

DeepSeek-V3's README_WEIGHTS.md: a block times its entry of `weight_scale_inv` is the weight, which is float32 of shape
[ceil(n / 128), ceil(k / 128)]; blocks at an edge count as padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.precision.blockwise import BLOCKS, E4M3, Quantised, _tiled, _untiled, dequantise, scales_of

# The released kernels take no block's largest magnitude for less.
LEAST_AMAX = 1e-4


def from_published(values: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """values [n, k] in float8_e4m3fn, scale_inv [ceil(n / 128), ceil(k / 128)] -> the weight [n, k].

    Raises ValueError for shapes or types that are not such a pair.
    """
    expected = tuple(-(-size // 128) for size in values.shape)
    if values.dtype != torch.float8_e4m3fn or values.dim() != 2 or tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"a weight of type {values.dtype} and shape {tuple(values.shape)} with weight_scale_inv of shape "
            f"{tuple(scale_inv.shape)} is no published pair: it takes float8_e4m3fn [n, k] and one scale per block of "
            "128 x 128"
        )
    return dequantise(Quantised(values, scale_inv.float()), BLOCKS).to(dtype)


def to_published(weight: Tensor) -> Quantised:
    """weight [n, k], bfloat16 or float32 -> (values, weight_scale_inv).

    A float32 weight that was read from such a pair becomes values and scales that give every element back bit for bit:
    the division of the largest magnitude by 448 may miss the scale by its last bit, and a checkpoint with power-of-two
    scales by more, so those scales are tried first. Read as bfloat16, elements come back within one bfloat16 ulp.
    Raises ValueError for a weight that is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds infinities or NaN: it cannot be published")
    blocks = _tiled(weight, BLOCKS)
    amax = blocks.abs().amax((-3, -1)).clamp_(min=LEAST_AMAX)
    nearest = scales_of(amax, power_of_two=False)
    scales, settled = nearest, torch.zeros_like(nearest, dtype=torch.bool)
    neighbours = (nearest.view(torch.int32) + shift for shift in (0, -1, 1))
    for candidate in (*(bits.view(torch.float32) for bits in neighbours), scales_of(amax, power_of_two=True)):
        exact = (_round(blocks, candidate) == blocks).all(-1).all(-2) & ~settled
        scales, settled = torch.where(exact, candidate, scales), settled | exact
    values = (blocks / scales[:, None, :, None]).clamp_(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)
    return Quantised(_untiled(values, weight.shape).contiguous(), scales)


def _round(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [n', 128, k', 128] quantised with scales [n', k'] and dequantised."""
    each = scales[:, None, :, None]
    return (blocks / each).clamp_(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn).float() * each
