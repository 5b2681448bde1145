"""Sizes and work of a model in closed form: parameters, and floating-point operations per token of training."""

from __future__ import annotations

from dataclasses import dataclass

from train.model.config import ModelConfig, given


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. Router biases are state, not parameters, and counted apart."""

    total: int
    """The main model with embedding and head, without multi-token prediction."""
    embedding: int
    """The embedding table; the head, which is not tied to it, is as large."""
    activated: int
    """Parameters of the main model that multiply a token: with the head, without the embedding, which is looked up."""
    router_biases: int
    """Selection biases of the main model's routers."""
    mtp: int
    """What all prediction depths add; they share embedding and head."""
    mtp_activated: int
    """Parameters that multiply a token in all prediction depths, without the shared head."""


def _dense_layer(config: ModelConfig) -> int:
    """A dense layer, its two norms included."""
    return (
        config.attention_sizes.num_parameters
        + 2 * config.hidden_size
        + 3 * config.hidden_size * config.intermediate_size
    )


def _moe_layer(config: ModelConfig, num_routed: int) -> int:
    """An MoE layer with `num_routed` of its experts, its two norms included."""
    router = config.n_routed_experts * config.hidden_size
    width = num_routed * given(config.moe_intermediate_size) + config.shared_intermediate_size
    experts = 3 * config.hidden_size * width
    return config.attention_sizes.num_parameters + 2 * config.hidden_size + router + experts


def _last_layer(config: ModelConfig, num_routed: int) -> int:
    """A layer as at the end of the model, which prediction depths have: dense in a model without experts."""
    return _moe_layer(config, num_routed) if config.n_routed_experts else _dense_layer(config)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts by formula; a model built from the config holds exactly as many."""
    hidden, depths = config.hidden_size, config.num_nextn_predict_layers
    embedding = config.vocab_size * hidden
    frame = embedding + hidden + config.first_k_dense_replace * _dense_layer(config)
    joint = 2 * hidden * hidden + 3 * hidden
    whole = _last_layer(config, config.n_routed_experts)
    active = _last_layer(config, config.num_experts_per_tok or 0)
    return ParameterCounts(
        total=embedding + frame + config.num_moe_layers * whole,
        embedding=embedding,
        activated=frame + config.num_moe_layers * active,
        router_biases=config.num_moe_layers * config.n_routed_experts if config.has_router_bias else 0,
        mtp=depths * (joint + whole),
        mtp_activated=depths * (joint + active),
    )


def training_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = False) -> float:
    """Floating-point operations to train on one token: forward, and a backward of twice as many.

    6 per activated weight, plus the attention core, of which a causal mask needs half. DeepSeek-V3 at 4096 tokens: 250
    GFLOP causal, 281 not (arXiv 2505.09343, Table 2). With `mtp` the prediction depths and their passes through the
    head count too.
    """
    counts = parameter_counts(config)
    core = config.attention_sizes.core_flops(seq_len)
    weights, num_layers = counts.activated, config.num_hidden_layers
    if mtp:
        weights += counts.mtp_activated + config.num_nextn_predict_layers * counts.embedding
        num_layers += config.num_nextn_predict_layers
    return 6.0 * weights + 3.0 * num_layers * core * (0.5 if causal else 1.0)


def forward_costs(config: ModelConfig, seq_len: int) -> tuple[list[float], float]:
    """Multiply-adds of one token's forward pass: of each main layer, and of all that follows the last one.

    What follows is the output head, and for every prediction depth its projection, its layer and the head again.
    """
    # A multiply-add is two operations, and a causal mask leaves half of them.
    core = config.attention_sizes.core_flops(seq_len) / 4
    dense = config.attention_sizes.num_parameters + 3 * config.hidden_size * config.intermediate_size + core
    last = _moe_layer(config, given(config.num_experts_per_tok)) + core if config.n_routed_experts else dense
    head = float(config.hidden_size * config.vocab_size)
    depth = 2 * config.hidden_size**2 + last + head
    layers = [last if index >= config.first_k_dense_replace else dense for index in range(config.num_hidden_layers)]
    return layers, head + config.num_nextn_predict_layers * depth
