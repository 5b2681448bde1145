"""Sizes and work of a model in closed form: parameters, and floating-point operations per token of training."""

from __future__ import annotations

from dataclasses import dataclass

from train.model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. Router biases are state, not parameters, and counted apart."""

    total: int
    """The main model with embedding and head, without multi-token prediction."""
    embedding: int
    """The embedding table; the head, which is not tied to it, is as large."""
    activated: int
    """Those of the main model that multiply a token: with the head, without the embedding, which is only looked up."""
    router_biases: int
    """Of the main model's routers."""
    mtp: int
    """What all prediction depths add; they share embedding and head."""
    mtp_activated: int
    """Those that multiply a token in all prediction depths, without the shared head."""


def _attention(config: ModelConfig) -> int:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = heads * config.qk_head_dim
    q = hidden * queries if rank is None else hidden * rank + rank + rank * queries
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    kv = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return q + latent + kv + heads * config.v_head_dim * hidden


def _moe_layer(config: ModelConfig, num_routed: int) -> int:
    """An MoE layer with `num_routed` of its experts, its two norms included."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    router = config.n_routed_experts * config.hidden_size
    return _attention(config) + 2 * config.hidden_size + router + (num_routed + config.n_shared_experts) * expert


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts by formula; a model built from the config holds exactly as many."""
    hidden, depths = config.hidden_size, config.num_nextn_predict_layers
    embedding = config.vocab_size * hidden
    dense_layer = _attention(config) + 2 * hidden + 3 * hidden * config.intermediate_size
    frame = embedding + hidden + config.first_k_dense_replace * dense_layer
    joint = 2 * hidden * hidden + 3 * hidden
    every, selected = config.n_routed_experts, config.num_experts_per_tok
    return ParameterCounts(
        total=embedding + frame + config.num_moe_layers * _moe_layer(config, every),
        embedding=embedding,
        activated=frame + config.num_moe_layers * _moe_layer(config, selected),
        router_biases=config.num_moe_layers * every if config.has_router_bias else 0,
        mtp=depths * (joint + _moe_layer(config, every)),
        mtp_activated=depths * (joint + _moe_layer(config, selected)),
    )


def training_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True, mtp: bool = False) -> float:
    """Floating-point operations to train on one token: forward, and a backward of twice as many.

    6 per activated weight, plus the attention core, of which a causal mask needs half. DeepSeek-V3 at 4096 tokens: 250
    GFLOP causal, 281 not (arXiv 2505.09343, Table 2). With `mtp` the prediction depths and their passes through the
    head count too.
    """
    counts = parameter_counts(config)
    core = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len
    weights, num_layers = counts.activated, config.num_hidden_layers
    if mtp:
        weights += counts.mtp_activated + config.num_nextn_predict_layers * counts.embedding
        num_layers += config.num_nextn_predict_layers
    return 6.0 * weights + 3.0 * num_layers * core * (0.5 if causal else 1.0)


def forward_costs(config: ModelConfig, seq_len: int) -> tuple[list[float], float]:
    """Multiply-adds of one token's forward pass: of each main layer, and of all that follows the last one.

    What follows is the output head, and for every prediction depth its projection, its layer and the head again.
    """
    core = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len / 2
    moe = _moe_layer(config, config.num_experts_per_tok) + core
    dense = _attention(config) + 3 * config.hidden_size * config.intermediate_size + core
    head = float(config.hidden_size * config.vocab_size)
    depth = 2 * config.hidden_size**2 + moe + head
    layers = [moe if index >= config.first_k_dense_replace else dense for index in range(config.num_hidden_layers)]
    return layers, head + config.num_nextn_predict_layers * depth
