"""AdamW's settings, the rule of decay, and moments in bf16 against a slow plain twin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

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


def plain_step(param: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], step: int, group: dict) -> None:
    """Algorithm 2 of the AdamW paper, with the moments stored in bf16 after their use."""
    beta1, beta2 = group["betas"]
    m = beta1 * moments[0].to(param.dtype) + (1 - beta1) * grad
    v = beta2 * moments[1].to(param.dtype) + (1 - beta2) * grad**2
    update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
    param -= group["lr"] * (update + group["weight_decay"] * param)
    moments[0].copy_(m.bfloat16())
    moments[1].copy_(v.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bf16_moments_equal_the_plain_twin(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_decay: float
) -> None:
    monkeypatch.setattr(adamw, "_CHUNK_CPU", 1000)  # several chunks, the last one short
    draw = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(2917, generator=draw, dtype=dtype))
    twin = param.detach().clone()
    moments = torch.zeros(2917, dtype=torch.bfloat16), torch.zeros(2917, dtype=torch.bfloat16)
    optimizer = Bf16MomentsAdamW([{"params": [param], "weight_decay": weight_decay}], betas=(0.9, 0.95))
    group = optimizer.param_groups[0]
    for step in range(1, 21):
        group["lr"] = 1e-2 / step
        param.grad = torch.randn(2917, generator=draw, dtype=dtype) * 0.3
        optimizer.step()
        plain_step(twin, param.grad, moments, step, group)
        state = optimizer.state[param]
        assert state["step"] == step
        for ours, theirs in zip((state["exp_avg"], state["exp_avg_sq"]), moments, strict=True):
            assert ours.dtype == torch.bfloat16
            # The same up to the last bit of the arithmetic, which now and then rounds to the other bf16 neighbour.
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-9)
            assert (ours != theirs).float().mean() < 0.01
        assert (param.detach() - twin).norm() < 1e-5 * twin.norm()


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
