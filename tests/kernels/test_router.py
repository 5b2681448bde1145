"""The router in Triton's interpreter against the one that is made of torch's operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import router as ours
from tests.kernels.peers import agree
from tests.train.model_cases import TINY
from train.model.config import ModelConfig
from train.model.kernels import Kernels, triton_kernels
from train.model.layers import Backend
from train.model.router import Router, Routing, build_router
from train.precision.build import everywhere
from train.precision.grads import attach_main_grads
from train.precision.torch_engine import TorchEngine


def made(config: ModelConfig, kernels: Kernels, dtype: torch.dtype) -> Router:
    """A router with the same weights each time, on a coarse grid, so that scores are often equal."""
    router = build_router(config, Backend(everywhere(TorchEngine()), kernels)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    router.weight.data = torch.randint(-3, 4, router.weight.shape, generator=generator).to(dtype) / 8
    if router.bias is not None:
        router.bias.copy_(torch.randint(-2, 3, router.bias.shape, generator=generator) / 4)
    attach_main_grads(router)
    return router


def gradients(routing: Routing, x: Tensor, router: Router) -> tuple[Tensor, ...]:
    """Of x and of the weight, of a loss that has a part in everything that is differentiable."""
    slopes = torch.linspace(-1, 1, routing.weights.numel(), dtype=routing.weights.dtype).view_as(routing.weights)
    stats = routing.stats
    loss = (routing.weights * slopes).sum() + 0.5 * stats.expert_balance + stats.device_balance / 3
    (loss - 0.25 * stats.comm_balance).backward()
    assert x.grad is not None
    return x.grad, router.weight.main_grad  # type: ignore[return-value]


@settings(max_examples=12)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    method=st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    groups=st.sampled_from([(8, 4, 2), (20, 4, 3), (6, 3, 3), (12, 1, 1), (5, 5, 4)]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 40)),
    normalised=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_routes_as_its_twin(
    dtype: torch.dtype, method: str, scoring: str, groups: tuple[int, int, int], shape: tuple[int, int],
    normalised: bool, seed: int,
) -> None:  # fmt: skip
    num_experts, num_groups, num_kept = groups
    config = replace(
        TINY, n_routed_experts=num_experts, n_group=num_groups, topk_group=num_kept, topk_method=method,
        scoring_func=scoring, norm_topk_prob=normalised, routed_scaling_factor=2.5, num_experts_per_tok=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (*shape, config.hidden_size), generator=generator).to(dtype) / 4
    found = []
    for kernels in (triton_kernels("cpu"), Kernels()):
        router, leaf = made(config, kernels, dtype), x.clone().requires_grad_()
        routing = router(leaf)
        found.append((routing, gradients(routing, leaf, router)))
    (kernel, kernel_grads), (twin, twin_grads) = found
    assert torch.equal(kernel.indices, twin.indices) and torch.equal(kernel.stats.load, twin.stats.load)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    agree([kernel.weights, *kernel.stats[:3]], [twin.weights, *twin.stats[:3]], wide)
    agree(kernel_grads[0], twin_grads[0], dtype)
    agree(kernel_grads[1], twin_grads[1], wide, factor=10)  # a sum over all tokens


def test_a_token_has_different_experts_whatever_its_scores_are() -> None:
    """Copies are counted by tokens and experts: one twice would be one too few. Not a number counts as largest."""
    logits = torch.randn(4, 8)
    logits[1], logits[2, 3], logits[3] = torch.nan, torch.nan, torch.inf
    rule = ours.Rule(4, 2, 3, True, False, True, 1.0, True)
    indices = ours.route(logits, torch.zeros(8), rule, 1, True).indices
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert 3 in indices[2].tolist()


@pytest.mark.parametrize("grad", [True, False])
def test_loads_count_only_where_it_is_trained(grad: bool) -> None:
    router = made(TINY, triton_kernels("cpu"), torch.float32)
    with torch.set_grad_enabled(grad):
        stats = router(torch.randn(1, 6, TINY.hidden_size)).stats
    assert stats.load.sum() == (6 * (TINY.num_experts_per_tok or 0) if grad else 0)
