"""Random model shapes and the oracle, shared by the model's tests."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.expert.dispatch import LocalDispatch as CodedDispatch
from tests.bounds import gamma
from tests.reference import LocalDispatch
from tests.train.disk_names import from_hf, to_hf
from train.model.attention.rope import _frequencies
from train.model.config import SCORING_FUNCS, TOPK_METHODS, ModelConfig
from train.model.init import init_weights
from train.model.kernels import Kernels
from train.model.router import BiasedRouter
from train.model.transformer import Transformer
from train.precision.build import everywhere, row_codec
from train.precision.engine import Engine
from train.precision.grads import attach_main_grads
from train.precision.torch_engine import TorchEngine

TINY = ModelConfig(
    vocab_size=89,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=3,
    kv_lora_rank=10,
    qk_nope_head_dim=7,
    qk_rope_head_dim=6,
    v_head_dim=5,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=2,
    q_lora_rank=14,
    max_position_embeddings=64,
    initializer_range=0.08,
)


def without_experts(config: ModelConfig) -> ModelConfig:
    """The small model with dense layers alone."""
    sizes = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
    layers = {"n_routed_experts": 0, "first_k_dense_replace": config.num_hidden_layers}
    choices = {"routed_scaling_factor": 2.5, "norm_topk_prob": True}
    return replace(config, **dict.fromkeys(sizes), **layers, **choices)


def with_grouped_attention(config: ModelConfig, num_key_value_heads: int, head_dim: int) -> ModelConfig:
    """The small model with grouped-query attention."""
    latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    grouped = {"num_key_value_heads": num_key_value_heads, "head_dim": head_dim}
    return replace(config, attention="gqa", **dict.fromkeys(latent), **grouped)


TINY_DENSE = with_grouped_attention(without_experts(TINY), num_key_value_heads=1, head_dim=8)

# DeepSeek-V3 as published (technical report, section 4.2).
V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=3,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    max_position_embeddings=4096,
)


def random_config(seed: int, **fixed: Any) -> ModelConfig:
    """A legal model of random small sizes, multiples of nothing in particular."""
    draw = random.Random(seed)
    num_layers, num_groups = draw.randint(1, 4), draw.choice([1, 2, 3, 4])
    group_size = draw.randint(2, 5)
    kept = draw.randint(1, num_groups)
    yarn = {
        "type": "yarn",
        "factor": draw.choice([4.0, 40.0]),
        "original_max_position_embeddings": draw.choice([8, 16, 64]),
        "beta_fast": draw.choice([4, 32]),
        "beta_slow": 1,
        "mscale": draw.choice([1.0, 0.7]),
        "mscale_all_dim": 1.0,
    }
    config = ModelConfig(
        vocab_size=draw.randint(30, 300),
        hidden_size=draw.randint(12, 70),
        intermediate_size=draw.randint(9, 80),
        moe_intermediate_size=draw.randint(5, 40),
        num_hidden_layers=num_layers,
        num_attention_heads=draw.randint(1, 5),
        kv_lora_rank=draw.randint(5, 40),
        qk_nope_head_dim=draw.randint(1, 19),
        qk_rope_head_dim=2 * draw.randint(1, 8),
        v_head_dim=draw.randint(3, 40),
        n_routed_experts=num_groups * group_size,
        n_shared_experts=random.Random(f"shared {seed}").choice([draw.randint(1, 2), 0, None, 1, 2]),
        num_experts_per_tok=draw.randint(1, min(6, kept * group_size)),
        n_group=num_groups,
        topk_group=kept,
        first_k_dense_replace=draw.randint(0, num_layers),
        num_nextn_predict_layers=0,
        q_lora_rank=draw.choice([None, draw.randint(5, 40)]),
        max_position_embeddings=64,
        routed_scaling_factor=draw.choice([1.0, 2.5]),
        norm_topk_prob=draw.random() < 0.8,
        initializer_range=0.08,
        rms_norm_eps=draw.choice([1e-6, 1e-5]),
        rope_theta=draw.choice([100.0, 10000.0]),
        rope_scaling=yarn if draw.random() < 0.4 else None,
    )
    return replace(config, **fixed)


def random_routing(seed: int, **fixed: Any) -> ModelConfig:
    """A random model whose router is any of those that can be built."""
    draw = random.Random(f"routing {seed}")
    config = random_config(seed, **fixed)
    method = draw.choice(TOPK_METHODS)
    kept = config.n_group if method == "greedy" else config.topk_group
    return replace(config, scoring_func=draw.choice(SCORING_FUNCS), topk_method=method, topk_group=kept)


def random_v2_config(seed: int, **fixed: Any) -> ModelConfig:
    """A model of random small sizes as DeepSeek-V2 and V2-Lite are, which `transformers` can hold too."""
    draw = random.Random(f"v2 {seed}")
    config = random_config(seed)
    method = draw.choice(["group_limited_greedy", "greedy"])
    heads = config.num_attention_heads
    changes: dict[str, Any] = {
        "hidden_size": heads * max(3, config.hidden_size // heads),
        "scoring_func": "softmax",
        "topk_method": method,
        "topk_group": config.n_group if method == "greedy" else config.topk_group,
        "norm_topk_prob": False,
        "routed_scaling_factor": draw.choice([1.0, 16.0]),
    }
    if config.rope_scaling is not None:
        # As released: sqrt(t) = 0.0707 ln s + 1, all of it in the scores and none in the rotation.
        changes["rope_scaling"] = config.rope_scaling | {"mscale": 0.707, "mscale_all_dim": 0.707}
    return replace(config, **changes, **fixed)


def random_dense_config(seed: int, **fixed: Any) -> ModelConfig:
    """A legal dense model with grouped-query attention, of random small sizes."""
    draw = random.Random(f"dense {seed}")
    config, num_kv_heads = without_experts(random_config(seed)), draw.randint(1, 4)
    config = with_grouped_attention(config, num_kv_heads, 2 * draw.randint(1, 12))
    heads = num_kv_heads * draw.choice([1, 2, 3])
    # The oracle insists on a width that the heads divide.
    return replace(config, num_attention_heads=heads, hidden_size=heads * draw.randint(3, 9), **fixed)


def build(
    config: ModelConfig,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    kernels: Kernels | None = None,
    engines: Mapping[str, Engine] | None = None,
    **parts: Any,
) -> Transformer:
    """A model with all experts, seeded weights, router biases that matter, norms that are not one."""
    engines = engines or everywhere(TorchEngine())
    codec = row_codec(engines, config.hidden_size)
    num_experts = config.n_routed_experts
    dispatch = LocalDispatch(num_experts) if codec is None else CodedDispatch(num_experts, codec=codec)
    with torch.device("meta"):
        model = Transformer(config, dispatch, engines, kernels, **parts)
    init_weights(model, seed, dtype, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
        for router in model.routers().values():
            if isinstance(router, BiasedRouter):
                bias = router.e_score_correction_bias
                bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    attach_main_grads(model)
    return model


def random_tokens(config: ModelConfig, num_sequences: int, seq_len: int, seed: int = 0) -> Tensor:
    """[num_sequences, seq_len + 1]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (num_sequences, seq_len + 1), generator=generator)


