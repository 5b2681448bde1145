"""Matrix products: grouped ones against one product per group, weight gradients against autograd."""

from __future__ import annotations

import pytest
import torch

from train.precision.grads import attach_main_grads
from train.precision.linear import Linear
from train.precision.torch_engine import TorchEngine

SPLITS = [3, 0, 5, 1, 0]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(SPLITS), 16), (sum(SPLITS), 24), (len(SPLITS), 24, 16)
    x, dy, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, dy, weight


# The fused form is what runs on GPUs; torch has a CPU form of it, without float64.
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.float32)],
)
def test_grouped_products(device: str, dtype: torch.dtype) -> None:
    x, dy, weight = operands(dtype)
    gemm = TorchEngine(device).grouped(SPLITS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    accumulator = torch.ones(weight.shape, dtype=wide)
    gemm.wgrad_(accumulator, dy, x)
    y, dx = gemm.fprop(x, weight), gemm.dgrad(dy, weight)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    start = 0
    for e, num in enumerate(SPLITS):
        rows = slice(start, start + num)
        start += num
        exact = x[rows].double(), dy[rows].double(), weight[e].double()
        torch.testing.assert_close(y[rows].double(), exact[0] @ exact[2].T, rtol=rounding, atol=rounding)
        torch.testing.assert_close(dx[rows].double(), exact[1] @ exact[2], rtol=rounding, atol=rounding)
        # Accumulated in float32 without rounding the product to bfloat16 first.
        expected = 1 + exact[1].T @ exact[0]
        torch.testing.assert_close(accumulator[e].double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_without_hardware_is_one_rounding_of_the_exact_product() -> None:
    engine = TorchEngine()
    engine._widen = True
    x, _, weight = operands(torch.bfloat16)
    exact = x.double() @ weight[0].double().T
    y = engine.fprop(x, weight[0])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16())


def test_a_weight_gradient_accumulates_in_main_grad_alone() -> None:
    layer = Linear(5, 7, TorchEngine(), lambda wgrad: wgrad()).double()
    torch.nn.init.normal_(layer.weight)
    attach_main_grads(layer)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    twin = layer.weight.detach().clone().requires_grad_()
    expected_dx, expected_dw = torch.autograd.grad((x @ twin.T).square().sum(), (x, twin))
    for times in (1, 2):
        x.grad = None
        layer(x).square().sum().backward()
        torch.testing.assert_close(x.grad, expected_dx)
        torch.testing.assert_close(layer.weight.main_grad, times * expected_dw)
        assert layer.weight.grad is None


def test_a_sink_may_defer_weight_gradients() -> None:
    deferred = []
    layer = Linear(5, 7, TorchEngine(), deferred.append)
    torch.nn.init.normal_(layer.weight)
    attach_main_grads(layer)
    layer(torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert not layer.weight.main_grad.any()
    for wgrad in deferred:
        wgrad()
    assert layer.weight.main_grad.any()


def test_backward_without_a_buffer_says_what_to_do() -> None:
    layer = Linear(5, 7, TorchEngine(), lambda wgrad: wgrad())
    torch.nn.init.normal_(layer.weight)
    with pytest.raises(RuntimeError, match="attach_main_grads"):
        layer(torch.randn(3, 5, requires_grad=True)).sum().backward()
