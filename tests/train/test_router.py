"""The router against a plain reading of the report, and what must not change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import reference
from tests.train.model_cases import TINY, build, random_config
from train.model.layers import Backend
from train.model.router import Router, largest
from train.precision.grads import attach_main_grads
from train.precision.linear import TorchEngine


def make(config=TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> Router:
    router = Router(config, Backend(TorchEngine())).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(router.weight, generator=generator)
    torch.nn.init.normal_(router.e_score_correction_bias, 0.0, 0.5, generator=generator)
    attach_main_grads(router)
    return router


def states(config=TINY, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, config.hidden_size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("seed", range(40))
def test_routing_is_what_the_report_says(seed: int) -> None:
    config = random_config(seed)
    router, x = make(config, seed=seed), states(config)
    routing = router(x)
    scores = torch.sigmoid(x.flatten(0, 1) @ router.weight.T)
    chosen = reference.select(
        scores.detach(), router.e_score_correction_bias, config.n_group, config.topk_group, config.num_experts_per_tok
    )
    assert routing.indices.tolist() == chosen
    for t, experts in enumerate(chosen):
        weights = torch.stack([scores[t, e] for e in experts])
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        torch.testing.assert_close(routing.weights[t], weights * config.routed_scaling_factor)
    balance = sum(reference.balance_loss(part, config.num_experts_per_tok) for part in scores.view(2, 9, -1))
    torch.testing.assert_close(routing.stats.balance, balance)
    assert routing.stats.load.tolist() == [sum(e in row for row in chosen) for e in range(config.n_routed_experts)]


def test_gradients_of_weights_and_balance() -> None:
    router, x = make(), states().requires_grad_()
    routing = router(x)
    d_weights = torch.randn_like(routing.weights)
    ((routing.weights * d_weights).sum() + 0.1 * routing.stats.balance).backward()
    twin_x, twin_w = x.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    scores = torch.sigmoid(twin_x.flatten(0, 1) @ twin_w.T)
    weights = scores.gather(1, routing.indices)
    weights = weights / weights.sum(-1, keepdim=True) * TINY.routed_scaling_factor
    balance = sum(reference.balance_loss(part, TINY.num_experts_per_tok) for part in scores.view(2, 9, -1))
    ((weights * d_weights).sum() + 0.1 * balance).backward()
    torch.testing.assert_close(x.grad, twin_x.grad)
    torch.testing.assert_close(router.weight.main_grad, twin_w.grad)


def test_ties_go_to_the_lower_expert() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]])
    assert largest(values, 5).tolist() == [[1, 2, 4, 3, 5]]
    router = make()
    with torch.no_grad():
        router.weight.zero_()
        router.e_score_correction_bias.zero_()
    assert router(states()).indices.unique(dim=0).tolist() == [[0, 1, 2]]


def test_a_masked_group_is_never_selected_however_low_the_bias() -> None:
    router = make(replace(TINY, topk_group=1, num_experts_per_tok=2))
    router.e_score_correction_bias.fill_(-100.0)
    indices = router(states()).indices
    assert torch.equal(indices[:, 0] // 2, indices[:, 1] // 2)


def test_the_bias_selects_and_does_not_weigh() -> None:
    router, x = make(), states()
    before = router(x)
    router.e_score_correction_bias.add_(0.25)
    after = router(x)
    assert torch.equal(before.indices, after.indices)
    assert torch.equal(before.weights, after.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_whatever_the_model_and_autocast(dtype: torch.dtype) -> None:
    router, x = make(dtype=dtype), states(dtype=dtype).requires_grad_()
    router.e_score_correction_bias = router.e_score_correction_bias.float()
    plain = router(x)
    plain.weights.sum().backward()
    main_grad, dx = router.weight.main_grad.clone(), x.grad.clone()
    router.weight.main_grad.zero_()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
        cast.weights.sum().backward()
    assert plain.weights.dtype == cast.weights.dtype == torch.float32
    assert torch.equal(plain.indices, cast.indices)
    assert torch.equal(plain.weights, cast.weights)
    assert torch.equal(main_grad, router.weight.main_grad)
    assert torch.equal(dx, x.grad)


def test_load_counts_only_in_training_with_gradients() -> None:
    model, x = build(TINY), states()
    router = model.routers()[0]
    assert router(x).stats.load.sum() == 2 * 9 * TINY.num_experts_per_tok
    with torch.no_grad():
        assert not router(x).stats.load.any()
    assert not router.eval()(x).stats.load.any()
