"""Our models against `transformers`' DeepSeek-V3 and V2, and, where it has none, against a plain reading of the papers.

The weights are the same, moved to the oracles through the names on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.linalg import vector_norm as norm
from torch.nn.functional import cross_entropy

from tests.plain_run import PlainModel, Sums
from tests.train.model_cases import (
    build,
    gradients_in_our_names,
    hugging_face,
    random_config,
    random_routing,
    random_tokens,
    random_v2_config,
    share_frequencies,
    with_grouped_attention,
)
from train.compose import compose
from train.model.attention.rope import rotation_table
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.tape import Inline, drive

NUM_SHAPES = 24

# The oracle's norms, router and rotary tables are float32 in every model, which bounds what float64 can show.
TOLERANCE = 1e-5


# With its float32 in float64 all of DeepSeek-V2's oracle is, but for the rotary tables, which both sides round alike
# from the same frequencies.
FP64 = 1e-11


def in_float64(module: Any) -> Any:
    """`torch` as one of the oracle's modules sees it while its float32 is float64."""

    def polar(magnitude: Tensor, angle: Tensor) -> Tensor:
        """torch's own differs by a float32 rounding from cosine and sine, which the tables of ours are."""
        return torch.complex(magnitude * angle.cos(), magnitude * angle.sin())

    return SimpleNamespace(**{**vars(module.torch), "float32": torch.float64, "polar": polar})


@contextmanager
def v2_in_float64() -> Iterator[None]:
    """DeepSeek-V2's oracle with norms, router and rotation in float64: as released it rounds to float32 on the way."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module

    rotate = module.apply_rotary_emb

    def rotate_in_float64(*args: Any, **kwargs: Any) -> Any:
        copied = partial(Tensor.to, dtype=torch.float64, memory_format=torch.contiguous_format, copy=True)
        with mock.patch.object(Tensor, "float", lambda x: copied(x)):
            return rotate(*args, **kwargs)

    with mock.patch.multiple(module, torch=in_float64(module), apply_rotary_emb=rotate_in_float64):
        yield


def assert_parity(
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int,
    seq_len: int,
    tolerance: float = TOLERANCE,
    attention: str = "eager",
) -> None:
    """Routes, logits, loss and the gradient of every parameter agree."""
    model = build(config, dtype, seed)
    oracle = hugging_face(config, model.state_dict(), dtype, attention)
    share_frequencies(oracle, config)
    tokens = random_tokens(config, 2, seq_len, seed)

    routes, expected_routes = [], []
    for router in model.routers().values():
        router.register_forward_hook(lambda _, __, routing: routes.append((routing.indices, routing.weights)))
    for layer in oracle.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: expected_routes.append((out[2], out[1])))

    with torch.no_grad():
        x = model.embed_tokens(tokens[:, :-1])
        x = drive(model.run_layers(x, LossTerms(0, 0, 0), Inline(), model.empty_findings(x.device)))
        logits = model.lm_head(model.norm(x))
    expected_logits = oracle(input_ids=tokens[:, :-1]).logits
    # Not the oracle's own loss, which is float32 in every model.
    expected_loss = cross_entropy(expected_logits.flatten(0, 1), tokens[:, 1:].flatten())

    assert len(routes) == len(expected_routes) == config.num_moe_layers
    for (indices, weights), (expected_indices, expected_weights) in zip(routes, expected_routes, strict=True):
        indices, order = indices.sort(-1)
        expected_indices, expected_order = expected_indices.sort(-1)
        assert torch.equal(indices, expected_indices)
        expected = expected_weights.gather(1, expected_order).to(weights.dtype)
        torch.testing.assert_close(weights.gather(1, order), expected, rtol=tolerance, atol=0.1 * tolerance)

    assert (logits - expected_logits).abs().max() <= tolerance * expected_logits.abs().max()

    num_tokens = tokens[:, 1:].numel()
    output = model(tokens, LossTerms(main=1 / num_tokens, mtp=0.0, balance=0.0))
    assert output.total.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    output.total.backward()
    expected_loss.backward()
    expected_grads = gradients_in_our_names(oracle, config)
    assert set(expected_grads) == {name for name, _ in model.named_parameters()}
    # With one normalised expert a token the router's gradient is exactly zero: rounding is all there is to compare.
    floor = 1e-3 * tolerance * norm(torch.stack([norm(grad) for grad in expected_grads.values()]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        error = norm(parameter.main_grad - expected_grads[name])
        assert error <= tolerance * norm(expected_grads[name]) + floor, (name, error, config)


@pytest.mark.parametrize("seed", range(NUM_SHAPES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_random_shapes_agree_with_transformers(dtype: torch.dtype, seed: int) -> None:
    assert_parity(random_config(seed), dtype, seed, seq_len=5 + seed)


@pytest.mark.parametrize("with_yarn", [False, True])
def test_a_long_sequence_in_many_groups(with_yarn: bool) -> None:
    """Longer than YaRN's original context, past the head's first chunk, with biases that exclude whole groups."""
    yarn = {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = random_config(
        7,
        n_routed_experts=32,
        n_group=8,
        topk_group=3,
        num_experts_per_tok=5,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        qk_rope_head_dim=16,
        max_position_embeddings=2560,
        rope_scaling=yarn if with_yarn else None,
    )
    assert_parity(config, torch.float64, seed=1, seq_len=293)


@pytest.mark.parametrize("seed", range(NUM_SHAPES))
def test_random_shapes_of_v2_agree_in_fp64(seed: int) -> None:
    with v2_in_float64():
        assert_parity(random_v2_config(seed), torch.float64, seed, 5 + seed, FP64, attention="sdpa")


@pytest.mark.parametrize("seed", range(0, NUM_SHAPES, 4))
def test_random_shapes_of_v2_agree_with_the_model_as_it_is_released(seed: int) -> None:
    assert_parity(random_v2_config(seed), torch.float64, seed, 5 + seed)


class Reader(PlainModel):
    """Keeps the logits of each sequence."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logits: list[Tensor] = []

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, depth: int) -> Tensor:
        self.logits.append((hidden @ self.weights["lm_head.weight"].t()).detach())
        return super()._cross_entropy(hidden, labels, depth)


