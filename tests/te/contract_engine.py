"""The engine over the library's modules: the reference's numbers, gradients in any order, weights quantised once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.te import case
from tests.te.twin import LOG
from train.model.kernels import Kernels
from train.precision.config import Fp8
from train.precision.engine import Mlp, Products
from train.precision.grads import main_grad, run_now
from train.precision.reference import Fp8Engine, QuantisedWeights
from train.precision.transformer_engine import LibraryModules, TransformerEngine

UP, DOWN = Fp8(round_input=True), Fp8(round_gradient=True)


class KeepsInput(Fp8Engine):
    """The reference, but that the weight gradient's columns are made from the input itself, as the library makes them.

    The report keeps rows in E4M3 and makes columns from those: one rounding more, for values that are subnormal in
    their row's scale.
    """

    enter = Products.enter  # what enters a product is rounded, what is kept is not

    def keep(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def restore(self, kept: tuple[Tensor, ...]) -> Tensor:
        return kept[0]


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    weight = nn.Parameter(values(*shape, seed=seed))
    weight.main_grad = torch.zeros(shape)  # type: ignore[attr-defined]
    return weight


def values(*shape: int, seed: int) -> Tensor:
    """Some loud, some zero, as bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).bfloat16()


def collected(weights: list[nn.Parameter]) -> list[Tensor]:
    """Gradients so far, and a fresh start."""
    found = [main_grad(weight).clone() for weight in weights]
    for weight in weights:
        main_grad(weight).zero_()
    return found


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), (number, (a.float() - b.float()).abs().max())


widths = st.integers(1, 20).map(lambda n: 16 * n)
rows = st.integers(0, 18).map(lambda n: 16 * n)


