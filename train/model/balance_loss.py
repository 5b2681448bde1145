"""Losses that even out routing: over experts, over devices, and over what devices receive (DeepSeek-V2, section 2.2.3).

All are sums over sequences, each of a sequence alone, so that a batch may be cut in any way. Letters: B sequences of S
tokens, E experts in D groups, K experts per token, M groups that a token may visit. A group stands for a device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BalanceLosses(NamedTuple):
    """Summed over sequences, without their factors alpha; scalars. 1 for each sequence that is routed evenly."""

    expert: Tensor
    """Σ_e f_e P_e: DeepSeek-V2, Eq. 23-25; DeepSeekMoE, Eq. 12-14; DeepSeek-V3's sequence-wise loss, Eq. 17-20."""
    device: Tensor
    """Σ_d f'_d P'_d, of groups: DeepSeek-V2, Eq. 26-28; DeepSeekMoE, Eq. 15-17."""
    comm: Tensor
    """Σ_d f''_d P''_d, of tokens sent to groups: DeepSeek-V2, Eq. 29-31."""


def balance_losses(
    shares: Tensor, counted: Tensor, selected: Tensor, num_groups: int, num_kept_groups: int
) -> BalanceLosses:
    """shares [B, S, E]: affinities that sum to 1 over a token's experts; they alone carry a gradient.

    counted: the experts that f counts, int64 [B, S, K]; selected: those that the token is sent to, of the same shape.
    """
    _, num_tokens, num_experts = shares.shape
    probability = shares.mean(1)
    group_probability = probability.unflatten(1, (num_groups, -1)).sum(-1)
    with torch.no_grad():
        num_selected = counted.shape[-1]
        counted = counted.flatten(1)
        hits = torch.zeros_like(probability).scatter_add_(1, counted, torch.ones_like(counted, dtype=shares.dtype))
        frequency = hits * (num_experts / (num_selected * num_tokens))
        group_frequency = frequency.unflatten(1, (num_groups, -1)).mean(-1)
        group_of = selected // (num_experts // num_groups)
        sent = shares.new_zeros(*shares.shape[:2], num_groups).scatter_(2, group_of, 1.0)
        sent_frequency = sent.sum(1) * (num_groups / (num_kept_groups * num_tokens))
    return BalanceLosses(
        expert=(frequency * probability).sum(),
        device=(group_frequency * group_probability).sum(),
        comm=(sent_frequency * group_probability).sum(),
    )
