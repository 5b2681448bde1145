"""Dense models with grouped-query attention against `transformers`' LlamaForCausalLM, through the names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import vector_norm as norm
from torch.nn.functional import cross_entropy

from tests.train.model_cases import (
    build,
    gradients_in_our_names,
    llama,
    random_dense_config,
    random_tokens,
    share_frequencies,
)
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.tape import Inline, drive

NUM_SHAPES = 24

# With its norms in float64 all of the oracle is, but for angles, whose float32 both sides round alike from the same
# frequencies. Sums of some hundred terms in another order, through a few layers, differ by some hundred roundings of
# 1.1e-16, were they all in one direction 1e-14. A norm makes at most 80 times as much of them: its least divisor is the
# root of 1e-6, where elements are 0.08. In 1500 draws the most was 3e-15.
FP64 = 1e-12
# As it is published its norms compute in float32 (roundings of 6e-8) in every model.
WITH_FLOAT32_NORMS = 1e-5


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """The oracle's RMSNorm by its own formula in the model's type; as released it rounds to float32 on the way."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield


def assert_parity(config: ModelConfig, dtype: torch.dtype, seed: int, seq_len: int, tolerance: float) -> None:
    """Logits, loss and the gradient of every parameter agree."""
    model = build(config, dtype, seed)
    oracle = llama(config, model.state_dict(), dtype)
    share_frequencies(oracle, config)
    tokens = random_tokens(config, 2, seq_len, seed)

    with torch.no_grad():
        x = model.embed_tokens(tokens[:, :-1])
        x = drive(model.run_layers(x, LossTerms(0, 0, 0), Inline(), model.empty_findings(x.device)))
        logits = model.lm_head(model.norm(x))
    expected_logits = oracle(input_ids=tokens[:, :-1]).logits
    # Not the oracle's own loss, which is float32 in every model.
    expected_loss = cross_entropy(expected_logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert (logits - expected_logits).abs().max() <= tolerance * expected_logits.abs().max()

    output = model(tokens, LossTerms(main=1 / tokens[:, 1:].numel(), mtp=0.0, balance=0.0))
    assert output.total.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    output.total.backward()
    expected_loss.backward()
    expected_grads = gradients_in_our_names(oracle, config)
    assert set(expected_grads) == {name for name, _ in model.named_parameters()}
    # Where a gradient cancels (queries, when all scores are nearly equal) what is left is the sums' rounding.
    floor = 0.1 * tolerance * norm(torch.stack([norm(grad) for grad in expected_grads.values()]))
    for name, parameter in model.named_parameters():
        error = norm(parameter.main_grad - expected_grads[name])
        assert error <= tolerance * norm(expected_grads[name]) + floor, (name, error, config)


@pytest.mark.parametrize("seed", range(NUM_SHAPES))
def test_random_shapes_agree_in_fp64(seed: int) -> None:
    with norms_in_float64():
        assert_parity(random_dense_config(seed), torch.float64, seed, 5 + seed, FP64)


@pytest.mark.parametrize("seed", range(0, NUM_SHAPES, 4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_random_shapes_agree_with_the_model_as_it_is_released(dtype: torch.dtype, seed: int) -> None:
    assert_parity(random_dense_config(seed), dtype, seed, 5 + seed, WITH_FLOAT32_NORMS)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(NUM_SHAPES, 10**9), seq_len=st.integers(1, 40))
def test_any_shape_agrees_in_fp64(seed: int, seq_len: int) -> None:
    with norms_in_float64():
        assert_parity(random_dense_config(seed), torch.float64, seed, seq_len, FP64)


@pytest.mark.parametrize("with_yarn", [False, True])
def test_a_long_sequence(with_yarn: bool) -> None:
    """Longer than YaRN's original context, past the head's first chunk."""
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64}
    yarn = yarn if with_yarn else None
    config = random_dense_config(7, head_dim=16, max_position_embeddings=2560, rope_scaling=yarn)
    with norms_in_float64():
        assert_parity(config, torch.float64, 1, 293, FP64)


def test_the_shapes_cover_what_they_claim() -> None:
    configs = [random_dense_config(seed) for seed in range(NUM_SHAPES)]
    groups = {config.num_attention_heads // config.num_key_value_heads for config in configs}
    assert groups == {1, 2, 3}
    assert {config.num_key_value_heads == 1 for config in configs} == {True, False}
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert {config.head_dim * config.num_attention_heads == config.hidden_size for config in configs} >= {False}


def test_neighbours_are_not_the_pairs_of_a_grouped_head() -> None:
    """Weights rotated as in latent attention give other logits: the comparison sees the layout."""
    from train.model.attention import kernels

    config = random_dense_config(1, head_dim=8)
    with norms_in_float64(), mock.patch.object(kernels, "rotate_halves", kernels.rotate), pytest.raises(AssertionError):
        assert_parity(config, torch.float64, 1, 9, FP64)
