"""RMSNorm in Triton's interpreter against its eager twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rms_norm import rms_norm_backward, rms_norm_forward
from tests.kernels.peers import DTYPES, agree
from train.model import kernels as eager


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    num_rows=st.integers(0, 40),
    width=st.integers(1, 300),
    gap=st.integers(0, 3),
)
def test_rms_norm(dtype: torch.dtype, num_rows: int, width: int, gap: int) -> None:
    """Rows may be a part of longer ones, as the latents of keys and values are."""
    x, dy, beside = (torch.randn(1, num_rows, width + gap, dtype=dtype)[..., :width] for _ in range(3))
    weight = torch.randn(width, dtype=dtype)
    ours, theirs = (module.rms_norm_forward(x, weight, 1e-6) for module in (_OURS, eager))
    agree(ours, theirs, dtype)
    scale = theirs[1]
    # Sums over all rows grow with them: compared as means.
    ours, theirs = (module.rms_norm_backward(dy, x, weight, scale) for module in (_OURS, eager))
    agree(ours[0], theirs[0], dtype)
    agree(ours[1] / max(1, num_rows), theirs[1].to(dtype) / max(1, num_rows), dtype)
    # A sum of two, which the twin rounds twice.
    ours, theirs = (module.rms_norm_backward(dy, x, weight, scale, beside) for module in (_OURS, eager))
    agree(ours[0], theirs[0], dtype, factor=2)


class _OURS:
    rms_norm_forward = staticmethod(rms_norm_forward)
    rms_norm_backward = staticmethod(rms_norm_backward)


def test_the_sum_over_rows_has_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than there are sums: a program has several tiles, and the same bits come twice."""
    monkeypatch.setattr("kernels.rms_norm._MAX_SUMS", 3)
    x, dy, weight = torch.randn(20, 1200), torch.randn(20, 1200), torch.randn(1200)
    _, scale = eager.rms_norm_forward(x, weight, 1e-6)
    first, again = (rms_norm_backward(dy, x, weight, scale)[1] for _ in range(2))
    assert torch.equal(first, again)
    agree(first, eager.rms_norm_backward(dy, x, weight, scale)[1], torch.float32)
