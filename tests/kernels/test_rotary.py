"""Rotary embedding in Triton's interpreter against its eager twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import rotary as ours
from tests.kernels.peers import DTYPES, agree
from train.model import kernels as model
from train.model.attention import kernels as eager
from train.model.attention.cores import scaled_dot_product

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
    """Gradients of attention come with their heads before their tokens. Queries and their gradient, where it lies
    densely, are rotated where they are; values are not moved unless they are padded."""
    table, lead = table_of(dtype, batch, num_tokens, half, by_row), (batch, num_tokens, num_heads)
    q, kv = torch.randn(*lead, nope + 2 * half, dtype=dtype), torch.randn(*lead, nope + v_dim, dtype=dtype)
    k_rope = torch.randn(batch, num_tokens, 7 + 2 * half, dtype=dtype)[..., 7:]
    inputs = q, kv, k_rope, table, v_dim + padding
    expected = eager.join_heads_forward(*inputs)
    joined = ours.join_heads(*inputs)
    agree(joined, expected, dtype)
    assert joined[0].data_ptr() == q.data_ptr()
    assert padding or joined[2].untyped_storage().data_ptr() == kv.untyped_storage().data_ptr()
    dq, dk = (torch.randn(batch, num_heads, num_tokens, nope + 2 * half, dtype=dtype).transpose(1, 2) for _ in "qk")
    dv = torch.randn(*lead, v_dim + padding, dtype=dtype)
    for each in (dq, dq.contiguous()):
        gradients = each, dk, dv, table, nope, v_dim
        expected, place = eager.join_heads_backward(*gradients), each.data_ptr()
        found = ours.join_heads_backward(*gradients)
        agree(found[:2], expected[:2], dtype)
        agree(found[2], expected[2], dtype, factor=4)  # a sum over the heads, rounded once
        assert not each.is_contiguous() or found[0].data_ptr() == place


@pytest.mark.parametrize("padding", [0, 4])
def test_autograd_sees_results_of_one_node(padding: int) -> None:
    """What is overwritten in place, and what is a view, differentiates as what is written anew: of inputs that are
    views, as the projections' are, with all three results saved by what reads them."""
    table, lead = table_of(torch.float64, 2, 3, 2, False), (2, 3, 4)
    leaves = [torch.randn(2, 3, 4 * width, dtype=torch.float64) for width in (5 + 4, 5 + 6)]
    leaves.append(torch.randn(2, 3, 4, dtype=torch.float64))
    weights = torch.randn(*lead, 6, dtype=torch.float64)
    gradients = []
    for kernels in (model.triton_kernels("cpu"), model.Kernels()):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        q, kv = ((leaf * 1.0).unflatten(-1, (4, -1)) for leaf in leaves[:2])
        q, k, v = kernels.join_heads(q, kv, leaves[2] * 1.0, table, 6 + padding)
        mixed = scaled_dot_product(q, k, v, 0.3, is_causal=True)[..., :6]
        (mixed * weights).sum().backward()
        gradients.append([mixed.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(**SIZES, num_key_heads=st.integers(1, 17), inverse=st.booleans())
def test_rotate_heads(
    dtype: torch.dtype, batch: int, num_tokens: int, num_heads: int, half: int, by_row: bool,
    num_key_heads: int, inverse: bool,
) -> None:  # fmt: skip
    table = table_of(dtype, batch, num_tokens, half, by_row)
    q, k = (torch.randn(batch, num_tokens, num, 2 * half, dtype=dtype) for num in (num_heads, num_key_heads))
    agree(ours.rotate_heads(q, k, table, inverse), eager.rotate_heads(q, k, table, inverse), dtype)
