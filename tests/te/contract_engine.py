"""The engine over the library's products: the reference's numbers, gradients in any order, weights quantised once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.te import case
from tests.te.twin import LOG
from train.precision.config import Fp8
from train.precision.eager_passes import EagerPasses
from train.precision.engine import Products
from train.precision.grads import main_grad, run_now
from train.precision.quantised import Columns, Rows
from train.precision.reference import Fp8Engine, QuantisedWeights
from train.precision.transformer_engine import LibraryWeights, TransformerEngine

UP, DOWN, TO_O = Fp8(round_input=True), Fp8(round_gradient=True), Fp8(round_input=True, keep="e5m6")


def library(power_of_two: bool = True) -> LibraryWeights:
    return LibraryWeights(EagerPasses(), power_of_two)


class KeepsInput(Fp8Engine):
    """The reference, but that the weight gradient's columns are made from the input itself, as they are where more is
    to be kept of it than E4M3 has."""

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


@given(st.integers(0, 290), widths, widths, widths, st.sampled_from([Fp8(), TO_O]), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_projections_are_the_reference_bit_for_bit(num_rows: int, k: int, n: int, m: int, fp8: Fp8, seed: int) -> None:
    """Powers of two, where both define every bit: forward, gradient of the input, of both weights."""
    weights = [parameter(n, k, seed=seed), parameter(m, k, seed=seed + 1)]
    x, dy = values(2, num_rows, k, seed=seed + 2), [values(2, num_rows, w.shape[0], seed=seed + 3) for w in weights]
    reference = Fp8Engine if fp8.keep == "e4m3" else KeepsInput
    results = []
    for engine in (TransformerEngine(fp8, library()), reference(fp8, QuantisedWeights(True), True)):
        leaf = x.clone().requires_grad_()
        outputs = engine.project(leaf, run_now, *weights)
        torch.autograd.backward(outputs, dy)
        assert leaf.grad is not None and all(weight.grad is None for weight in weights)
        results.append([*outputs, leaf.grad, *collected(weights)])
    same(*results)


@given(st.lists(st.sampled_from([0, 0, 1, 15, 16, 40, 130, 256]), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_experts_are_the_reference_bit_for_bit(splits: list[int], seed: int) -> None:
    """Any rows for each expert, none too: empty ones add nothing to any bit."""
    weights = parameter(len(splits), 96, 144, seed=seed), parameter(len(splits), 144, 48, seed=seed + 1)
    x, dy = values(sum(splits), 144, seed=seed + 2), values(sum(splits), 144, seed=seed + 3)
    row_weights = torch.rand(sum(splits), generator=torch.Generator().manual_seed(seed))
    shared, quantised = library(), QuantisedWeights(True)
    results = []
    for engines in (
        (TransformerEngine(UP, shared), TransformerEngine(DOWN, shared)),
        (Fp8Engine(UP, quantised, True), Fp8Engine(DOWN, quantised, True)),
    ):
        journey = case.Journey(engines[0], splits, 144)
        y, back = journey.experts(engines, weights, run_now, x, row_weights)
        results.append([y, *back(dy), *collected(list(weights))])
    same(*results)


@pytest.mark.parametrize("fp8", [Fp8(), UP, DOWN], ids=str)
def test_float32_scales_agree_to_a_few_roundings(fp8: Fp8) -> None:
    """Scales of weights that are no powers of two: the library multiplies by 448 / amax, the reference divides by amax
    / 448. A value on a border of E4M3 may fall the other way, 1/8 of itself; so few do that the product moves by less
    than 1 % of what FP8 is from the truth (3.7 %). Of the weight gradient, which no weight enters, no bit moves."""
    weight = parameter(256, 384)
    x, dy = values(64, 384, seed=1), values(64, 256, seed=2)
    results = []
    for engine in (TransformerEngine(fp8, library(False)), Fp8Engine(fp8, QuantisedWeights())):
        leaf = x.clone().requires_grad_()
        (y,) = engine.project(leaf, run_now, weight)
        y.backward(dy)
        results.append([y, leaf.grad, *collected([weight])])
    for ours, theirs in zip(*results, strict=True):
        # bfloat16 results round by 2^-9 of an element.
        assert (ours.float() - theirs.float()).norm() < 4e-3 * theirs.float().norm()
    assert torch.equal(results[0][2], results[1][2]) or fp8.round_gradient


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
    num_rows = sum(splits)
    weights = [parameter(3, 64, 48), parameter(3, 48, 32, seed=1)] if grouped else [parameter(64, 48)]
    shared, quantised = library(), QuantisedWeights(True)

    def forward(ours: bool, number: int, sink: Any, weights: list[nn.Parameter]) -> Callable[[Tensor], Any]:
        """One micro-batch; what it returns takes it back."""
        make = (lambda fp8: TransformerEngine(fp8, shared)) if ours else (lambda fp8: Fp8Engine(fp8, quantised, True))
        x = values(num_rows, 48, seed=number)
        if not grouped:
            (y,) = make(Fp8()).project(x.requires_grad_(), sink, *weights)
            return y.backward
        journey = case.Journey(make(UP), splits, 48)
        return journey.experts((make(UP), make(DOWN)), tuple(weights), sink, x, torch.ones(num_rows))[1]

    for step in range(2):
        with torch.no_grad():
            weights[0].mul_(1.5)
        LOG.take()
        waiting: dict[int, list[Callable[[], None]]] = {}
        backs, done = {}, [torch.zeros(weight.shape) for weight in weights]
        for action, number in ((name[0], int(name[1])) for name in order):
            dy = values(num_rows, 48 if grouped else 64, seed=step + number)
            if action == "F":
                waiting[number] = []
                backs[number] = forward(True, 10 * step + number, waiting[number].append, weights)
            elif action == "B":
                backs.pop(number)(dy)
                assert len(waiting[number]) == len(weights)
            else:
                for work in waiting.pop(number):
                    work()
                twins = [nn.Parameter(weight.detach()) for weight in weights]
                for twin, before in zip(twins, done, strict=True):
                    twin.main_grad = before.clone()  # type: ignore[attr-defined]
                forward(False, 10 * step + number, run_now, twins)(dy)
                done = [main_grad(twin) for twin in twins]
            assert all(torch.equal(main_grad(weight), each) for weight, each in zip(weights, done, strict=True))
        # The other matrix has not changed.
        assert LOG.num_weights == (3 * (2 - step) if grouped else 1)
        assert all(weight.grad is None for weight in weights)
        collected(weights)


def test_weights_are_quantised_when_they_change_and_only_then() -> None:
    shared = library()
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
    # An optimizer that takes weights and gradients into buffers of its own: the same values elsewhere.
    weight.data, weight.main_grad = torch.cat([weight.data.flatten()] * 2)[32 * 48 :].view(32, 48), torch.zeros(32, 48)
    assert [quantised(), quantised()] == [0, 0]
    engine.project(x.clone().requires_grad_(), run_now, weight)[0].sum().backward()
    assert main_grad(weight).abs().sum() > 0


def test_what_waits_for_a_weight_gradient_is_in_fp8() -> None:
    """One byte an element of x and of dy, and their scales: nothing of the graph, nothing in bfloat16."""
    weight, waiting = parameter(256, 384), list[Any]()
    x = values(120, 384, seed=1).requires_grad_()
    (y,) = TransformerEngine(Fp8(), library()).project(x, waiting.append, weight)
    y.backward(values(120, 256, seed=2))
    _, _, dy, kept = waiting[0].args
    assert isinstance(dy, Columns) and dy.codes.shape == (256 * 128,) and dy.scales.shape == (1, 256)
    assert Rows(*kept).codes.shape == (128, 384) and Rows(*kept).scales.shape == (3 * 128,)
    assert all(codes.dtype == torch.float8_e4m3fn for codes in (dy.codes, kept[0]))
    waiting.pop()()
    assert main_grad(weight).abs().sum() > 0


def test_rows_of_experts_that_no_codec_has_brought_are_refused() -> None:
    engine, weight = TransformerEngine(UP, library()).grouped([16]), parameter(1, 32, 48)
    with pytest.raises(AssertionError, match="codec"):
        engine.project(values(16, 48, seed=1), run_now, weight)


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
