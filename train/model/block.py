"""A transformer layer: attention, then a dense MLP or experts, each behind a norm and beside a residual."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from train.model.attention.build import build_attention
from train.model.attention.cache import Cache
from train.model.config import ModelConfig
from train.model.layers import Backend, FeedForward, RMSNorm
from train.model.moe import Dispatch, Journey, build_moe
from train.model.packing import Places
from train.model.router import RouterStats
from train.model.tape import Inline, Steps, Tape, drive


class _Block(nn.Module):
    """What both kinds of layer share. `kind` names the layer on a tape."""

    kind: str

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.self_attn = build_attention(config.attention_sizes, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)

    def attend(self, x: Tensor, places: Places) -> Tensor:
        """x [B, S, hidden] plus its attention."""
        residual, normed = self.input_layernorm.beside(x)
        return residual + self.self_attn(normed, places)

    def attend_cached(self, x: Tensor, table: Tensor, cache: Cache) -> Tensor:
        """x [1, N, hidden] plus its attention, of tokens behind those of `cache`."""
        return x + self.self_attn.decode(self.input_layernorm(x), table, cache)


class DenseBlock(_Block):
    """A layer with a dense MLP; it routes nothing."""

    kind = "dense"

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, backend)
        self.node = backend.recompute.node("dense")

    def steps(self, x: Tensor, places: Places, tape: Tape) -> Steps[tuple[Tensor, None]]:
        """x [B, S, hidden] -> (the same shape, None)."""
        yield from ()
        return tape.compute(self.node(partial(self.whole, places=places)), x, node="dense"), None

    def whole(self, x: Tensor, places: Places) -> Tensor:
        """Attention and MLP: x [B, S, hidden]."""
        return self.feed(self.attend(x, places))

    def feed(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] plus the MLP."""
        residual, normed = self.post_attention_layernorm.beside(x)
        return residual + self.mlp(normed.flatten(0, 1)).view_as(x)

    def decode(self, x: Tensor, table: Tensor, cache: Cache) -> Tensor:
        """The layer for tokens behind those of `cache`: x [1, N, hidden], no gradients."""
        return self.feed(self.attend_cached(x, table, cache))


class MoEBlock(_Block):
    """A layer with experts, as nodes: attention and router | dispatch | experts | combine | aggregate."""

    kind = "moe"

    def __init__(self, config: ModelConfig, dispatch: Dispatch, backend: Backend) -> None:
        super().__init__(config, backend)
        self.mlp = build_moe(config, dispatch, backend)
        self.attention_node = backend.recompute.node("attention")
        self.experts_node = backend.recompute.node("experts")

    def route(self, x: Tensor, places: Places) -> tuple[Tensor, ...]:
        """x [B, S, hidden] -> residual [B, S, hidden], its norm [T, hidden], weights, indices, and the parts of
        RouterStats."""
        return self.choose(self.attend(x, places))

    def choose(self, residual: Tensor) -> tuple[Tensor, ...]:
        """The router's part of `route`: residual [B, S, hidden]."""
        residual, normed = self.post_attention_layernorm.beside(residual)
        weights, indices, stats = self.mlp.gate(normed)
        return residual, normed.flatten(0, 1), weights, indices, *stats

    def steps(self, x: Tensor, places: Places, tape: Tape) -> Steps[tuple[Tensor, RouterStats]]:
        """x [B, S, hidden] -> (the same shape, what the router reports)."""
        route = self.attention_node(partial(self.route, places=places))
        return (yield from self.visit(tape.compute(route, x, node="attention"), tape))

    def decode(self, x: Tensor, table: Tensor, cache: Cache) -> Tensor:
        """The layer for tokens behind those of `cache`: x [1, N, hidden], no gradients."""
        return drive(self.visit(self.choose(self.attend_cached(x, table, cache)), Inline()))[0]

    def visit(self, routed: tuple[Tensor, ...], tape: Tape) -> Steps[tuple[Tensor, RouterStats]]:
        """The way to the experts and back, of what `route` returns."""
        residual, own, weights, indices, *stats = routed
        journey = Journey(self.mlp.exchange, indices)
        rows, row_weights = yield from tape.communicate(journey.out, own, weights, node="dispatch")
        compute = self.experts_node(partial(self.mlp.compute, rows_per_expert=journey.rows_per_expert))
        seen = self.mlp.seen_by_shared_experts(own)
        rows, *shared = tape.compute(compute, rows, row_weights, *seen, node="experts")
        (combined,) = yield from tape.communicate(journey.home, rows, node="combine")
        y = tape.compute(self.aggregate, residual, *shared, combined, node="aggregate")
        return y, RouterStats(*stats)

    @staticmethod
    def aggregate(residual: Tensor, *parts: Tensor) -> Tensor:
        """residual [B, S, hidden] + what shared experts (if there are any) and routed ones give, [T, hidden] each."""
        for part in parts:
            residual = residual + part.view_as(residual)
        return residual


def last_block(config: ModelConfig, dispatch: Dispatch, backend: Backend) -> DenseBlock | MoEBlock:
    """A layer like those at the end of the model, which prediction depths have: with experts, if there are any."""
    return MoEBlock(config, dispatch, backend) if config.n_routed_experts else DenseBlock(config, backend)
