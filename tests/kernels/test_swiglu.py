"""SwiGLU in Triton's interpreter against its eager twin."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import swiglu as ours
from tests.kernels.peers import DTYPES, agree
from train.model import kernels as eager


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(0, 30),
    width=st.one_of(st.integers(1, 200), st.just(2100)),
    weighted=st.booleans(),
)
def test_swiglu(dtype: torch.dtype, num_rows: int, width: int, weighted: bool) -> None:
    """Also where no expert of a rank gets a row, and where a row is wider than a tile."""
    h, da = torch.randn(num_rows, 2 * width, dtype=dtype), torch.randn(num_rows, width, dtype=dtype)
    row_weights = torch.rand(num_rows, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    agree(ours.swiglu_forward(h, row_weights), eager.swiglu_forward(h, row_weights), dtype)
    a, dh, d_row_weights = ours.swiglu_backward(da, h, row_weights)
    expected = eager.swiglu_backward(da, h, row_weights)
    # The eager gradient of silu is rounded to the narrow type in one more place.
    agree((a, dh), expected[:2], dtype, factor=2)
    assert (d_row_weights is None) == (expected[2] is None) == (not weighted)
    if d_row_weights is not None and expected[2] is not None:
        agree(d_row_weights, expected[2], row_weights.dtype)  # a sum in that type, whatever that of the rows
