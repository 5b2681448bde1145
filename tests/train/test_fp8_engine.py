"""Products in FP8: against the definition taken step by step, what is kept of inputs, when weights are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.shards import ParamInfo
from parallel.zero.optimizer import build as build_optimizer
from parallel.zero.sets import ReplicaGroups
from tests.bounds import assert_within, product_error
from tests.train import model_cases
from tests.train.test_fp8_tiles import matrix
from train.model.kernels import Kernels
from train.model.layers import Backend, FeedForward
from train.model.loss import LossTerms
from train.model.transformer import Transformer
from train.precision import tiles
from train.precision.blockwise import BLOCKS, COLUMNS, ROWS, dequantise, quantise
from train.precision.build import build_engines
from train.precision.config import FP8_MODULES, Fp8, PrecisionConfig
from train.precision.engine import Engine, Mlp, spans
from train.precision.grads import attach_main_grads, run_now
from train.precision.linear import Linear, project
from train.precision.reference import Fp8Engine, QuantisedWeights
from train.precision.tiles import restore_rows_e5m6
from train.recipe.adamw import AdamW
from train.recipe.optimizer import OptimizerConfig
from train.settings import group

REPORTED = sorted(set(FP8_MODULES.values()), key=repr)


def engines_of(precision: str, power_of_two: bool = False) -> Mapping[str, Engine]:
    config = group(PrecisionConfig, "precision", precision)
    config = replace(config, power_of_two_scales=power_of_two)
    return build_engines(config, "cpu", QuantisedWeights(power_of_two))


def twice(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> Tensor:
    """Quantised and dequantised, in float64."""
    return dequantise(quantise(x, tile, power_of_two), tile).double()


def expected_operands(fp8: Fp8, everywhere: bool, x: Tensor, dy: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Factors of y, dx and dw in float64, as the report's framework defines them (sections 3.3.1 to 3.3.3)."""
    round_x, round_dy = fp8.round_input or everywhere, fp8.round_gradient or everywhere
    blocks = twice(weight, BLOCKS, everywhere)
    rows_x, rows_dy = twice(x, ROWS, round_x), twice(dy, ROWS, round_dy)
    kept = rows_x if fp8.keep == "e4m3" else restore_rows_e5m6(tiles.keep_rows_e5m6(x))
    columns_x = twice(kept.float(), COLUMNS, round_x)
    columns_dy = twice(rows_dy.float() if fp8.round_gradient else dy, COLUMNS, round_dy)
    return [(rows_x, blocks.T), (rows_dy, blocks), (columns_dy.T, columns_x)]


def assert_product(found: Tensor, factors: tuple[Tensor, Tensor]) -> None:
    """Within what a float32 sum in any order may lose, and rounded once to the result's type."""
    assert_within(found, factors[0] @ factors[1], product_error(*factors))


sizes = st.one_of(st.integers(1, 5), st.integers(126, 131), st.just(260))
engines = st.tuples(st.sampled_from(REPORTED), st.booleans())


@given(sizes, sizes, sizes, st.integers(0, 2**31), engines, st.sampled_from([torch.float32, torch.bfloat16]))
@example(260, 260, 130, 19463170, (Fp8(), False), torch.float32)  # 22 roundings of 2^-24 in a sum of 260 terms
@settings(max_examples=30, deadline=None)
def test_products(num_tokens: int, k: int, n: int, seed: int, engine: tuple[Fp8, bool], dtype: torch.dtype) -> None:
    shapes = (num_tokens, k), (num_tokens, n), (n, k)
    # The largest of `matrix` is below 2^76: no sum of their products may leave float32.
    x, dy, weight = (matrix(shape, 15 * seed + 1, dtype) * (2.0**-18 * (i + 1)) for i, shape in enumerate(shapes))
    gemm = Fp8Engine(engine[0], QuantisedWeights(engine[1]), engine[1])
    factors = expected_operands(*engine, x, dy, weight)
    operand, kept = gemm.enter(x)
    assert torch.equal(operand, gemm.operand(x))
    assert all(
        torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(kept, gemm.keep(x), strict=True)
    )
    y, dx = gemm.fprop(operand, weight), gemm.dgrad(dy, weight)
    assert y.dtype == dx.dtype == dtype
    assert_product(y, factors[0])
    assert_product(dx, factors[1])
    accumulator = torch.zeros(n, k)
    gemm.wgrad_(accumulator, dy, gemm.restore(kept))
    assert_product(accumulator, factors[2])
    # It adds: the same terms once more.
    gemm.wgrad_(accumulator, dy, gemm.restore(gemm.keep(x)))
    assert_product(accumulator, (factors[2][0].repeat(1, 2), factors[2][1].repeat(2, 1)))


