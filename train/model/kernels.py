"""Elementwise kernels with their own backward: RMSNorm, SwiGLU, the joining and the rotating of attention heads.

Each is a pair of pure functions wrapped in an autograd Function. Sums and products inside are float32 for bfloat16
inputs and keep float32 and float64 as they are. They are written for few passes over memory; where the last pass may
overwrite its own temporary, it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train.precision.grads import wide_dtype


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., d] -> (x r weight, r [..., 1]) with r = 1 / sqrt(mean(x²) + eps)."""
    wide = x.to(wide_dtype(x.dtype))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(wide, scale).mul_(weight).to(x.dtype), scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [..., d], dweight [d]) from dy, the forward's inputs and its `scale` r."""
    width = x.shape[-1]
    dy, wide, weight = dy.to(scale.dtype), x.to(scale.dtype), weight.to(scale.dtype)
    product = (dy * wide).view(-1, width)
    mean = (product @ weight).view_as(scale).mul_(scale.pow(3)).div_(-width)
    dweight = scale.view(1, -1) @ product
    dx = torch.mul(dy, weight).mul_(scale).addcmul_(wide, mean)
    return dx.to(x.dtype), dweight.view(width)


def swiglu_forward(h: Tensor, row_weights: Tensor | None) -> Tensor:
    """h = [gate | up] [R, 2f] -> silu(gate) up [R, f], each row times its weight [R] if there are weights."""
    gate, up = h.to(wide_dtype(h.dtype)).chunk(2, -1)
    out = F.silu(gate).mul_(up)
    if row_weights is not None:
        out.mul_(row_weights.unsqueeze(-1))
    return out.to(h.dtype)


def swiglu_backward(da: Tensor, h: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(forward's output a, dh [R, 2f], d_row_weights [R] or None) from da [R, f]; a is recomputed, not stored."""
    gate, up = h.to(wide_dtype(h.dtype)).chunk(2, -1)
    da = da.to(gate.dtype)
    silu = F.silu(gate)
    a = silu * up
    d_row_weights = None
    if row_weights is not None:
        d_row_weights = torch.linalg.vecdot(da, a).to(row_weights.dtype)
        column = row_weights.unsqueeze(-1)
        a.mul_(column)
        da = da * column
    dh = torch.empty_like(h)
    d_gate, d_up = dh.chunk(2, -1)
    torch.mul(silu, da, out=d_up)
    torch.ops.aten.silu_backward(da * up, gate, grad_input=d_gate)
    return a.to(h.dtype), dh, d_row_weights


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Multiply the adjacent pairs of x [..., d] by the complex table (broadcastable to [..., d / 2]).

    Complex arithmetic is the only form of this that the CPU vectorises.
    """
    # Always a copy: a slice of one row counts as contiguous and may begin at an odd element, which no pair may.
    pairs = x.to(table.real.dtype, memory_format=torch.contiguous_format, copy=True).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2)


class _JoinHeads(torch.autograd.Function):
    """See `join_heads`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, v_width: int) -> Any:
        nope = q.shape[-1] - k_rope.shape[-1]
        v_dim = kv.shape[-1] - nope
        ctx.save_for_backward(table)
        ctx.nope, ctx.v_dim = nope, v_dim
        q_out, k_out, v_out = torch.empty_like(q), torch.empty_like(q), kv.new_empty(*kv.shape[:-1], v_width)
        q_out[..., :nope].copy_(q[..., :nope])
        q_out[..., nope:].copy_(rotate(q[..., nope:], table.unsqueeze(1)))
        k_out[..., :nope].copy_(kv[..., :nope])
        k_out[..., nope:].copy_(rotate(k_rope, table).unsqueeze(2))
        v_out[..., :v_dim].copy_(kv[..., nope:])
        v_out[..., v_dim:].zero_()
        return q_out, k_out, v_out

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        (table,) = ctx.saved_tensors
        nope, v_dim = ctx.nope, ctx.v_dim
        inverse = table.conj().resolve_conj()
        dq_in = torch.empty_like(dq, memory_format=torch.contiguous_format)
        dq_in[..., :nope].copy_(dq[..., :nope])
        dq_in[..., nope:].copy_(rotate(dq[..., nope:], inverse.unsqueeze(1)))
        dkv = dq.new_empty(*dq.shape[:-1], nope + v_dim)
        dkv[..., :nope].copy_(dk[..., :nope])
        dkv[..., nope:].copy_(dv[..., :v_dim])
        dk_rope = rotate(dk[..., nope:].sum(2, dtype=table.real.dtype), inverse).to(dk.dtype)
        return dq_in, dkv, dk_rope, None, None


def join_heads(q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, v_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head, from what the projections give.

    q [B, S, H, nope + rope], kv [B, S, H, nope + v], k_rope [B, S, rope] (shared by the heads), table
    [S, rope / 2] -> q, k [B, S, H, nope + rope] with the rotary parts rotated, v [B, S, H, v_width] padded with zeros.
    """
    return _JoinHeads.apply(q, kv, k_rope, table, v_width)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Multiply the pairs (x[j], x[j + d/2]) of x [..., d] by the complex table (broadcastable to [..., d / 2])."""
    cos, sin = table.real, table.imag
    first, second = x.to(cos.dtype).chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, -1)
    low.copy_((first * cos).addcmul_(second, sin, value=-1))
    high.copy_((second * cos).addcmul_(first, sin))
    return out


class _RotateHeads(torch.autograd.Function):
    """See `rotate_heads`. Keeps the table alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, table: Tensor) -> Any:
        ctx.save_for_backward(table)
        by_head = table.unsqueeze(1)
        return rotate_halves(q, by_head), rotate_halves(k, by_head)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        (table,) = ctx.saved_tensors
        inverse = table.conj().resolve_conj().unsqueeze(1)
        return rotate_halves(dq, inverse), rotate_halves(dk, inverse), None


def rotate_heads(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the halves of every head of q [B, S, H, d] and k [B, S, G, d] by the table [S, d / 2]."""
    return _RotateHeads.apply(q, k, table)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        y, scale = kernels.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        dx, dweight = ctx.kernels.rms_norm_backward(dy, x, weight, scale)
        return dx, dweight.to(weight.dtype), None, None


class Kernels:
    """The elementwise kernels a model runs: as written, or compiled by torch (needs a C++ compiler on CPU)."""

    def __init__(self, compile: bool = False) -> None:
        # Rows per expert change with every batch: one dynamic kernel instead of one for each count.
        wrap: Callable[[Any], Any] = partial(torch.compile, dynamic=True) if compile else lambda kernel: kernel
        self.rms_norm_forward = wrap(rms_norm_forward)
        self.rms_norm_backward = wrap(rms_norm_backward)
        self.swiglu_forward = wrap(swiglu_forward)
        self.swiglu_backward = wrap(swiglu_backward)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Differentiable x [..., d] -> x / sqrt(mean(x²) + eps) * weight."""
        return _RMSNorm.apply(x, weight, eps, self)
