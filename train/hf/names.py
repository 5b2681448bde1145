"""One table between our names and those of a Hugging Face checkpoint (DeepSeek-V3, Llama), read in both directions.

On disk every expert has its own tensors, gate and up are apart, and prediction depth k is layer `num_hidden_layers +
k`. Here experts are stacked and gate and up joined, so a disk tensor is a slice of one of ours. Rows of queries and
keys have the same order on both sides: each kind of attention rotates the pairs that its published weights have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from train.model.config import ModelConfig, given

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Entry:
    """The disk tensor `theirs` is `ours[expert, rows]`; None means all of that dimension."""

    ours: str
    theirs: str
    expert: int | None = None
    rows: slice | None = None


def table(config: ModelConfig) -> Iterator[Entry]:
    """Every parameter and router bias of the model, each element exactly once."""
    yield Entry("embed_tokens.weight", "model.embed_tokens.weight")
    for index in range(config.num_hidden_layers):
        yield from _layer(config, f"layers.{index}", f"model.layers.{index}", index >= config.first_k_dense_replace)
    yield Entry("norm.weight", "model.norm.weight")
    yield Entry("lm_head.weight", "lm_head.weight")
    for k, prefix in enumerate(_mtp_prefixes(config)):
        for name in ("enorm", "hnorm", "eh_proj"):
            yield Entry(f"mtp.{k}.{name}.weight", f"{prefix}.{name}.weight")
        yield Entry(f"mtp.{k}.norm.weight", f"{prefix}.shared_head.norm.weight")
        yield from _layer(config, f"mtp.{k}.layer", prefix, is_moe=config.n_routed_experts > 0)


def parameters(config: ModelConfig) -> list[str]:
    """Our names of all parameters, router biases excepted, which are none."""
    return list(dict.fromkeys(each.ours for each in table(config) if not each.ours.endswith(BIAS)))


def copies(config: ModelConfig) -> Iterator[Entry]:
    """The copies of embedding and head that a checkpoint stores with every prediction depth."""
    for prefix in _mtp_prefixes(config):
        yield Entry("embed_tokens.weight", f"{prefix}.embed_tokens.weight")
        yield Entry("lm_head.weight", f"{prefix}.shared_head.head.weight")


def _mtp_prefixes(config: ModelConfig) -> list[str]:
    return [f"model.layers.{config.num_hidden_layers + k}" for k in range(config.num_nextn_predict_layers)]


def _layer(config: ModelConfig, ours: str, theirs: str, is_moe: bool) -> Iterator[Entry]:
    attention = (f"self_attn.{name}" for name in config.attention_sizes.modules)
    names = ["input_layernorm", "post_attention_layernorm", *attention]
    for name in names + (["mlp.gate"] if is_moe else []):
        yield Entry(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
    if not is_moe:
        yield from _feed_forward(f"{ours}.mlp", f"{theirs}.mlp", config.intermediate_size)
        return
    inter = given(config.moe_intermediate_size)
    if config.has_router_bias:
        yield Entry(f"{ours}.mlp.gate.{BIAS}", f"{theirs}.mlp.gate.{BIAS}")
    if config.shared_intermediate_size:
        shared = "mlp.shared_experts"
        yield from _feed_forward(f"{ours}.{shared}", f"{theirs}.{shared}", config.shared_intermediate_size)
    for expert in range(config.n_routed_experts):
        prefix = f"{theirs}.mlp.experts.{expert}"
        yield Entry(f"{ours}.mlp.experts.gate_up_proj", f"{prefix}.gate_proj.weight", expert, slice(0, inter))
        yield Entry(f"{ours}.mlp.experts.gate_up_proj", f"{prefix}.up_proj.weight", expert, slice(inter, 2 * inter))
        yield Entry(f"{ours}.mlp.experts.down_proj", f"{prefix}.down_proj.weight", expert)


def _feed_forward(ours: str, theirs: str, inter: int) -> Iterator[Entry]:
    yield Entry(f"{ours}.gate_up_proj.weight", f"{theirs}.gate_proj.weight", None, slice(0, inter))
    yield Entry(f"{ours}.gate_up_proj.weight", f"{theirs}.up_proj.weight", None, slice(inter, 2 * inter))
    yield Entry(f"{ours}.down_proj.weight", f"{theirs}.down_proj.weight")
