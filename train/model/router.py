"""The router: which experts a token visits and with which weights (technical report, section 2.1.2).

Letters: T = B * S tokens, E routed experts, K experts per token. Everything here is float32 (float64 in a float64
model), whatever the model's type and whatever autocast says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig, given
from train.model.layers import Backend
from train.precision.grads import Sink, main_grad, wide_dtype


class RouterStats(NamedTuple):
    """What a router reports of a micro-batch."""

    balance: Tensor
    """Sequence-wise balance loss, summed over the sequences; scalar."""
    load: Tensor
    """Tokens that selected each expert, int64 [E]; zeros unless training with gradients."""


class Routing(NamedTuple):
    weights: Tensor
    """[T, K], differentiable."""
    indices: Tensor
    """Global expert ids, int64 [T, K], no duplicates in a row."""
    stats: RouterStats


class _Affinity(torch.autograd.Function):
    """x [T, d], weight [E, d] -> sigmoid(x weightᵀ) [T, E], in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sink: Sink) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = wide_dtype(x.dtype)
            scores = torch.mm(x.to(wide), weight.to(wide).t()).sigmoid_()
        ctx.save_for_backward(x, scores)
        ctx.weight, ctx.sink = weight, sink
        return scores

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> Any:
        (x, scores), weight = ctx.saved_tensors, ctx.weight
        with torch.autocast(x.device.type, enabled=False):
            d_logits = torch.ops.aten.sigmoid_backward(d_scores, scores)
            dx = torch.mm(d_logits, weight.to(scores.dtype)).to(x.dtype)
        x = x.detach()

        def wgrad() -> None:
            with torch.autocast(x.device.type, enabled=False):
                main_grad(weight).addmm_(d_logits.t(), x.to(d_logits.dtype))

        ctx.sink(wgrad)
        return dx, None, None


def largest(values: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the largest values along the last dim, in falling order.

    Equal values: the lowest index first, on every device, which topk does not promise. For the few experts of a token
    it is as fast as topk, too.
    """
    values = values.clone()
    picks = []
    for _ in range(count):
        pick = values.argmax(-1, keepdim=True)
        values.scatter_(-1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, -1)


class Router(nn.Module):
    """Sigmoid scores, selection by score + bias inside the best groups, weights by score alone."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.num_experts, self.num_selected = config.n_routed_experts, given(config.num_experts_per_tok)
        self.num_groups, self.num_kept_groups = given(config.n_group), given(config.topk_group)
        self.normalised, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.sink = backend.sink
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(self.num_experts))

    def forward(self, x: Tensor) -> Routing:
        """x [B, S, hidden], normed."""
        num_sequences = x.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            scores = _Affinity.apply(x.reshape(-1, x.shape[-1]), self.weight, self.sink)
            indices = self.select(scores.detach())
            weights = scores.gather(1, indices)
            if self.normalised:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            balance = self.balance_loss(scores.unflatten(0, (num_sequences, -1)))
        return Routing(weights * self.scaling, indices, RouterStats(balance, self._load(indices)))

    def select(self, scores: Tensor) -> Tensor:
        """The K experts of each token, int64 [T, K]: the largest score + bias within the best `topk_group` groups.

        A group counts as much as its two best biased scores together. Excluded groups are masked with -inf, not 0: a
        bias may be negative.
        """
        choice = scores + self.e_score_correction_bias
        if self.num_kept_groups < self.num_groups:
            grouped = choice.unflatten(-1, (self.num_groups, -1))
            best_two = grouped.gather(-1, largest(grouped, 2)).sum(-1)
            kept = largest(best_two, self.num_kept_groups)
            excluded = torch.ones_like(best_two, dtype=torch.bool).scatter_(-1, kept, False)
            choice = grouped.masked_fill(excluded.unsqueeze(-1), -torch.inf).flatten(-2)
        return largest(choice, self.num_selected)

    def balance_loss(self, scores: Tensor) -> Tensor:
        """Sum over sequences of Σ_e f_e P_e (Eq. 17-20, without alpha); scores [B, S, E].

        f_e: how often e is among a token's K best scores, without bias and group limit, relative to balance. P_e: mean
        normalised score. Only P carries a gradient.
        """
        num_sequences, num_tokens, num_experts = scores.shape
        with torch.no_grad():
            best = largest(scores, self.num_selected).flatten(1)
            counts = scores.new_zeros(num_sequences, num_experts)
            counts.scatter_add_(1, best, torch.ones_like(best, dtype=scores.dtype))
            frequency = counts * (num_experts / (self.num_selected * num_tokens))
        probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return (frequency * probability).sum()

    def _load(self, indices: Tensor) -> Tensor:
        load = torch.zeros(self.num_experts, dtype=torch.int64, device=indices.device)
        if self.training and torch.is_grad_enabled():
            chosen = indices.flatten()
            load.scatter_add_(0, chosen, torch.ones_like(chosen))
        return load
