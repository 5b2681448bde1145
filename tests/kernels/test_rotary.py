"""Rotary embedding in Triton's interpreter against its eager twin."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import rotary as ours
from tests.kernels.peers import DTYPES, agree
from train.model.attention import kernels as eager

SIZES = {
    "dtype": st.sampled_from(DTYPES),
    "batch": st.integers(1, 2),
    "num_tokens": st.integers(1, 5),
    "num_heads": st.integers(1, 19),
    "half": st.integers(1, 9),
    "by_row": st.booleans(),
}


def table_of(dtype: torch.dtype, batch: int, num_tokens: int, half: int, by_row: bool) -> Tensor:
    """Angles of every position, or of every position of each row, as packed documents have them."""
    angles = torch.randn(
        *((batch,) if by_row else ()), num_tokens, half, dtype=torch.promote_types(dtype, torch.float32)
    )
    return torch.polar(torch.ones_like(angles), angles)


@settings(max_examples=10)
@given(**SIZES, nope=st.integers(1, 20), v_dim=st.integers(1, 20), padding=st.integers(0, 5))
def test_join_heads(
    dtype: torch.dtype, batch: int, num_tokens: int, num_heads: int, half: int, by_row: bool,
    nope: int, v_dim: int, padding: int,
) -> None:  # fmt: skip
    """Gradients of attention come with their heads before their tokens."""
    table, lead = table_of(dtype, batch, num_tokens, half, by_row), (batch, num_tokens, num_heads)
    q, kv = torch.randn(*lead, nope + 2 * half, dtype=dtype), torch.randn(*lead, nope + v_dim, dtype=dtype)
    k_rope = torch.randn(batch, num_tokens, 7 + 2 * half, dtype=dtype)[..., 7:]
    inputs = q, kv, k_rope, table, v_dim + padding
    agree(ours.join_heads(*inputs), eager.join_heads_forward(*inputs), dtype)
    dq, dk = (torch.randn(batch, num_heads, num_tokens, nope + 2 * half, dtype=dtype).transpose(1, 2) for _ in "qk")
    dv = torch.randn(*lead, v_dim + padding, dtype=dtype)
    gradients = dq, dk, dv, table, nope, v_dim
    found, expected = ours.join_heads_backward(*gradients), eager.join_heads_backward(*gradients)
    agree(found[:2], expected[:2], dtype)
    agree(found[2], expected[2], dtype, factor=4)  # a sum over the heads, rounded once


@settings(max_examples=20)
@given(**SIZES, num_key_heads=st.integers(1, 17), inverse=st.booleans())
def test_rotate_heads(
    dtype: torch.dtype, batch: int, num_tokens: int, num_heads: int, half: int, by_row: bool,
    num_key_heads: int, inverse: bool,
) -> None:  # fmt: skip
    table = table_of(dtype, batch, num_tokens, half, by_row)
    q, k = (torch.randn(batch, num_tokens, num, 2 * half, dtype=dtype) for num in (num_heads, num_key_heads))
    agree(ours.rotate_heads(q, k, table, inverse), eager.rotate_heads(q, k, table, inverse), dtype)
