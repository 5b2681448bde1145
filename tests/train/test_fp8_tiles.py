"""FP8 by tiles: the definition against an enumeration of the format, the fast form against it, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.precision import tiles
from train.precision.blockwise import (
    BLOCKS,
    COLUMNS,
    E4M3,
    E5M6,
    LEAST_SCALE,
    ROWS,
    Format,
    dequantise,
    quantise,
    scales_of,
)
from train.precision.compiled_tiles import compiled_tiles
from train.precision.tiles import keep_rows_e5m6, restore_rows_e5m6, round_to

# Torch's operations, and the same compiled where there is a compiler.
ROUNDINGS: list[Any] = [each for each in (tiles, compiled_tiles()) if each]


def finite_values(fmt: Format) -> np.ndarray:
    """Every finite value of a format that is not negative, by its definition, in rising order: index = code."""
    step, least = 2.0**-fmt.mantissa_bits, 2.0**fmt.least_exponent
    values = [m * step * least for m in range(2**fmt.mantissa_bits)]
    exponent = fmt.least_exponent
    while values[-1] < fmt.largest:
        values += [(1 + m * step) * 2.0**exponent for m in range(2**fmt.mantissa_bits)]
        exponent += 1
    return np.array([value for value in values if value <= fmt.largest])


def nearest(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Nearest value of the format, ties to the even code, saturating: by looking at all of them, in float64."""
    values = finite_values(fmt)
    magnitude = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    up = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), x)


