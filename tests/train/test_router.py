"""The router against a plain reading of the report, and what must not change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import reference
from tests.train.model_cases import TINY, build, random_routing
from train.model.config import SCORING_FUNCS, TOPK_METHODS
from train.model.layers import Backend
from train.model.router import SCORINGS, BiasedRouter, Router, build_router, largest
from train.model.router import TOPK_METHODS as METHODS
from train.precision.build import everywhere
from train.precision.grads import attach_main_grads
from train.precision.torch_engine import TorchEngine


def make(config=TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> Router:
    router = build_router(config, Backend(everywhere(TorchEngine()))).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(router.weight, generator=generator)
    if isinstance(router, BiasedRouter):
        torch.nn.init.normal_(router.e_score_correction_bias, 0.0, 0.5, generator=generator)
    attach_main_grads(router)
    return router


def states(config=TINY, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 9, config.hidden_size, generator=generator, dtype=torch.float64).to(dtype)


def scored(config, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = x.flatten(0, 1) @ weight.T
    return torch.softmax(logits, -1) if config.scoring_func == "softmax" else torch.sigmoid(logits)


def chosen_by(config, router: Router, scores: torch.Tensor) -> list[list[int]]:
    biased = isinstance(router, BiasedRouter)
    bias = router.e_score_correction_bias if biased else torch.zeros(config.n_routed_experts)
    sizes = (config.n_group, config.topk_group, config.num_experts_per_tok)
    return reference.select(scores.detach(), bias, *sizes, strongest=2 if biased else 1)


def plain_balance(config, scores: torch.Tensor, chosen: list[list[int]]) -> list[torch.Tensor]:
    """Expert, device and communication loss of two sequences of 9 tokens."""
    counted = scores.topk(config.num_experts_per_tok).indices.tolist() if config.has_router_bias else chosen
    groups = (config.n_group, config.topk_group)
    parts = [
        reference.grouped_balance_losses(scores[of], chosen[of], counted[of], *groups)
        for of in (slice(0, 9), slice(9, 18))
    ]
    return [first + second for first, second in zip(*parts, strict=True)]


@pytest.mark.parametrize("seed", range(60))
def test_routing_is_what_the_reports_say(seed: int) -> None:
    config = random_routing(seed)
    router, x = make(config, seed=seed), states(config)
    routing = router(x)
    scores = scored(config, x, router.weight)
    chosen = chosen_by(config, router, scores)
    assert routing.indices.tolist() == chosen
    for t, experts in enumerate(chosen):
        weights = torch.stack([scores[t, e] for e in experts])
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        torch.testing.assert_close(routing.weights[t], weights * config.routed_scaling_factor)
    for loss, expected in zip(routing.stats[:3], plain_balance(config, scores, chosen), strict=True):
        torch.testing.assert_close(loss, expected)
    if config.has_router_bias:
        by_v3 = sum(reference.balance_loss(part, config.num_experts_per_tok) for part in scores.view(2, 9, -1))
        torch.testing.assert_close(routing.stats.expert_balance, by_v3)
    assert routing.stats.load.tolist() == [sum(e in row for row in chosen) for e in range(config.n_routed_experts)]


def test_the_seeds_draw_every_router() -> None:
    configs = [random_routing(seed) for seed in range(60)]
    drawn = {(config.scoring_func, config.topk_method) for config in configs}
    assert drawn == {(scoring, method) for scoring in SCORING_FUNCS for method in TOPK_METHODS}
    limited = [config for config in configs if config.topk_group < config.n_group]
    assert {config.topk_method for config in limited} == {"noaux_tc", "group_limited_greedy"}


def test_the_config_names_every_part() -> None:
    assert (tuple(SCORINGS), tuple(METHODS)) == (SCORING_FUNCS, TOPK_METHODS)


@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_weights_and_balance(seed: int) -> None:
    config = random_routing(seed)
    router, x = make(config), states(config).requires_grad_()
    routing = router(x)
    d_weights, factors = torch.randn_like(routing.weights), (0.1, 0.7, 0.3)
    balance = sum(factor * loss for factor, loss in zip(factors, routing.stats[:3], strict=True))
    ((routing.weights * d_weights).sum() + balance).backward()
    twin_x, twin_w = x.detach().clone().requires_grad_(), router.weight.detach().clone().requires_grad_()
    scores = scored(config, twin_x, twin_w)
    weights = scores.gather(1, routing.indices)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    losses = plain_balance(config, scores, routing.indices.tolist())
    balance = sum(factor * loss for factor, loss in zip(factors, losses, strict=True))
    ((weights * config.routed_scaling_factor * d_weights).sum() + balance).backward()
    torch.testing.assert_close(x.grad, twin_x.grad)
    torch.testing.assert_close(router.weight.main_grad, twin_w.grad)


def test_a_group_is_as_strong_as_its_rule_says() -> None:
    """Group 0 has the best expert, group 1 the best pair: the two rules disagree."""
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    sizes = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}
    by_pair = make(replace(TINY, **sizes))
    by_pair.e_score_correction_bias.zero_()
    assert by_pair.select(scores).tolist() == [[2]]
    assert make(replace(TINY, **sizes, topk_method="group_limited_greedy")).select(scores).tolist() == [[0]]


def test_even_routing_costs_one_for_each_loss_and_a_single_device_always_does() -> None:
    """Every expert is chosen equally often: f and f' are 1, and each token reaches M = 2 of 4 groups."""
    config = replace(TINY, num_experts_per_tok=4, topk_method="group_limited_greedy", scoring_func="softmax")
    router = make(config)
    shares = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    indices = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]] * 4)
    torch.testing.assert_close(torch.stack(router.balance(shares, indices, 2)), torch.full((3,), 2.0).double())
    alone = make(replace(config, n_group=1, topk_group=1))
    scores = torch.softmax(torch.randn(8, 8, dtype=torch.float64), -1)
    _, device, comm = alone.balance(scores, torch.zeros_like(indices), 2)
    torch.testing.assert_close(torch.stack([device, comm]), torch.full((2,), 2.0).double())


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