def weighed(sums: Sums) -> Tensor:
    return 0.3 * sums.main + 0.2 * sums.balance + 0.5 * sums.device + 0.7 * sums.comm


@pytest.mark.parametrize("seed", range(NUM_SHAPES))
def test_any_routing_beside_multi_head_attention_agrees_with_a_plain_reading(seed: int) -> None:
    """DeepSeekMoE (arXiv 2401.06066, Eq. 9-17) has no model in `transformers`; other routers ride along."""
    config = random_routing(seed) if seed % 2 else random_v2_config(seed)
    config = with_grouped_attention(config, config.num_attention_heads, 2 + 2 * (seed % 5))
    model, tokens = build(config, seed=seed), random_tokens(config, 2, 5 + seed, seed)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    biases = {n: getattr(r, "e_score_correction_bias", torch.zeros(r.num_experts)) for n, r in model.routers().items()}
    plain = Reader(config, weights, torch.stack([*biases.values()]) if biases else torch.zeros(0, 0))
    sums = plain(tokens)
    weighed(sums).backward()
    with torch.no_grad():
        x = model.embed_tokens(tokens[:, :-1])
        x = drive(model.run_layers(x, LossTerms(0, 0, 0), Inline(), model.empty_findings(x.device)))
        torch.testing.assert_close(model.lm_head(model.norm(x)), torch.stack(plain.logits), rtol=FP64, atol=FP64)
    output = model(tokens, LossTerms(main=0.3, mtp=0.0, balance=0.2, device_balance=0.5, comm_balance=0.7))
    torch.testing.assert_close(output.total, weighed(sums).detach(), rtol=FP64, atol=0.0)
    output.total.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in weights.items()}
    floor = 1e-3 * FP64 * norm(torch.stack([norm(grad) for grad in grads.values()]))
    for name, parameter in model.named_parameters():
        assert norm(parameter.main_grad - grads[name]) <= FP64 * norm(grads[name]) + floor, (name, config)


def test_v2_takes_all_of_yarns_magnitude_into_the_scores() -> None:
    """sqrt(t) = 0.0707 ln s + 1 with s = 40 (DeepSeek-V2, section 3.1.4), on the scores and so squared."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707}
    yarn |= {"mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
    published = compose(["experiment=deepseek_v2"]).model
    long = replace(published, rope_scaling=yarn, max_position_embeddings=163_840)
    long.check()
    scales = [config.attention_sizes.softmax_scale for config in (long, published)]
    assert scales[0] / scales[1] == pytest.approx((0.0707 * math.log(40) + 1) ** 2)
    table = rotation_table(long, 7, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(table.abs(), torch.ones_like(table.abs()), rtol=1e-6, atol=0.0)


def test_the_shapes_cover_what_they_claim() -> None:
    v2 = [random_v2_config(seed) for seed in range(NUM_SHAPES)]
    assert {config.topk_method for config in v2} == {"group_limited_greedy", "greedy"}
    assert {config.topk_group < config.n_group for config in v2} == {True, False}
    assert {config.rope_scaling is None for config in v2} == {True, False}
    assert {config.routed_scaling_factor for config in v2} == {1.0, 16.0}
    configs = [random_config(seed) for seed in range(NUM_SHAPES)]
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert {config.q_lora_rank is None for config in configs} == {True, False}
    assert {config.n_shared_experts for config in configs} == {1, 2, 0, None}
    assert {config.n_shared_experts for config in v2} == {1, 2, 0, None}
    assert {config.topk_group < config.n_group for config in configs} == {True, False}
    assert {config.norm_topk_prob for config in configs} == {True, False}
    assert any(config.v_head_dim > config.attention_sizes.qk_head_dim for config in configs)
    assert any(config.first_k_dense_replace == config.num_hidden_layers for config in configs)


def test_the_oracle_never_selects_a_masked_expert() -> None:
    """Earlier versions masked with 0, which beats a negative biased score: such a version is no oracle."""
    config = random_config(
        3,
        n_routed_experts=8,
        n_group=4,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        num_hidden_layers=1,
    )
    model = build(config, torch.float32)
    for router in model.routers().values():
        router.e_score_correction_bias.fill_(-5.0)
    oracle = hugging_face(config, model.state_dict(), torch.float32)
    x = torch.randn(11, config.hidden_size, generator=torch.Generator().manual_seed(0))
    _, _, indices = oracle.model.layers[0].mlp.gate(x)
    assert torch.equal(indices[:, 0] // 2, indices[:, 1] // 2)
    assert torch.equal(model.routers()[0](x.unsqueeze(0)).indices.sort(-1)[0], indices.sort(-1)[0])