def broad(count: int, largest: float, seed: int = 0) -> Tensor:
    """float32 of all bit patterns alike, up to `largest` in magnitude, with every tie and border of the format near."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    x = bits.view(torch.float32)
    return x[x.abs() <= largest]


def borders(fmt: Format) -> Tensor:
    """Every value of a format, every tie between two, and the float32 next to each on both sides."""
    values = torch.from_numpy(finite_values(fmt))
    points = torch.cat((values, (values[1:] + values[:-1]) / 2)).float()
    points = torch.cat((points, *(torch.nextafter(points, torch.tensor(side)) for side in (0.0, torch.inf))))
    points = points[points <= fmt.largest]
    return torch.cat((points, -points))


@pytest.mark.parametrize("fmt", [E4M3, E5M6], ids=["e4m3", "e5m6"])
def test_rounding_is_to_the_nearest_value(fmt: Format) -> None:
    x = torch.cat((broad(400_000, fmt.largest), borders(fmt)))
    assert np.array_equal(round_to(x.clone(), fmt).double().numpy(), nearest(x.numpy(), fmt))


def test_rounding_equals_the_cast_of_torch() -> None:
    x = torch.cat((broad(4_000_000, E4M3.largest, seed=1), borders(E4M3)))
    assert torch.equal(round_to(x.clone(), E4M3), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_border_is_rounded_alike(rounding: Any) -> None:
    """Values, bytes and what is read from bytes, where all tiles have the scale 1 and where none has."""
    x = torch.cat((broad(400_000, E4M3.largest, seed=2), borders(E4M3)))
    tall = torch.full((-(-len(x) // 127), 128), E4M3.largest)
    tall[:, 1:] = torch.cat((x, x.new_zeros(-len(x) % 127))).view(-1, 127)
    for factor in (1.0, 2.0**-130, 3.1e-9, 2.0**100 * 0.7):
        assert_rounds_as_defined(rounding, tall * factor, False)


def exact_scale(amax: float, power_of_two: bool, fmt: Format) -> float:
    """By search over the powers of two; float32 division otherwise."""
    if amax == 0:
        return 1.0
    if not power_of_two:
        return max(float(np.float32(amax) / np.float32(fmt.largest)), LEAST_SCALE)
    return next(2.0**e for e in range(-126, 128) if amax <= 2.0**e * fmt.largest)


@pytest.mark.parametrize("fmt", [E4M3, E5M6], ids=["e4m3", "e5m6"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales(fmt: Format, power_of_two: bool) -> None:
    exact = torch.tensor([2.0**e for e in range(-149, 128)])
    edge = torch.tensor([fmt.largest * 2.0**e for e in range(-140, 111)])
    amax = torch.cat((torch.zeros(1), exact, edge, broad(2000, torch.inf).abs()))
    amax = torch.cat((amax, torch.nextafter(amax, torch.tensor(0.0)), torch.nextafter(amax, torch.tensor(torch.inf))))
    amax = amax[amax.isfinite()]
    expected = [exact_scale(value, power_of_two, fmt) for value in amax.tolist()]
    assert scales_of(amax, power_of_two, fmt).tolist() == expected
    spoilt = scales_of(torch.tensor([torch.inf, torch.nan]), power_of_two, fmt)
    assert spoilt.isnan().all()


sizes = st.one_of(st.integers(0, 6), st.integers(120, 136), st.integers(250, 262))
shapes = st.tuples(sizes, sizes)
seeds = st.integers(0, 2**31)


def matrix(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values over many orders of magnitude: zeros, rows of zeros, powers of two, subnormals of float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 8, shape, generator=generator)
    x = torch.where(kind == 0, torch.zeros(()), x)
    x = torch.where(kind == 1, torch.exp2((8 * x).round()), x)
    x = x * torch.exp2(torch.randint(-30, 30, (*shape[:-1], 1), generator=generator).float())
    if seed % 5 == 0:
        x = x * 2.0**-120
    if seed % 3 == 0 and shape[0] > 1:
        x[: shape[0] // 2] = 0
    return x.to(dtype)


def reference_round(x: Tensor, tile: tuple[int, int], power_of_two: bool) -> Tensor:
    """Tile by tile, each value to the nearest of the format."""
    out = torch.zeros(x.shape)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            where = slice(i, i + tile[0]), slice(j, j + tile[1])
            part = x[where].float()
            scale = torch.tensor(exact_scale(float(part.abs().max()), power_of_two, E4M3))
            out[where] = torch.from_numpy(nearest((part / scale).numpy(), E4M3)).float() * scale
    return out


@given(shapes, seeds, st.sampled_from([ROWS, COLUMNS, BLOCKS]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_definition(shape: tuple[int, int], seed: int, tile: tuple[int, int], power_of_two: bool) -> None:
    shape = shape[0] % 12 if tile == ROWS else shape[0], shape[1] % 12 if tile == COLUMNS else shape[1]
    x = matrix(shape, seed)
    if 0 in shape:
        return
    quantised = quantise(x, tile, power_of_two)
    assert quantised.scales.shape == tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
    assert torch.equal(dequantise(quantised, tile), reference_round(x, tile, power_of_two))


@given(
    shapes, seeds, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.sampled_from(["", "t", "step"])
)
@settings(max_examples=60, deadline=None)
def test_the_fast_form_equals_the_definition(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, power_of_two: bool, layout: str
) -> None:
    x = matrix(shape, seed, dtype)
    if layout == "t":
        x = x.t().contiguous().t()
    if layout == "step":
        x = torch.stack((x, x + 1), -1).flatten(-2)[:, ::2]
    before = x.clone()
    for rounding in ROUNDINGS:
        assert_rounds_as_defined(rounding, x, power_of_two)
    assert torch.equal(x, before)


def assert_rounds_as_defined(rounding: Any, x: Tensor, power_of_two: bool) -> None:
    fast = {ROWS: rounding.round_rows, COLUMNS: rounding.round_columns, BLOCKS: rounding.round_blocks}
    for tile, rounds in fast.items():
        if x.numel():
            assert same_bits(rounds(x, power_of_two), dequantise(quantise(x, tile, power_of_two), tile))
        assert rounds(x, power_of_two).shape == x.shape
    kept = rounding.keep_rows(x, power_of_two)
    if x.numel():
        assert all(map(same_bits, kept, quantise(x, ROWS, power_of_two)))
    assert same_bits(rounding.restore_rows(kept), rounding.round_rows(x, power_of_two))
    entered, kept_too = rounding.enter_rows(x, power_of_two)
    assert same_bits(entered, rounding.round_rows(x, power_of_two)) and all(map(same_bits, kept, kept_too))
    where = torch.full(x.shape, torch.nan)
    assert rounding.round_blocks(x, power_of_two, where) is where
    assert same_bits(where, rounding.round_blocks(x, power_of_two))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether all bytes are equal, the sign of a zero among them."""
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@given(st.integers(0, 5), st.integers(1, 300), st.integers(1, 300), seeds)
@settings(max_examples=20, deadline=None)
def test_stacked_weights_are_quantised_one_by_one(num: int, n: int, k: int, seed: int) -> None:
    weight = matrix((num * n, k), seed).view(num, n, k)
    for rounding in ROUNDINGS if num else []:
        whole = rounding.round_blocks(weight)
        assert torch.equal(whole, torch.stack([rounding.round_blocks(each) for each in weight]))


