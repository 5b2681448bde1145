"""Rows of experts in multiples: empty ones change nothing of what comes back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.collectives import drive
from parallel.expert.dispatch import LocalDispatch


class InMultiples:
    """Rows as they are, an expert's in multiples."""

    def __init__(self, row_multiple: int) -> None:
        self.row_multiple = row_multiple

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def arrive(self, payload: Tensor, source: Tensor, splits: list[int], dtype: torch.dtype) -> Tensor:
        assert sum(splits) == source.numel() and not any(length % self.row_multiple for length in splits)
        return torch.cat([payload, payload.new_zeros(1, payload.shape[1])]).index_select(0, source)


@given(st.integers(0, 20), st.integers(1, 5), st.sampled_from([4, 16]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_empty_rows_change_no_number(num_tokens: int, num_experts: int, multiple: int, seed: int) -> None:
    """Each row's token, weight, sum and gradients are those without them, and what an empty row is given is lost."""
    torch.manual_seed(seed)
    num_chosen = min(2, num_experts)
    x, weights = torch.randn(num_tokens, 3), torch.rand(num_tokens, num_chosen)
    indices = torch.rand(num_tokens, num_experts).argsort(1)[:, :num_chosen]
    indices[torch.rand(num_tokens, num_chosen) < 0.2] = -1
    plain, spaced = LocalDispatch(num_experts), LocalDispatch(num_experts, codec=InMultiples(multiple))
    rows, row_weights, plan = drive(plain.dispatch(x, weights, indices))
    wide, wide_weights, wide_plan = drive(spaced.dispatch(x, weights, indices))
    ends = torch.tensor([0, *wide_plan.rows_per_expert]).cumsum(0)
    places = [int(start) + row for start, n in zip(ends, plan.rows_per_expert, strict=False) for row in range(n)]
    empty = torch.ones(len(wide), dtype=torch.bool)
    empty[places] = False
    assert torch.equal(wide[places], rows) and torch.equal(wide_weights[places], row_weights)
    assert not wide[empty].any() and not wide_weights[empty].any()

    def filled(values: Tensor) -> Tensor:
        """With rubbish in the empty ones."""
        full = torch.full((len(wide), *values.shape[1:]), 1e6)
        full[places] = values
        return full

    y, d_weights = torch.randn_like(rows), torch.randn_like(row_weights)
    assert torch.equal(drive(spaced.combine(filled(y), wide_plan)), drive(plain.combine(y, plan)))
    found = drive(spaced.dispatch_backward(filled(y), filled(d_weights), wide_plan))
    for ours, theirs in zip(found, drive(plain.dispatch_backward(y, d_weights, plan)), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(drive(spaced.combine_backward(x, wide_plan))[places], rows)
