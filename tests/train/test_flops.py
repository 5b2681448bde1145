"""Counts of DeepSeek-V3 and of random shapes, against the tensors of a model laid out without memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.reference import LocalDispatch
from tests.train.model_cases import V3, random_config, random_dense_config
from train.flops import forward_costs, parameter_counts, training_flops_per_token
from train.model.config import ModelConfig
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine


def layout(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, LocalDispatch(config.n_routed_experts), everywhere(TorchEngine()))


def held(model: Transformer, prefix: str) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(prefix))


def test_deepseek_v3() -> None:
    counts = parameter_counts(V3)
    model = layout(V3)
    assert held(model, "") - held(model, "mtp.") == counts.total == 671_026_404_352
    assert counts.router_biases == 14_848
    assert sum(b.numel() for name, b in model.named_buffers() if name.startswith("layers.")) == 14_848
    assert held(model, "mtp.") == counts.mtp == 11_610_067_968
    assert round(counts.activated / 1e9, 3) == 36.626


@pytest.mark.parametrize("seed", range(20))
def test_formulas_count_what_a_model_holds(seed: int) -> None:
    config = random_config(seed, num_nextn_predict_layers=seed % 3)
    counts, model = parameter_counts(config), layout(config)
    assert held(model, "mtp.") == counts.mtp
    assert held(model, "") == counts.total + counts.mtp
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert counts.activated == counts.total - held(model, "embed_tokens") - config.num_moe_layers * idle
    assert counts.mtp_activated == counts.mtp - config.num_nextn_predict_layers * idle


@pytest.mark.parametrize("seed", range(10))
def test_formulas_count_what_a_dense_model_holds(seed: int) -> None:
    config = random_dense_config(seed, num_nextn_predict_layers=seed % 3)
    counts, model = parameter_counts(config), layout(config)
    assert held(model, "mtp.") == counts.mtp == counts.mtp_activated
    assert held(model, "") == counts.total + counts.mtp
    assert counts.activated == counts.total - counts.embedding
    assert counts.router_biases == 0
    layers, rest = forward_costs(config, 32)
    core = config.num_attention_heads * config.head_dim * 32
    # Norms multiply no matrix.
    matrices = [p.numel() for name, p in model.named_parameters() if p.ndim == 2 and name != "embed_tokens.weight"]
    shared_head = config.num_nextn_predict_layers * counts.embedding
    depths = config.num_hidden_layers + config.num_nextn_predict_layers
    assert sum(layers) + rest == sum(matrices) + shared_head + depths * core


def test_flops_of_deepseek_v3_as_published() -> None:
    assert round(training_flops_per_token(V3, 4096) / 1e9) == 250
    assert round(training_flops_per_token(V3, 4096, causal=False) / 1e9) == 281
    extra = training_flops_per_token(V3, 4096, mtp=True) - training_flops_per_token(V3, 4096)
    deeper = replace(V3, num_nextn_predict_layers=2)
    assert training_flops_per_token(deeper, 4096, mtp=True) - training_flops_per_token(V3, 4096) == 2 * extra
