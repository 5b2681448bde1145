"""A transformer layer: attention, then a dense MLP or experts, each behind a norm and beside a residual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from train.model.attention import Attention
from train.model.config import ModelConfig
from train.model.layers import Backend, FeedForward, RMSNorm
from train.model.moe import Dispatch, MoE, Plan
from train.model.router import RouterStats


class _Block(nn.Module):
    """What both kinds of layer share."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)

    def attend(self, x: Tensor, table: Tensor) -> Tensor:
        """x [B, S, hidden] plus its attention."""
        return x + self.self_attn(self.input_layernorm(x), table)


class DenseBlock(_Block):
    """A layer with a dense MLP; it routes nothing."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, backend)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, None]:
        """x [B, S, hidden] -> (the same shape, None)."""
        x = self.attend(x, table)
        return x + self.mlp(self.post_attention_layernorm(x).flatten(0, 1)).view_as(x), None


class Routed(NamedTuple):
    """What leaves the first node of an MoE layer."""

    residual: Tensor
    """[B, S, hidden]"""
    x: Tensor
    """The normed residual, [T, hidden]."""
    weights: Tensor
    indices: Tensor
    stats: RouterStats


class MoEBlock(_Block):
    """A layer with experts, as nodes: route | mlp.dispatch | mlp.compute | mlp.combine | aggregate.

    `forward` runs them in this order; a pipeline may run those of two micro-batches alternately.
    """

    def __init__(self, config: ModelConfig, dispatch: Dispatch, backend: Backend) -> None:
        super().__init__(config, backend)
        self.mlp = MoE(config, dispatch, backend)

    def route(self, x: Tensor, table: Tensor) -> Routed:
        """Attention and router: x [B, S, hidden]."""
        residual = self.attend(x, table)
        normed = self.post_attention_layernorm(residual)
        routing = self.mlp.gate(normed)
        return Routed(residual, normed.flatten(0, 1), *routing)

    def aggregate(self, residual: Tensor, shared: Tensor, combined: Tensor) -> Tensor:
        """residual [B, S, hidden] + shared [T, hidden] + combined [T, hidden]."""
        return residual + shared.view_as(residual) + combined.view_as(residual)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, RouterStats]:
        """x [B, S, hidden] -> (the same shape, what the router reports)."""
        routed = self.route(x, table)
        plan: Plan
        rows, row_weights, plan = self.mlp.dispatch(routed.x, routed.weights, routed.indices)
        rows, shared = self.mlp.compute(rows, row_weights, plan, routed.x)
        combined = self.mlp.combine(rows, plan)
        return self.aggregate(routed.residual, shared, combined), routed.stats
