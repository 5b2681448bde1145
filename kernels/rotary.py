"""Rotary embedding of all heads of a token in one launch: the kernels of `train.model.attention.kernels`.

`join_heads` is what latent attention has between its up-projections and its core. It moves what must move: queries, and
their gradient, are rotated where they lie, values stay where their projection wrote them, keys alone are put together.
The gradient of the rotary part of the keys, which all heads share, is summed in the order of the heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two

# Heads that a program works on at a time.
_HEADS = 16


@jit
def _turn(x, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The adjacent pairs of x [ROWS, WIDTH], each turned by its angle [WIDTH / 2]."""
    first, second = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    turned = tl.join(first * cos[None, :] - second * sin[None, :], first * sin[None, :] + second * cos[None, :])
    return tl.reshape(turned, (ROWS, WIDTH))


@jit
def _angles(Table, t_batch, t_token, batch, token, half, HALF: tl.constexpr):
    """Cosines and sines [HALF] of a token, which lie beside each other."""
    pairs = tl.arange(0, HALF)
    places = Table + batch * t_batch + token * t_token + 2 * pairs
    return tl.load(places, mask=pairs < half, other=1.0), tl.load(places + 1, mask=pairs < half, other=0.0)


@jit
def _join(
    Q, KV, KRope, Table, KOut, VOut,
    q_batch, q_token, q_head, kv_batch, kv_token, kv_head, r_batch, r_token, t_batch, t_token,
    num_tokens, num_heads, nope, rope, v_dim, v_width,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, PADS: tl.constexpr,
):  # fmt: skip
    batch, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = batch * num_tokens + token
    kind = Table.dtype.element_ty
    narrow = Q.dtype.element_ty
    cos, sin = _angles(Table, t_batch, t_token, batch, token, rope // 2, ROPE // 2)
    low, turned, values = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    shared = tl.load(KRope + batch * r_batch + token * r_token + turned, mask=turned < rope, other=0.0).to(kind)
    key = _turn(tl.reshape(shared, (1, ROPE)), cos, sin, 1, ROPE).to(narrow)
    Q += batch * q_batch + token * q_token + nope
    KV += batch * kv_batch + token * kv_token
    for first in range(0, num_heads, HEADS):
        heads = first + tl.arange(0, HEADS)
        there = (heads < num_heads)[:, None]
        out = KOut + (row * num_heads + heads)[:, None] * (nope + rope)
        inside = there & (low < nope)[None, :]
        k = tl.load(KV + heads[:, None] * kv_head + low[None, :], mask=inside, other=0.0)
        tl.store(out + low[None, :], k, mask=inside)
        inside = there & (turned < rope)[None, :]
        queries = Q + heads[:, None] * q_head + turned[None, :]
        q = tl.load(queries, mask=inside, other=0.0).to(kind)
        tl.store(queries, _turn(q, cos, sin, HEADS, ROPE).to(narrow), mask=inside)
        tl.store(out + nope + turned[None, :], tl.broadcast_to(key, (HEADS, ROPE)), mask=inside)
        if PADS:
            inside = there & (values < v_dim)[None, :]
            v = tl.load(KV + heads[:, None] * kv_head + nope + values[None, :], mask=inside, other=0.0)
            padded = VOut + (row * num_heads + heads)[:, None] * v_width + values[None, :]
            tl.store(padded, v, mask=there & (values < v_width)[None, :])


@jit
def _part(
    DQ, DK, DV, Table, DKV, DKRope,
    k_batch, k_token, k_head, v_batch, v_token, v_head, t_batch, t_token,
    num_tokens, num_heads, nope, rope, v_dim,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    batch, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = batch * num_tokens + token
    kind = Table.dtype.element_ty
    narrow = DQ.dtype.element_ty
    cos, sin = _angles(Table, t_batch, t_token, batch, token, rope // 2, ROPE // 2)
    low, turned, values = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    DK += batch * k_batch + token * k_token
    DV += batch * v_batch + token * v_token
    total = tl.zeros((ROPE,), kind)
    for first in range(0, num_heads, HEADS):
        heads = first + tl.arange(0, HEADS)
        there = (heads < num_heads)[:, None]
        out = (row * num_heads + heads)[:, None]
        inside = there & (low < nope)[None, :]
        dk = tl.load(DK + heads[:, None] * k_head + low[None, :], mask=inside, other=0.0)
        tl.store(DKV + out * (nope + v_dim) + low[None, :], dk, mask=inside)
        inside = there & (turned < rope)[None, :]
        queries = DQ + out * (nope + rope) + nope + turned[None, :]
        dq = tl.load(queries, mask=inside, other=0.0).to(kind)
        tl.store(queries, _turn(dq, cos, -sin, HEADS, ROPE).to(narrow), mask=inside)
        dk = tl.load(DK + heads[:, None] * k_head + nope + turned[None, :], mask=inside, other=0.0).to(kind)
        total += tl.sum(dk, 0)
        inside = there & (values < v_dim)[None, :]
        dv = tl.load(DV + heads[:, None] * v_head + values[None, :], mask=inside, other=0.0)
        tl.store(DKV + out * (nope + v_dim) + nope + values[None, :], dv, mask=inside)
    shared = tl.reshape(_turn(tl.reshape(total, (1, ROPE)), cos, -sin, 1, ROPE), (ROPE,))
    tl.store(DKRope + row * rope + turned, shared.to(narrow), mask=turned < rope)


@jit
def _turn_halves(
    X, Out, cos, sin, x_head, num_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The halves of every head of a token."""
    columns = tl.arange(0, HALF)
    for start in range(0, num_heads, HEADS):
        heads = start + tl.arange(0, HEADS)
        inside = (heads < num_heads)[:, None] & (columns < half)[None, :]
        places = X + heads[:, None] * x_head + columns[None, :]
        first = tl.load(places, mask=inside, other=0.0).to(cos.dtype)
        second = tl.load(places + half, mask=inside, other=0.0).to(cos.dtype)
        out = Out + heads[:, None] * (2 * half) + columns[None, :]
        low, high = first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :]
        tl.store(out, low.to(Out.dtype.element_ty), mask=inside)
        tl.store(out + half, high.to(Out.dtype.element_ty), mask=inside)


@jit
def _rotate(
    Q, K, Table, QOut, KOut,
    q_batch, q_token, q_head, k_batch, k_token, k_head, t_batch, t_token, num_tokens, num_heads, num_key_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    batch, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    row = batch * num_tokens + token
    cos, sin = _angles(Table, t_batch, t_token, batch, token, half, HALF)
    if INVERSE:
        sin = -sin
    q_out, k_out = QOut + row * num_heads * 2 * half, KOut + row * num_key_heads * 2 * half
    _turn_halves(Q + batch * q_batch + token * q_token, q_out, cos, sin, q_head, num_heads, half, HEADS, HALF)
    _turn_halves(K + batch * k_batch + token * k_token, k_out, cos, sin, k_head, num_key_heads, half, HEADS, HALF)


def _places(table: Tensor) -> tuple[Tensor, int, int]:
    """A complex table [S, r] or [B, S, r] as pairs of numbers, and how far apart rows of a batch and tokens are."""
    pairs = torch.view_as_real(table.resolve_conj())
    return pairs, pairs.stride(0) if table.dim() == 3 and table.shape[0] > 1 else 0, pairs.stride(-3)


def _dense(x: Tensor) -> Tensor:
    """x with its last dim dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _blocks(**widths: int) -> dict[str, Any]:
    return {"HEADS": _HEADS} | {name: power_of_two(max(1, width)) for name, width in widths.items()}


@operation(
    "join_heads(Tensor(a!) q, Tensor kv, Tensor k_rope, Tensor table, int t_batch, int t_token, int v_width)"
    " -> Tensor[]"
)
def _plan_join(
    q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, t_batch: int, t_token: int, v_width: int
) -> tuple[list[Tensor], Launch]:
    """Keys, and values where they are padded."""
    batch, num_tokens, num_heads, width = q.shape
    rope = k_rope.shape[-1]
    nope = width - rope
    v_dim = kv.shape[-1] - nope
    pads = v_width != v_dim
    out = [q.new_empty(q.shape), *([q.new_empty(*q.shape[:-1], v_width)] if pads else [])]
    strides = *q.stride()[:3], *kv.stride()[:3], *k_rope.stride()[:2], t_batch, t_token
    places = *out, *([None] * (2 - len(out)))
    arguments = q, kv, k_rope, table, *places, *strides, num_tokens, num_heads, nope, rope, v_dim, v_width
    blocks = _blocks(NOPE=nope, ROPE=rope, VALUE=v_width) | {"PADS": pads}
    # Of queries only what is rotated is touched, of values nothing unless they are padded.
    turned = q.nbytes // width * rope
    read = turned + kv.nbytes // kv.shape[-1] * (nope + pads * v_dim) + k_rope.nbytes + table.nbytes
    written = turned + sum(made.nbytes for made in out)
    launch = Launch(_join, (num_tokens, batch), arguments, blocks, read_bytes=read, written_bytes=written)
    return out, launch


@operation(
    "join_heads_backward(Tensor(a!) dq, Tensor dk, Tensor dv, Tensor table, int t_batch, int t_token, int nope,"
    " int v_dim) -> (Tensor, Tensor)"
)
def _plan_part(
    dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, t_batch: int, t_token: int, nope: int, v_dim: int
) -> tuple[tuple[Tensor, Tensor], Launch]:
    """The gradients of kv and of k_rope; that of queries, which lies densely, is made over dq."""
    batch, num_tokens, num_heads, width = dq.shape
    rope = width - nope
    lead = dq.shape[:-1]
    out = dq.new_empty(*lead, nope + v_dim), dq.new_empty(*lead[:2], rope)
    strides = *dk.stride()[:3], *dv.stride()[:3], t_batch, t_token
    arguments = dq, dk, dv, table, *out, *strides, num_tokens, num_heads, nope, rope, v_dim
    blocks = _blocks(NOPE=nope, ROPE=rope, VALUE=v_dim)
    # What pads values is not read.
    turned = dq.nbytes // width * rope
    read = turned + dk.nbytes + dv.nbytes // dv.shape[-1] * v_dim + table.nbytes
    written = turned + sum(made.nbytes for made in out)
    return out, Launch(_part, (num_tokens, batch), arguments, blocks, read_bytes=read, written_bytes=written)


@operation("rotate_heads(Tensor q, Tensor k, Tensor table, int t_batch, int t_token, bool inverse) -> (Tensor, Tensor)")
def _plan_rotate(
    q: Tensor, k: Tensor, table: Tensor, t_batch: int, t_token: int, inverse: bool
) -> tuple[tuple[Tensor, Tensor], Launch]:
    batch, num_tokens, num_heads, width = q.shape
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    strides = *q.stride()[:3], *k.stride()[:3], t_batch, t_token
    arguments = q, k, table, *out, *strides, num_tokens, num_heads, k.shape[2], width // 2
    blocks = _blocks(HALF=width // 2) | {"INVERSE": inverse}
    return out, Launch(_rotate, (num_tokens, batch), arguments, blocks)


def join_heads(q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, v_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `train.model.attention.kernels.join_heads_forward`. Queries are rotated in place, and values are a view of kv
    unless they are padded: whoever attends to them takes them by their strides."""
    q = _dense(q)
    k, *padded = _plan_join(q, _dense(kv), _dense(k_rope), *_places(table), v_width)
    return q, k, padded[0] if padded else kv[..., q.shape[-1] - k_rope.shape[-1] :]


def join_heads_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, table: Tensor, nope: int, v_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `train.model.attention.kernels.join_heads_backward`; dq is overwritten where it lies densely."""
    dq = dq.contiguous()
    return dq, *_plan_part(dq, _dense(dk), _dense(dv), *_places(table), nope, v_dim)


def rotate_heads(q: Tensor, k: Tensor, table: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """As `train.model.attention.kernels.rotate_heads_forward`."""
    return _plan_rotate(_dense(q), _dense(k), *_places(table), inverse)
