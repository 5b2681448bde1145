"""AdamW's settings, the rule of decay, and moments in bf16 against a slow plain twin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.bounds import assert_within, gamma
from train.recipe import adamw
from train.recipe.adamw import AdamW, Bf16MomentsAdamW
from train.recipe.optimizer import OptimizerConfig, decays

CONFIG = OptimizerConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_grad_norm", math.nan),
        ("moments_dtype", "fp16"),
        ("ema_decay", 1.0),
    ],
)
def test_values_out_of_range_are_named(key: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{key}={value} is not"):
        replace(CONFIG, **{key: value}).check()


def test_the_defaults_pass() -> None:
    CONFIG.check()
    replace(CONFIG, moments_dtype="bf16", clip_grad_norm=0.0, weight_decay=0.0).check()


def test_matrices_decay_and_vectors_do_not() -> None:
    assert decays((4, 3)) and decays((8, 4, 3))
    assert not decays((4,)) and not decays(())


class PlainStep(NamedTuple):
    """Where algorithm 2 of the AdamW paper leads in float64, and how far the same in another arithmetic may be."""

    param: Tensor
    param_error: Tensor
    moments: tuple[Tensor, Tensor]
    moment_errors: tuple[Tensor, Tensor]


def plain_step(param: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: int, group: dict) -> PlainStep:
    """One step from these values. The bounds hold for any way to write the update: 1 - beta may itself be a difference
    of rounded numbers, which makes 20 roundings of one for beta2 = 0.95, and no more than 40 others follow."""
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    share = gamma(60, param.dtype)
    p, g, m, v = (each.double() for each in (param, grad, *moments))
    first, second = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    scale = lr / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])
    errors = share * (m.abs() + g.abs()), share * second
    return PlainStep(
        p - scale * first - lr * decay * p,
        scale * (errors[0] + share * first.abs()) + gamma(4, param.dtype) * p.abs(),
        (first, second),
        errors,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bf16_moments_equal_the_plain_twin(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_decay: float
) -> None:
    """Step by step, each from where the last one ended: the update uses moments before they are rounded to bf16."""
    monkeypatch.setattr(adamw, "_CHUNK_CPU", 1000)  # several chunks, the last one short
    draw = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(2917, generator=draw, dtype=dtype))
    moments = torch.zeros(2917, dtype=torch.bfloat16), torch.zeros(2917, dtype=torch.bfloat16)
    optimizer = Bf16MomentsAdamW([{"params": [param], "weight_decay": weight_decay}], betas=(0.9, 0.95))
    group = optimizer.param_groups[0]
    for step in range(1, 21):
        group["lr"] = 1e-2 / step
        param.grad = torch.randn(2917, generator=draw, dtype=dtype) * 0.3
        wanted = plain_step(param.detach(), param.grad, moments, step, group)
        optimizer.step()
        state = optimizer.state[param]
        assert state["step"] == step
        moments = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        for ours, exact, error in zip(moments, wanted.moments, wanted.moment_errors, strict=True):
            assert ours.dtype == torch.bfloat16
            assert_within(ours, exact, error)
        assert_within(param.detach(), wanted.param, wanted.param_error)


def test_bf16_moments_stay_near_those_of_torch() -> None:
    """Rounding to nearest has no bias: after 200 steps the weights have moved as with fp32 moments, to a percent."""
    draw = torch.Generator().manual_seed(2)
    start = torch.randn(4001, generator=draw)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        AdamW(replace(CONFIG, moments_dtype=name)).make([{"params": [param], "weight_decay": 0.1}])
        for name, param in (("bf16", ours), ("fp32", theirs))
    ]
    for _ in range(200):
        grad = torch.randn(4001, generator=draw) + 0.2
        for optimizer, param in zip(optimizers, (ours, theirs), strict=True):
            optimizer.param_groups[0]["lr"] = 1e-3
            param.grad = grad.clone()
            optimizer.step()
    moved = theirs.detach() - start
    assert (ours.detach() - theirs.detach()).norm() < 0.01 * moved.norm()


def test_it_makes_torch_s_fused_adamw() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "weight_decay": 0.1}]
    made = AdamW(replace(CONFIG, beta1=0.8, eps=1e-6)).make(groups)
    assert type(made) is torch.optim.AdamW and made.defaults["fused"]
    assert (made.defaults["betas"], made.defaults["eps"]) == ((0.8, 0.95), 1e-6)
    assert made.param_groups[0]["weight_decay"] == 0.1


def test_a_parameter_without_gradient_is_left_alone() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = Bf16MomentsAdamW([param], lr=1.0)
    optimizer.step()
    assert bool((param == 1).all()) and not optimizer.state[param]