@given(rows, widths, widths, widths, st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_projections_are_the_reference_bit_for_bit(num_rows: int, k: int, n: int, m: int, seed: int) -> None:
    """Powers of two, where both define every bit: forward, gradient of the input, of both weights."""
    weights = [parameter(n, k, seed=seed), parameter(m, k, seed=seed + 1)]
    x, dy = values(2, num_rows, k, seed=seed + 2), [values(2, num_rows, w.shape[0], seed=seed + 3) for w in weights]
    results = []
    for engine in (
        TransformerEngine(Fp8(), LibraryModules(True)),
        KeepsInput(Fp8(), QuantisedWeights(True), True),
    ):
        leaf = x.clone().requires_grad_()
        outputs = engine.project(leaf, run_now, *weights)
        torch.autograd.backward(outputs, dy)
        assert leaf.grad is not None and all(weight.grad is None for weight in weights)
        results.append([*outputs, leaf.grad, *collected(weights)])
    same(*results)


@given(st.lists(st.sampled_from([0, 0, 1, 15, 16, 40, 130, 256]), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_experts_are_the_reference_bit_for_bit(splits: list[int], seed: int) -> None:
    """Any rows for each expert, none too: padding adds nothing to any bit. The reference here is the real one: what
    dispatch brings is rounded, so rows and columns come from the same values in both."""
    gate_up, down = parameter(len(splits), 96, 144, seed=seed), parameter(len(splits), 144, 48, seed=seed + 1)
    x, dy = values(sum(splits), 144, seed=seed + 2), values(sum(splits), 144, seed=seed + 3)
    row_weights = torch.rand(sum(splits), generator=torch.Generator().manual_seed(seed))
    shared, quantised = LibraryModules(True), QuantisedWeights(True)
    results = []
    for first, second in (
        (TransformerEngine(UP, shared), TransformerEngine(DOWN, shared)),
        (Fp8Engine(UP, quantised, True), Fp8Engine(DOWN, quantised, True)),
    ):
        leaves = x.clone().requires_grad_(), row_weights.clone().requires_grad_()
        engines = first.grouped(splits), second.grouped(splits)
        y = Mlp(gate_up, down, *engines, Kernels(), run_now)(*leaves)
        y.backward(dy)
        results.append([y, *(leaf.grad for leaf in leaves), *collected([gate_up, down])])
    same(*results)


@pytest.mark.parametrize("fp8", [Fp8(), UP, DOWN], ids=str)
def test_float32_scales_agree_to_a_few_roundings(fp8: Fp8) -> None:
    """Scales that are no powers of two: the library multiplies by 448 / amax, the reference divides by amax / 448. A
    value on a border of E4M3 may fall the other way, 1/8 of itself; so few do that the product moves by less than 1 %
    of what FP8 is from the truth (3.7 %)."""
    weight = parameter(256, 384)
    x, dy = values(64, 384, seed=1), values(64, 256, seed=2)
    results = []
    for engine in (TransformerEngine(fp8, LibraryModules()), KeepsInput(fp8, QuantisedWeights())):
        leaf = x.clone().requires_grad_()
        (y,) = engine.project(leaf, run_now, weight)
        y.backward(dy)
        results.append([y, leaf.grad, *collected([weight])])
    for ours, theirs in zip(*results, strict=True):
        # bfloat16 results round by 2^-9 of an element.
        assert (ours.float() - theirs.float()).norm() < 4e-3 * theirs.float().norm()


ORDERS = [
    # W behind each B; all at the end, in order and reversed; B out of order.
    ["F0", "B0", "W0", "F1", "B1", "W1", "F2", "B2", "W2"],
    ["F0", "F1", "F2", "B0", "B1", "B2", "W0", "W1", "W2"],
    ["F0", "F1", "B0", "F2", "B1", "B2", "W2", "W0", "W1"],
    ["F0", "F1", "F2", "B2", "W2", "B0", "B1", "W1", "W0"],
]


@pytest.mark.parametrize("order", ORDERS, ids="".join)
@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_of_a_step_in_every_order(order: list[str], grouped: bool) -> None:
    """Two steps of three micro-batches: gradients add when their work is done and not before; weights are quantised
    once a step."""
    splits = [16, 0, 21]
    shape, num_rows = ((3, 64, 48), sum(splits)) if grouped else ((64, 48), 37)
    weight = parameter(*shape)
    shared, quantised = LibraryModules(True), QuantisedWeights(True)
    ours: Any = TransformerEngine(UP, shared)
    theirs: Any = Fp8Engine(UP, quantised, True) if grouped else KeepsInput(UP, quantised, True)
    if grouped:
        ours, theirs = ours.grouped(splits), theirs.grouped(splits)
    for step in range(2):
        with torch.no_grad():
            weight.mul_(1.5)
        LOG.take()
        waiting: dict[int, list[Callable[[], None]]] = {}
        inputs = [values(num_rows, 48, seed=10 * step + number).requires_grad_() for number in range(3)]
        outputs, done = {}, torch.zeros(shape)
        for action, number in ((name[0], int(name[1])) for name in order):
            if action == "F":
                waiting[number] = []
                (outputs[number],) = ours.project(inputs[number], waiting[number].append, weight)
            elif action == "B":
                outputs.pop(number).backward(values(num_rows, 64, seed=step + number))
                assert len(waiting[number]) == 1
            else:
                waiting[number].pop()()
                done = expected(theirs, weight, inputs[number], values(num_rows, 64, seed=step + number), done)
            assert torch.equal(main_grad(weight), done), action + str(number)
        assert LOG.num_weights == (3 if grouped else 1)
        assert weight.grad is None
        collected([weight])


def expected(engine: Any, weight: nn.Parameter, x: Tensor, dy: Tensor, before: Tensor) -> Tensor:
    """What the reference makes of the gradient so far and of one micro-batch more."""
    twin = nn.Parameter(weight.detach())
    twin.main_grad = before.clone()  # type: ignore[attr-defined]
    engine.project(x.detach().requires_grad_(), run_now, twin)[0].backward(dy)
    return main_grad(twin)


def test_weights_are_quantised_when_they_change_and_only_then() -> None:
    shared = LibraryModules(True)
    engine, weight, x = TransformerEngine(Fp8(), shared), parameter(32, 48), values(16, 48, seed=1)

    def quantised(train: bool = True) -> int:
        LOG.take()
        with torch.set_grad_enabled(train):
            (y,) = engine.project(x.clone().requires_grad_(train), run_now, weight)
        (reference,) = Fp8Engine(Fp8(), QuantisedWeights(True), True).project(x, run_now, weight)
        assert torch.equal(y, reference)
        return LOG.num_weights

    assert [quantised(), quantised(), quantised(False), quantised()] == [1, 0, 0, 0]
    weight.data.mul_(2.0)  # as an optimizer does, through memory whose changes the weight does not count
    shared.changed()
    assert [quantised(False), quantised(), quantised()] == [1, 0, 0]
    with torch.no_grad():
        weight.mul_(3.0)
    assert [quantised(), quantised()] == [1, 0]
    # An optimizer that takes weights and gradients into buffers of its own.
    weight.data, weight.main_grad = torch.cat([weight.data.flatten()] * 2)[32 * 48 :].view(32, 48), torch.zeros(32, 48)
    assert [quantised(), quantised()] == [1, 0]
    engine.project(x.clone().requires_grad_(), run_now, weight)[0].sum().backward()
    assert main_grad(weight).abs().sum() > 0


def test_gradients_reach_the_buffer_that_experts_have_now() -> None:
    weight, x = parameter(2, 32, 48), values(32, 48, seed=1)
    engine = TransformerEngine(UP, LibraryModules(True)).grouped([16, 16])
    engine.project(x.clone().requires_grad_(), run_now, weight)[0].sum().backward()
    first, weight.main_grad = main_grad(weight), torch.zeros(2, 32, 48)
    engine.project(x.clone().requires_grad_(), run_now, weight)[0].sum().backward()
    assert torch.equal(first, main_grad(weight)) and first.abs().sum() > 0


def test_what_waits_for_a_weight_gradient_is_in_fp8() -> None:
    """One byte an element of x and of dy, and their scales: nothing of the graph, nothing in bfloat16."""
    weight, waiting = parameter(256, 384), list[Any]()
    x = values(128, 384, seed=1).requires_grad_()
    engine = TransformerEngine(Fp8(), LibraryModules(True))
    (y,) = engine.project(x, waiting.append, weight)
    y.backward(values(128, 256, seed=2))
    (store,) = waiting[0].args
    operands, _ = store.context.queue[0]
    assert [operand._columnwise_data.shape for operand in operands] == [(384, 128), (256, 128)]
    assert all(operand._columnwise_data.dtype == torch.uint8 for operand in operands)
    assert operands[0]._rowwise_data is None, "rows of x have done their work"
    waiting.pop()()
    assert main_grad(weight).abs().sum() > 0


def test_modules_of_one_parameter_are_shared_and_belong_to_no_model() -> None:
    shared = LibraryModules(True)
    weight = parameter(32, 48)
    recipe = TransformerEngine(Fp8(), shared).recipe
    assert shared.module(weight, recipe) is shared.module(weight, recipe)
    module = shared.module(weight, recipe)._module
    TransformerEngine(Fp8(), shared).project(values(16, 48, seed=1), run_now, weight)
    assert module.weight is weight
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert all(value.numel() == 0 for name, value in module.state_dict().items() if name != "weight")
    assert list(itertools.chain(module.buffers())) == []


@pytest.mark.parametrize("power_of_two", [True, False])
def test_what_a_gpu_is_compared_with(power_of_two: bool) -> None:
    """The expected values of the suite for GPUs, which find the same on any device that has the twin: finite, not zero,
    and near the products that nothing has rounded."""
    found = case.run("cpu", power_of_two)
    again = case.run("cpu", power_of_two)
    for name, value in found.items():
        assert torch.equal(value, again[name]) and value.isfinite().all() and value.abs().sum() > 0, name
    x, weight = case._values(10, case.NUM_TOKENS, case.HIDDEN).float(), case._weight(1, "cpu", case.WIDTH, case.HIDDEN)
    truth = x @ weight.detach().float().t()
    assert (found["y first 0"].float() - truth).norm() < 0.05 * truth.norm()