@given(st.lists(st.sampled_from([0, 1, 3, 127, 130]), min_size=1, max_size=5), st.integers(0, 2**31), engines)
@settings(max_examples=20, deadline=None)
def test_grouped_products_are_those_of_each_group(splits: list[int], seed: int, engine: tuple[Fp8, bool]) -> None:
    """Grouped products, groups without a row among them; no tile reaches from one group into the next."""
    x, dy = matrix((sum(splits), 140), seed), matrix((sum(splits), 70), seed + 1)
    weight = torch.randn(len(splits), 70, 140, generator=torch.Generator().manual_seed(seed))
    dense = Fp8Engine(engine[0], QuantisedWeights(engine[1]), engine[1])
    grouped = dense.grouped(splits)
    y, dx = grouped.fprop(grouped.operand(x), weight), grouped.dgrad(dy, weight)
    restored, accumulator = grouped.restore(grouped.keep(x)), torch.ones(weight.shape)
    grouped.wgrad_(accumulator, dy, restored)
    assert y.shape == (len(x), 70) and dx.shape == x.shape
    expected = torch.ones(weight.shape)
    for e, rows in spans(splits):
        assert torch.equal(y[rows], dense.fprop(dense.operand(x[rows]), weight[e]))
        assert torch.equal(dx[rows], dense.dgrad(dy[rows], weight[e]))
        dense.wgrad_(expected[e], dy[rows], dense.restore(dense.keep(x[rows])))
    assert torch.equal(accumulator, expected)


