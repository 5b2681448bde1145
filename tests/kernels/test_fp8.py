"""Passes around FP8 products in Triton's interpreter, against their eager twins."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.train.test_fp8_tiles import matrix
from train.model.kernels import Kernels
from train.precision import tiles
from train.precision.eager_passes import EagerPasses
from train.precision.kernel_passes import KernelPasses
from train.precision.kernel_tiles import KernelTiles
from train.precision.quantised import Groups, Rows

EAGER, OURS = EagerPasses(), KernelPasses()
CPU = torch.device("cpu")
splits = st.lists(st.sampled_from([0, 16, 144]), min_size=1, max_size=3)
widths = st.sampled_from([16, 144])
dtypes = st.sampled_from([torch.bfloat16, torch.float32])
seeds = st.integers(0, 2**31)


def same(ours: Any, theirs: Any) -> bool:
    """Tensors, nested alike, by their bytes; what is not a number has one sign."""
    if not isinstance(ours, Tensor):
        return len(ours) == len(theirs) and all(same(*each) for each in zip(ours, theirs, strict=True))
    if ours.dtype == torch.float8_e4m3fn:
        ours, theirs = (torch.where(codes == 0xFF, 0x7F, codes) for codes in (_bytes(ours), _bytes(theirs)))
    elif ours.is_floating_point():
        ours, theirs = (each.nan_to_num(nan=torch.inf, posinf=-1.0) for each in (ours, theirs))
    return torch.equal(_bytes(ours), _bytes(theirs))


def _bytes(x: Tensor) -> Tensor:
    return x.flatten().view(torch.uint8)  # flat: rows of one number may have any stride


def values(num_rows: int, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of all magnitudes, with zeros, and here and there what no number is."""
    x = matrix((num_rows, width), seed, dtype)
    if x.numel() and seed % 3 == 0:
        x.view(-1)[seed % x.numel()] = (torch.inf, -torch.inf, torch.nan)[seed // 3 % 3]
    return x


@given(st.integers(0, 150), widths, dtypes, st.booleans(), seeds)
@settings(max_examples=5, deadline=None)
def test_quantising_has_the_same_bits(num_rows: int, width: int, dtype: torch.dtype, power: bool, seed: int) -> None:
    x = values(num_rows, width, seed, dtype)
    assert same(OURS.quantise(x, power), EAGER.quantise(x, power))
    assert same(OURS.quantise_rows(x.t().contiguous().t(), power), EAGER.quantise_rows(x, power))


@given(splits, widths, st.integers(1, 30), seeds)
@settings(max_examples=5, deadline=None)
def test_rows_on_the_way_have_the_same_bits(lengths: list[int], width: int, num_sent: int, seed: int) -> None:
    """Encoded, taken by an index that names none for some rows, and turned into columns."""
    x, groups = values(num_sent, width, seed), Groups.of(lengths, CPU)
    payload = OURS.encode(x)
    for part in (slice(0, width), slice(width, None)):
        kind = torch.float8_e4m3fn if part.start == 0 else torch.uint8
        assert same(payload[:, part].contiguous().view(kind), EAGER.encode(x)[:, part].contiguous().view(kind))
    source = torch.randint(num_sent + 1, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    rows = OURS.take(payload, source, groups, width)
    assert same(rows.codes, EAGER.take(payload, source, groups, width).codes)
    plain = torch.nn.functional.pad(tiles.round_rows(x, True), (0, 0, 0, 1))[source]
    back = torch.cat([tiles.restore_rows((each.codes, each.scales.t())) for each in groups.rows(rows)])
    torch.testing.assert_close(back, plain, rtol=0, atol=0, equal_nan=True)
    assert same(OURS.columns(rows, groups, True), EAGER.columns(rows, groups, True))


def near(ours: Any, theirs: Any) -> None:
    """The same codes and scales but for one in a hundred: an exponential that is another in its last bit turns a
    rounding to bfloat16 here and there, and that one to E4M3, or a scale. (Where this was written none is another.)"""
    for mine, twin in zip(ours, theirs, strict=True):
        assert mine.shape == twin.shape
        if mine.numel():
            assert (mine.float() != twin.float()).float().mean() < 0.01


@pytest.mark.parametrize("weighted", [True, False])
@given(splits, st.booleans(), seeds)
@settings(max_examples=2, deadline=None)
def test_swiglu(weighted: bool, lengths: list[int], power: bool, seed: int) -> None:
    """Magnitudes as an MLP has them: where scales are powers of two, one that falls the other way would double."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, width, groups = sum(lengths), 128, Groups.of(lengths, CPU)
    h = torch.randn(num_rows, 2 * width, generator=generator).bfloat16()
    da = (torch.randn(num_rows, width, generator=generator) * 2.0**-20).bfloat16()
    row_weights = torch.rand(num_rows, generator=generator) if weighted else None
    how = Kernels(), h, row_weights, groups, power
    (kept, ours), (kept_twin, theirs) = OURS.activate(*how), EAGER.activate(*how)
    assert same(kept, kept_twin)
    near(ours, theirs)
    back = Kernels(), da, Rows(*kept), row_weights, groups, power, False
    (*found, d_weights), (*twins, d_weights_twin) = OURS.activate_backward(*back), EAGER.activate_backward(*back)
    for one, twin in zip(found, twins, strict=True):
        near(one, twin)
    if weighted:
        torch.testing.assert_close(d_weights, d_weights_twin, rtol=1e-4, atol=1e-9)


def test_an_activation_with_tiles_of_both_maps_stays_eager() -> None:
    h, groups = torch.randn(32, 96).bfloat16(), Groups.of([32], CPU)
    how = Kernels(), h, None, groups, True
    assert same(OURS.activate(*how), EAGER.activate(*how))


@given(st.lists(st.integers(1, 150), min_size=1, max_size=2), widths, dtypes, st.booleans(), seeds)
@settings(max_examples=4, deadline=None)
def test_the_reference_rounds_to_the_same_bits(
    lengths: list[int], width: int, dtype: torch.dtype, power: bool, seed: int
) -> None:
    """Values, what is kept of rows, columns of groups, and blocks of stacked weights."""
    x, ours = values(sum(lengths), width, seed, dtype), KernelTiles()
    assert same(ours.enter_rows(x, power), tiles.enter_rows(x, power))
    ends = list(accumulate(lengths))
    groups = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    assert same(ours.round_group_columns(x, groups, power), tiles.round_group_columns(x, groups, power))
    weight = values(2 * lengths[0], width, seed + 1, dtype).view(2, lengths[0], width)
    assert same(ours.round_blocks(weight, power), tiles.round_blocks(weight, power))