@given(shapes, seeds)
@settings(max_examples=30, deadline=None)
def test_e5m6(shape: tuple[int, int], seed: int) -> None:
    x = matrix(shape, seed, torch.bfloat16)
    kept = keep_rows_e5m6(x)
    values = restore_rows_e5m6(kept)
    assert values.shape == x.shape
    for j in range(0, shape[1], 128):
        part = x[:, j : j + 128].float()
        if part.numel():
            amax = part.abs().amax(-1).tolist()
            scale = torch.tensor([exact_scale(value, True, E5M6) for value in amax])[:, None]
            expected = torch.from_numpy(nearest((part / scale).numpy(), E5M6)).float() * scale
            assert torch.equal(values[:, j : j + 128], expected)
    num_bytes = sum(part.numel() * part.element_size() for part in kept)
    assert num_bytes == shape[0] * (shape[1] + -(-shape[1] // 2) + 4 * -(-shape[1] // 128))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_spoils_its_tile_and_no_other(bad: float, power_of_two: bool, rounding: Any) -> None:
    round_rows, round_columns = rounding.round_rows, rounding.round_columns
    x = torch.randn(3, 300)
    x[1, 130] = bad
    spoilt = torch.zeros(3, 300, dtype=torch.bool)
    spoilt[1, 128:256] = True
    clean = torch.where(spoilt, torch.zeros(()), x)
    for values in (
        round_rows(x, power_of_two),
        rounding.restore_rows(rounding.keep_rows(x, power_of_two)),
        dequantise(quantise(x, ROWS, power_of_two), ROWS),
    ):
        assert torch.equal(values.isnan(), spoilt)
        assert torch.equal(values[~spoilt], round_rows(clean, power_of_two)[~spoilt])
    assert torch.equal(restore_rows_e5m6(keep_rows_e5m6(x)).isnan(), spoilt)
    assert torch.equal(round_columns(x, power_of_two).isnan(), torch.zeros(3, 300) + torch.arange(300).eq(130) > 0)
    assert rounding.round_blocks(x, power_of_two)[:, 128:256].isnan().all()


def test_a_tile_knows_nothing_of_its_neighbours() -> None:
    """Rows are quantised alike wherever they lie: forward and input gradient do not see how tokens are spread."""
    x = matrix((50, 300), 7, torch.bfloat16)
    for rounding in ROUNDINGS:
        round_rows, round_columns = rounding.round_rows, rounding.round_columns
        parts = torch.cat([round_rows(part) for part in x.split([1, 20, 0, 29])])
        assert torch.equal(round_rows(x), parts)
        # Columns do see it: their tiles reach over 128 tokens.
        assert not torch.equal(round_columns(x), torch.cat([round_columns(part) for part in x.split([20, 30])]))


@given(st.integers(1, 20), st.integers(1, 300), seeds)
@settings(max_examples=40, deadline=None)
def test_rounding_twice_with_powers_of_two_is_rounding_once(m: int, k: int, seed: int) -> None:
    for rounding in ROUNDINGS:
        once = rounding.round_rows(matrix((m, k), seed), True)
        assert torch.equal(rounding.round_rows(once, True), once)
        assert torch.equal(rounding.restore_rows(rounding.keep_rows(once, True)), once)


@given(st.integers(1, 300), st.integers(1, 300), seeds, st.integers(-40, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_factor_of_two_changes_exponents_alone(m: int, k: int, seed: int, shift: int, power_of_two: bool) -> None:
    """No floor: gradients of a mean over any number of tokens keep the same bits."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    for fast in (tiles.round_rows, tiles.round_columns, tiles.round_blocks):
        assert torch.equal(fast(x * 2.0**shift, power_of_two), fast(x, power_of_two) * 2.0**shift)


@given(st.lists(st.sampled_from([1, 2, 7, 127, 128, 129, 300]), max_size=5), st.integers(1, 140), seeds, st.booleans())
@settings(max_examples=30, deadline=None)
def test_groups_rounded_together_are_each_rounded_alone(
    lengths: list[int], k: int, seed: int, power_of_two: bool
) -> None:
    """Groups of any length, which need not cover the rows nor lie in order."""
    x = matrix((sum(lengths) + 3, k), seed).bfloat16()
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    groups = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)][::-1]
    for rounding in ROUNDINGS:
        together = rounding.round_group_columns(x, groups, power_of_two)
        for rows, found in zip(groups, together, strict=True):
            want = dequantise(quantise(x[rows], COLUMNS, power_of_two), COLUMNS)
            assert same_bits(found, want)