def saved_bytes(forward: Callable[[], Any], *apart: Tensor) -> int:
    """Bytes of what autograd keeps of a forward pass, each storage once, without those of the tensors `apart`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    for tensor in apart:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(kept.values())


def linear(num_inputs: int, num_outputs: int, engine: Any, dtype: torch.dtype = torch.bfloat16) -> Linear:
    layer = Linear(num_inputs, num_outputs, engine, run_now).to(dtype)
    nn.init.normal_(layer.weight)
    attach_main_grads(layer)
    return layer


T, K, N = 64, 384, 256


@pytest.mark.parametrize(
    ("precision", "module", "bytes_each"),
    [("bf16", "q_a_proj", 2), ("fp8", "q_a_proj", 1 + 4 / 128), ("fp8", "o_proj", 1.5 + 4 / 128)],
)
def test_bytes_kept_of_an_input(precision: str, module: str, bytes_each: float) -> None:
    table = engines_of(precision)
    layers = [linear(K, N, table[module]) for _ in range(2)]
    x = torch.randn(T, K).bfloat16().requires_grad_()
    weights = [layer.weight for layer in layers]
    assert saved_bytes(lambda: layers[0](x), *weights) == T * K * bytes_each
    assert saved_bytes(lambda: project(x, *layers), *weights) == T * K * bytes_each


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16", 2), ("fp8", 1 + 4 / 128)])
def test_bytes_kept_of_an_mlp(precision: str, bytes_each: float) -> None:
    """Its input and the input of SwiGLU, nothing else."""
    backend = Backend(engines_of(precision))
    mlp = FeedForward(K, N, backend).bfloat16()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(T, K).bfloat16().requires_grad_()
    assert saved_bytes(lambda: mlp(x), *mlp.parameters()) == T * (K + 2 * N) * bytes_each


def test_a_shared_input_gives_the_sum_of_both_gradients() -> None:
    engine = engines_of("fp8")["q_a_proj"]
    first, second = linear(K, N, engine), linear(K, 96, engine)
    x = torch.randn(2, T, K).bfloat16().requires_grad_()
    together = project(x, first, second)
    apart = first(x), second(x)
    d_outputs = [torch.randn_like(y) for y in together]
    grads = []
    for outputs in (together, apart):
        assert all(torch.equal(one, other) for one, other in zip(outputs, together, strict=True))
        for layer in (first, second):
            layer.weight.main_grad.zero_()
        (dx,) = torch.autograd.grad(outputs, x, d_outputs)
        grads.append((dx, first.weight.main_grad.clone(), second.weight.main_grad.clone()))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_swiglu_is_recomputed_from_what_is_kept() -> None:
    """Its gradient is that of the rounded input, its output in the weight gradient that of the rounded input too."""
    engines = [Fp8Engine(Fp8(), QuantisedWeights()) for _ in range(2)]
    gate_up, down = (nn.Parameter(torch.randn(shape)) for shape in ((2 * N, K), (K, N)))
    for weight in (gate_up, down):
        weight.main_grad = torch.zeros_like(weight)
    x, dy = torch.randn(T, K).requires_grad_(), torch.randn(T, K)
    Mlp(gate_up, down, *engines, Kernels(), run_now)(x).backward(dy)
    h = (twice(x.detach(), ROWS) @ twice(gate_up.detach(), BLOCKS).T).float()
    rounded = twice(h, ROWS).float().requires_grad_()
    gate, up = rounded.chunk(2, -1)
    a = nn.functional.silu(gate) * up
    (dh,) = torch.autograd.grad(a, rounded, (twice(dy, ROWS) @ twice(down.detach(), BLOCKS)).float())
    # A value of h, a or dh on the border of two FP8 values may fall to either side: few elements, a whole step each.
    for found, exact in (
        (x.grad, twice(dh, ROWS) @ twice(gate_up.detach(), BLOCKS)),
        (down.main_grad, twice(dy, COLUMNS).T @ twice(a.detach(), COLUMNS)),
        (gate_up.main_grad, twice(dh, COLUMNS).T @ twice(twice(x.detach(), ROWS).float(), COLUMNS)),
    ):
        assert float((found - exact).norm() / exact.norm()) < 1e-3


def test_weights_are_quantised_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = []
    monkeypatch.setattr(tiles, "round_blocks", lambda *args: quantised.append(1) or torch.zeros(args[0].shape))
    weights = QuantisedWeights()
    layers = [linear(K, N, Fp8Engine(Fp8(), weights)) for _ in range(2)]
    for step in (1, 2):
        for _ in range(3):
            for layer in layers:
                layer(torch.randn(T, K).bfloat16().requires_grad_()).sum().backward()
        assert len(quantised) == 2 * step
        weights.changed()


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_optimizer_step_and_a_load_reach_the_quantised_weights(engine: str, dtype: torch.dtype) -> None:
    """The weights lie in a flat buffer whose changes they do not notice themselves."""
    weights = QuantisedWeights()
    layer = linear(K, N, Fp8Engine(Fp8(), weights), dtype)
    del layer.weight.main_grad
    optimizer = build_optimizer(
        engine,
        [(ParamInfo("weight", (N, K)), layer.weight, AdamW(OptimizerConfig()), 0.1)],
        ReplicaGroups(),
        on_new_weights=weights.changed,
    )
    x = torch.randn(T, K, dtype=dtype)

    @torch.no_grad()
    def check() -> Tensor:
        y = layer(x)
        fresh = Fp8Engine(Fp8(), QuantisedWeights())
        assert torch.equal(y, fresh.fprop(fresh.operand(x), layer.weight))
        return y

    before = check()
    layer.weight.main_grad.normal_()
    optimizer.step(0.1)
    after = check()
    assert not torch.equal(before, after)
    for pieces in optimizer.state().values():
        for piece in pieces:
            piece.tensor.mul_(-2)
    optimizer.load_finished(1)
    assert not torch.equal(after, check())


TINY = replace(model_cases.TINY, hidden_size=136, intermediate_size=144, moe_intermediate_size=64)


def backward(model: Transformer, tokens: Tensor, factor: float) -> dict[str, Tensor]:
    """Gradients of the loss times a factor, by parameter; the head's are formed by the factors of its terms."""
    for parameter in model.parameters():
        parameter.main_grad.zero_()
    terms = LossTerms(factor / tokens.numel(), 0.1 * factor / tokens.numel(), 1e-3 * factor)
    model(tokens, terms).total.backward()
    return {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_small_loss_changes_exponents_alone(power_of_two: bool) -> None:
    """Gradients of a mean over 60 M tokens live near 1e-9; a floor under the scales would flush them."""
    engines = engines_of("fp8", power_of_two)
    model = model_cases.build(TINY, torch.bfloat16, engines=engines)
    tokens = model_cases.random_tokens(TINY, 2, 40)
    usual, small = backward(model, tokens, 1.0), backward(model, tokens, 2.0**-30)
    for name, grad in usual.items():
        assert torch.equal(small[name] * 2.0**30, grad), name
        assert bool(grad.any()), name


def test_an_overflow_reaches_the_gradients() -> None:
    """It must stop the run; saturating would hide it."""
    model = model_cases.build(TINY, torch.bfloat16, engines=engines_of("fp8"))
    with torch.no_grad():
        model.get_parameter("layers.1.self_attn.o_proj.weight")[3, 5] = torch.inf
    grads = backward(model, model_cases.random_tokens(TINY, 1, 20), 1.0)
    assert not all(bool(grad.isfinite().all()) for grad in grads.values())
