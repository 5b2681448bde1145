"""Cross-entropy in Triton's interpreter against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cross_entropy import cross_entropy, cross_entropy_
from tests.kernels.peers import DTYPES, agree


@settings(max_examples=15)
@given(
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(0, 12),
    vocab_size=st.one_of(st.integers(1, 300), st.just(5000)),
    factor=st.floats(-2, 2, width=32),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_loss_and_gradient(dtype: torch.dtype, num_tokens: int, vocab_size: int, factor: float, spread: float) -> None:
    """Also of labels that count nothing, and where a vocabulary is wider than a block."""
    logits = (torch.randn(num_tokens, vocab_size) * spread).to(dtype)
    labels = torch.randint(-1, vocab_size, (num_tokens,))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaf = logits.to(wide).requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, labels, ignore_index=-1, reduction="sum")
    (expected * factor).backward()
    agree(cross_entropy(logits, labels), expected.detach(), wide, factor=4)
    agree(cross_entropy_(logits, labels, factor), expected.detach(), wide, factor=4)
    assert leaf.grad is not None
    agree(logits, leaf.grad.to(dtype), dtype)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_zero(shift: float) -> None:
    logits, labels = torch.randn(3, 50), torch.tensor([4, 0, 49])
    agree(cross_entropy(logits + shift, labels), cross_entropy(logits, labels), torch.float32, factor=1000)
    confident = torch.full((1, 50), -1e4)
    confident[0, 7] = 1e4
    assert cross_entropy(confident, torch.tensor([7])) == 0
    assert cross_entropy(confident, torch.tensor([8])) == 2e4
