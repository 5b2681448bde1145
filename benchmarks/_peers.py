"""A DeepSeek-V3-shaped model and AdamW in other frameworks: sides of `benchmarks.step`.

Each builder takes a `ModelConfig` and gives (model, loss), where loss(inputs [B, S], labels [B, S]) is the mean
cross-entropy in nats to call backward on. A framework that is not installed raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from train.model.config import ModelConfig

Peer = tuple[Any, Callable[[Tensor, Tensor], Tensor]]


def transformers(config: ModelConfig) -> Peer:
    """Hugging Face's DeepseekV3ForCausalLM with its defaults: experts by grouped products, SDPA."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    same = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "n_shared_experts n_routed_experts routed_scaling_factor kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim "
        "qk_nope_head_dim n_group topk_group num_experts_per_tok first_k_dense_replace norm_topk_prob rms_norm_eps "
        "initializer_range max_position_embeddings"
    )
    theirs = DeepseekV3Config(
        **{key: getattr(config, key) for key in same.split()},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        use_cache=False,
    )
    model = DeepseekV3ForCausalLM(theirs).train()
    return model, lambda inputs, labels: model(input_ids=inputs, labels=labels, shift_labels=labels).loss


def transformers_compiled(config: ModelConfig) -> Peer:
    """The model of transformers behind torch.compile."""
    model, loss = transformers(config)
    model.forward = torch.compile(model.forward)
    return model, loss


def torchtitan(config: ModelConfig) -> Peer:
    """torchtitan's deepseek_v3 as shipped but for attention; its experts multiply in bf16 whatever the model's type."""
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import Embedding, Linear, RMSNorm

    hidden = config.hidden_size
    model = deepseek_v3.DeepSeekV3Model.Config(
        vocab_size=config.vocab_size,
        dim=hidden,
        tok_embeddings=Embedding.Config(
            num_embeddings=config.vocab_size, embedding_dim=hidden, param_init=deepseek_v3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=hidden, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=hidden, out_features=config.vocab_size, param_init=deepseek_v3._output_linear_init(hidden)
        ),
        layers=_titan_layers(config),
        mtp_layers=[],
    ).build()
    model.init_states()
    model.train()

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(inputs.shape[1]).expand_as(inputs)
        return F.cross_entropy(model(inputs, positions=positions).flatten(0, 1).float(), labels.flatten())

    return model, loss


def _titan_layers(config: ModelConfig) -> Any:
    """Its layers with its own SDPA module put in for every attention backend.

    It refuses that module for language models, but the backends it allows cannot train on a CPU: flex attention has no
    backward there, and the others need a GPU.
    """
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, attention

    def sdpa(backend: str) -> Any:
        return attention.ScaledDotProductAttention.Config()

    with mock.patch.object(deepseek_v3, "get_attention_config", sdpa):
        return deepseek_v3._build_dsv3_layers(
            n_layers=config.num_hidden_layers,
            n_dense_layers=config.first_k_dense_replace,
            dim=config.hidden_size,
            n_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            mscale=1.0,
            dense_hidden_dim=config.intermediate_size,
            moe_hidden_dim=config.moe_intermediate_size,
            num_experts=config.n_routed_experts,
            num_shared_experts=config.n_shared_experts,
            router_top_k=config.num_experts_per_tok,
            router_score_func="sigmoid",
            router_num_expert_groups=config.n_group,
            router_num_limited_groups=config.topk_group,
            router_route_scale=config.routed_scaling_factor,
            router_route_norm=config.norm_topk_prob,
            attn_backend="flex",
            moe_comm_backend="standard",
            non_blocking_capacity_factor=None,
            rope=ComplexRoPE.Config(
                dim=config.qk_rope_head_dim,
                max_seq_len=config.max_position_embeddings,
                theta=config.rope_theta,
                scaling="none",
            ),
        )


def torchtitan_fp32_experts(config: ModelConfig) -> Peer:
    """torchtitan with the casts to bf16 left out of its experts: the arithmetic of the other sides."""
    model, loss = torchtitan(config)
    for layer in model.layers.values():
        if layer.moe_enabled:
            experts = layer.moe.routed_experts.inner_experts
            experts.forward = _uncast_experts.__get__(experts)
    return model, loss


def _uncast_experts(experts: Any, x: Tensor, num_tokens: Tensor) -> Tensor:
    ends = num_tokens.cumsum(0, dtype=torch.int32)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)

    return product(F.silu(product(x, experts.w1_EFD)) * product(x, experts.w3_EFD), experts.w2_EDF)