def hugging_face(config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype, attention: str = "eager") -> Any:
    """`transformers`' model of this shape, loaded from our state under the names of a checkpoint on disk.

    Its DeepSeek-V3 where routers have biases, else its DeepSeek-V2, which knows softmax scores without normalisation
    only, and wants a width that the heads divide. attention: its implementation.
    """
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    of_config, of_model = (
        (DeepseekV3Config, DeepseekV3ForCausalLM)
        if config.has_router_bias
        else (DeepseekV2Config, DeepseekV2ForCausalLM)
    )
    scaling = dict(config.rope_scaling or {})
    scaling["rope_type"] = scaling.pop("type", "default")
    ours_alone = ("rope_theta", "rope_scaling", "attention", "num_key_value_heads", "head_dim", "n_shared_experts")
    theirs = of_config(
        **{key: value for key, value in vars(config).items() if key not in ours_alone},
        n_shared_experts=config.n_shared_experts or 0,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters={"rope_theta": config.rope_theta, **scaling},
        use_cache=False,
        attn_implementation=attention,
        experts_implementation="eager",
    )
    disk = {name: tensor.detach().clone() for name, tensor in to_hf(state, config).items()}
    with no_shared_experts_are_matrices_without_elements():
        return of_model.from_pretrained(None, config=theirs, state_dict=disk, dtype=dtype).train()


@contextmanager
def no_shared_experts_are_matrices_without_elements() -> Iterator[None]:
    """In `transformers`' models, of which torch warns that there is nothing to initialise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield


def llama(config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """`transformers`' Llama of this dense shape, loaded from our state under the names of a checkpoint on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = dict(config.rope_scaling or {})
    scaling["rope_type"] = scaling.pop("type", "default")
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range")
    theirs = LlamaConfig(
        **{key: getattr(config, key) for key in shared},
        rope_parameters={"rope_theta": config.rope_theta, **scaling},
        use_cache=False,
        attn_implementation="sdpa",  # the eager one takes its softmax in float32
    )
    disk = {name: tensor.detach().clone() for name, tensor in to_hf(state, config).items()}
    return LlamaForCausalLM.from_pretrained(None, config=theirs, state_dict=disk, dtype=dtype).train()


def share_frequencies(oracle: Any, config: ModelConfig) -> None:
    """Let the oracle rotate by our frequencies: YaRN's are blends, which both round to float32 in another order."""
    ours, theirs = _frequencies(config, torch.device("cpu")), oracle.model.rotary_emb.inv_freq
    rope_dim = config.attention_sizes.rope_dim
    unstretched = config.rope_theta ** -(torch.arange(0, rope_dim, 2).double() / rope_dim)
    # A power, quotients, a product with a share of at most 1, a sum.
    assert bool(((ours.double() - theirs).abs() <= 2 * gamma(8, torch.float32) * unstretched).all())
    theirs.copy_(ours)


def gradients_in_our_names(oracle: Any, config: ModelConfig) -> dict[str, Tensor]:
    """The oracle's gradients, taken apart to disk names and put together under ours."""
    disk = {}
    for name, parameter in oracle.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name.endswith("experts.gate_up_proj"):
            prefix, inter = name.removesuffix("gate_up_proj"), config.moe_intermediate_size
            for expert in range(config.n_routed_experts):
                disk[f"{prefix}{expert}.gate_proj.weight"] = grad[expert, :inter]
                disk[f"{prefix}{expert}.up_proj.weight"] = grad[expert, inter:]
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            disk.update({f"{prefix}{expert}.down_proj.weight": grad[expert] for expert in range(len(grad))})
        else:
            disk[name] = grad
    disk.update({name: buffer for name, buffer in oracle.named_buffers() if name.endswith("correction_bias")})
    ours = from_hf(disk, config)
    return {name: grad for name, grad in ours.items() if not name.endswith("correction_bias")}


def added(*all_metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of several micro-batches, each summed by its name."""
    total: dict[str, Tensor] = {}
    for metrics in all_metrics:
        total |= {name: total[name] + value if name in total else value for name, value in metrics.items()}
    return total


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two micro-batches have the same metrics, each the same to the last bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
