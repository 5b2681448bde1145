"""Kernels around the core of attention (`cores`): behind a cache, and the rotating of heads.

Sums and products of the rotations are float32 for bfloat16 inputs and keep float32 and float64 as they are; they are
written for few passes over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_cached(queries: Tensor, keys: Tensor, values: Tensor, num_tokens: int, scale: float) -> Tensor:
    """The last `num_tokens` N of L tokens attend to all before them and to themselves.

    queries [G, R N, qk]: for each head of keys the R heads that share it, token by token in each; keys [G, L, qk],
    values [G, L, v] -> [G, R N, v]. The queries of a group are rows of one product with its keys.
    """
    num_seen, mask = keys.shape[1], None
    if num_tokens > 1:  # a single one sees all
        seen = torch.ones(num_tokens, num_seen, dtype=torch.bool, device=keys.device).tril(num_seen - num_tokens)
        mask = seen.repeat(queries.shape[1] // num_tokens, 1)
    return F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=scale)[0]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Multiply the adjacent pairs of x [..., d] by the complex table (broadcastable to [..., d / 2]).

    Complex arithmetic is the only form of this that the CPU vectorises.
    """
    # Always a copy: a slice of one row counts as contiguous and may begin at an odd element, which no pair may.
    pairs = x.to(table.real.dtype, memory_format=torch.contiguous_format, copy=True).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2)


def join_heads_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, v_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head, from what the projections give.

    q [B, S, H, nope + rope], kv [B, S, H, nope + v], k_rope [B, S, rope] (shared by the heads), table [S, rope / 2] or
    [B, S, rope / 2] -> q, k [B, S, H, nope + rope] with the rotary parts rotated, v [B, S, H, v_width] padded with
    zeros. Kernels of GPUs may overwrite q, and give out values as a view of kv.
    """
    nope = q.shape[-1] - k_rope.shape[-1]
    v_dim = kv.shape[-1] - nope
    q_out, k_out, v_out = torch.empty_like(q), torch.empty_like(q), kv.new_empty(*kv.shape[:-1], v_width)
    q_out[..., :nope].copy_(q[..., :nope])
    q_out[..., nope:].copy_(rotate(q[..., nope:], table.unsqueeze(-2)))
    k_out[..., :nope].copy_(kv[..., :nope])
    k_out[..., nope:].copy_(rotate(k_rope, table).unsqueeze(2))
    v_out[..., :v_dim].copy_(kv[..., nope:])
    v_out[..., v_dim:].zero_()
    return q_out, k_out, v_out


def join_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, nope: int, v_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [B, S, H, nope + rope], dv [B, S, H, v_width] -> gradients of q, kv and k_rope."""
    inverse = table.conj().resolve_conj()
    dq_in = torch.empty_like(dq, memory_format=torch.contiguous_format)
    dq_in[..., :nope].copy_(dq[..., :nope])
    dq_in[..., nope:].copy_(rotate(dq[..., nope:], inverse.unsqueeze(-2)))
    dkv = dq.new_empty(*dq.shape[:-1], nope + v_dim)
    dkv[..., :nope].copy_(dk[..., :nope])
    dkv[..., nope:].copy_(dv[..., :v_dim])
    dk_rope = rotate(dk[..., nope:].sum(2, dtype=table.real.dtype), inverse).to(dk.dtype)
    return dq_in, dkv, dk_rope


class JoinHeads(torch.autograd.Function):
    """Differentiable `join_heads_forward`, by a model's kernels. Keeps the table alone.

    Kernels may rotate q, and in the backward pass dq, in place, and give out values that are a view of kv: what the
    projections have made is nobody else's, and attention alone reads it further on. They are given their inputs
    detached, so that autograd sees results of this node and neither views nor changes of its inputs.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, v_width: int, kernels: Any) -> Any:
        ctx.save_for_backward(table)
        ctx.nope = q.shape[-1] - k_rope.shape[-1]
        ctx.v_dim, ctx.kernels = kv.shape[-1] - ctx.nope, kernels
        return kernels.join_heads_forward(q.detach(), kv.detach(), k_rope, table, v_width)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        (table,) = ctx.saved_tensors
        return *ctx.kernels.join_heads_backward(dq, dk, dv, table, ctx.nope, ctx.v_dim), None, None, None


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Multiply the pairs (x[j], x[j + d/2]) of x [..., d] by the complex table (broadcastable to [..., d / 2])."""
    cos, sin = table.real, table.imag
    first, second = x.to(cos.dtype).chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    low, high = out.chunk(2, -1)
    low.copy_((first * cos).addcmul_(second, sin, value=-1))
    high.copy_((second * cos).addcmul_(first, sin))
    return out


def rotate_heads(q: Tensor, k: Tensor, table: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotate the halves of every head of q [B, S, H, d] and k [B, S, G, d] by the table [S, d / 2] or [B, S, d / 2];
    back again with `inverse`."""
    by_head = (table.conj().resolve_conj() if inverse else table).unsqueeze(-2)
    return rotate_halves(q, by_head), rotate_halves(k, by_head)


class RotateHeads(torch.autograd.Function):
    """Differentiable `rotate_heads`, by a model's kernels. Keeps the table alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, table: Tensor, kernels: Any) -> Any:
        ctx.save_for_backward(table)
        ctx.kernels = kernels
        return kernels.rotate_heads_by(q, k, table, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        (table,) = ctx.saved_tensors
        return *ctx.kernels.rotate_heads_by(dq, dk, table, True), None, None
