"""Our model against `transformers`' DeepseekV3ForCausalLM: the same weights, moved through the names on disk."""

from __future__ import annotations

import pytest
import torch
from torch.linalg import vector_norm as norm
from torch.nn.functional import cross_entropy

from tests.train.model_cases import build, gradients_in_our_names, hugging_face, random_config, random_tokens
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.tape import Inline, drive

NUM_SHAPES = 24

# The oracle's norms, router and rotary tables are float32 in every model, which bounds what float64 can show.
TOLERANCE = 1e-5


def assert_parity(config: ModelConfig, dtype: torch.dtype, seed: int, seq_len: int) -> None:
    model = build(config, dtype, seed)
    oracle = hugging_face(config, model.state_dict(), dtype)
    tokens = random_tokens(config, 2, seq_len, seed)

    routes, expected_routes = [], []
    for router in model.routers().values():
        router.register_forward_hook(lambda _, __, routing: routes.append((routing.indices, routing.weights)))
    for layer in oracle.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: expected_routes.append((out[2], out[1])))

    with torch.no_grad():
        x = model.embed_tokens(tokens[:, :-1])
        x = drive(model.run_layers(x, LossTerms(0, 0, 0), Inline(), model.empty_report(x.device)))
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
        torch.testing.assert_close(weights.gather(1, order), expected, rtol=1e-5, atol=1e-6)

    assert (logits - expected_logits).abs().max() <= TOLERANCE * expected_logits.abs().max()

    num_tokens = tokens[:, 1:].numel()
    output = model(tokens, LossTerms(main=1 / num_tokens, mtp=0.0, balance=0.0))
    assert output.total.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    output.total.backward()
    expected_loss.backward()
    expected_grads = gradients_in_our_names(oracle, config)
    assert set(expected_grads) == {name for name, _ in model.named_parameters()}
    # With one normalised expert a token the router's gradient is exactly zero: rounding is all there is to compare.
    floor = 1e-8 * norm(torch.stack([norm(grad) for grad in expected_grads.values()]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        error = norm(parameter.main_grad - expected_grads[name])
        assert error <= TOLERANCE * norm(expected_grads[name]) + floor, (name, error, config)


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


def test_the_shapes_cover_what_they_claim() -> None:
    configs = [random_config(seed) for seed in range(NUM_SHAPES)]
    assert {config.rope_scaling is None for config in configs} == {True, False}
    assert {config.q_lora_rank is None for config in configs} == {True, False}
    assert {config.n_shared_experts for config in configs} == {1, 2}
    assert {config.topk_group < config.n_group for config in configs} == {True, False}
    assert {config.norm_topk_prob for config in configs} == {True, False}
    assert any(config.v_head_dim > config.qk_head_dim for config in configs)
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
