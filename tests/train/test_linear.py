"""Matrix products: grouped ones against one product per group, weight gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds import assert_within, product_error
from train.precision import measure
from train.precision.build import settle
from train.precision.config import PrecisionConfig
from train.precision.engine import spans
from train.precision.grads import attach_main_grads
from train.precision.linear import Linear
from train.precision.torch_engine import ROW_QUANTUM, TorchEngine, WideningEngine, of_few_sizes

SPLITS = [3, 0, 150, 1, 64, 0]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(SPLITS), 16), (sum(SPLITS), 24), (len(SPLITS), 24, 16)
    x, dy, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, dy, weight


# The fused form is what runs on GPUs; torch has a CPU form of it, without float64.
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        (TorchEngine(), torch.float64),
        (TorchEngine(), torch.float32),
        (TorchEngine(generates_kernels=True), torch.bfloat16),
        (WideningEngine(), torch.bfloat16),
        (TorchEngine("cuda"), torch.float32),
    ],
    ids=["fp64", "fp32", "bf16", "bf16 widened", "fused"],
)
def test_grouped_products(engine: TorchEngine, dtype: torch.dtype) -> None:
    x, dy, weight = operands(dtype)
    gemm = engine.grouped(SPLITS)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    accumulator = torch.ones(weight.shape, dtype=wide)
    gemm.wgrad_(accumulator, dy, x)
    y, dx = gemm.fprop(x, weight), gemm.dgrad(dy, weight)
    start = 0
    for e, num in enumerate(SPLITS):
        rows = slice(start, start + num)
        start += num
        x_e, dy_e, weight_e = x[rows].double(), dy[rows].double(), weight[e].double()
        # Summed in the wide type and rounded once.
        for found, factors in ((y[rows], (x_e, weight_e.T)), (dx[rows], (dy_e, weight_e))):
            assert_within(found, factors[0] @ factors[1], product_error(*factors, wide))
        # Accumulated in it without rounding the product to bfloat16 first: one term more, the 1 that was there.
        factors = torch.cat((torch.ones(24, 1), dy_e.T), 1), torch.cat((torch.ones(1, 16), x_e))
        assert_within(accumulator[e], factors[0] @ factors[1], product_error(*factors, wide))


def test_bfloat16_without_hardware_is_one_rounding_of_the_exact_product() -> None:
    """Tensors of whole numbers, whose sums float32 holds exactly in any order."""
    engine = WideningEngine()
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-255, 256, shape, generator=draw).bfloat16() for shape in ((9, 16), (24, 16)))
    exact = x.double() @ weight.double().T
    y = engine.fprop(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16()) and not torch.equal(y.double(), exact)


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


@given(st.lists(st.integers(0, 3 * ROW_QUANTUM), max_size=6))
def test_groups_in_few_sizes_are_the_groups(lengths: list[int]) -> None:
    groups = spans(lengths)
    parts = list(of_few_sizes(groups))
    for group, rows in groups:
        mine = [part for of, part in parts if of == group]
        assert [row for part in mine for row in range(part.start, part.stop)] == list(range(rows.start, rows.stop))
        assert [(part.stop - part.start) % ROW_QUANTUM for part in mine[:-1]] == [0] * (len(mine) - 1)
    assert {of for of, _ in parts} == {of for of, _ in groups}
    sizes = {part.stop - part.start for _, part in parts}
    assert all(size < ROW_QUANTUM or size % ROW_QUANTUM == 0 for size in sizes)


@pytest.mark.parametrize(("bf16_s", "fp32_s", "faster"), [(1.0, 2.0, "bf16"), (3.0, 2.0, "fp32")])
def test_the_faster_product_is_taken(
    monkeypatch: pytest.MonkeyPatch, bf16_s: float, fp32_s: float, faster: str
) -> None:
    """By a clock that goes on while a product is made; one that was disturbed once does not count."""
    now, rounds = [0.0], []

    class Products:
        def __init__(self, takes_s: float) -> None:
            self.takes_s = takes_s

        def fprop(self, x: torch.Tensor, weight: torch.Tensor) -> None:
            assert x.dtype == weight.dtype == torch.bfloat16
            rounds.append(self.takes_s)
            now[0] += self.takes_s + (10 if len(rounds) == 1 else 0)

    monkeypatch.setattr(measure, "WAYS", {"bf16": Products(bf16_s), "fp32": Products(fp32_s)})
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    for name in ("bf16", "fp8"):
        modules = dict.fromkeys(("attention",), "fp8") if name == "fp8" else {}
        assert settle(PrecisionConfig(name, modules), "cpu").bf16_products == faster
    assert len(rounds) > 4
    # Asked for, or where no CPU multiplies any: nothing is measured.
    done = len(rounds)
    assert settle(PrecisionConfig("bf16", bf16_products="fp32"), "cpu").bf16_products == "fp32"
    assert settle(PrecisionConfig("fp32"), "cpu").bf16_products == "auto"
    assert settle(PrecisionConfig("bf16"), "cuda").bf16_products == "auto"
    assert len(rounds) == done
