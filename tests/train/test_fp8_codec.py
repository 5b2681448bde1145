"""Rows as bytes between ranks, and weights as published checkpoints hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_fp8_tiles import matrix
from train.precision.blockwise import BLOCKS, Quantised, dequantise, quantise
from train.precision.codec import Fp8Rows
from train.precision.coded import parts_of
from train.precision.published import from_published, to_published
from train.precision.tiles import restore_rows, round_rows

seeds = st.integers(0, 2**31)


@given(st.integers(0, 9), st.integers(1, 300), seeds, st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=50, deadline=None)
def test_rows_arrive_rounded_as_the_model_rounds_them(n: int, width: int, seed: int, dtype: torch.dtype) -> None:
    seed += seed % 5 == 0  # the smallest of these leave bfloat16's range when rounded
    rows, codec = matrix((n, width), seed, dtype), Fp8Rows(width)
    payload = codec.encode(rows)
    assert payload.dtype == torch.uint8 and payload.shape == (n, codec.num_bytes) == (n, width + -(-width // 128))
    source = torch.randint(n, (2 * n,), generator=torch.Generator().manual_seed(seed)) if n else torch.zeros(0).long()
    arrived = codec.arrive(payload, source, [2 * n], dtype)
    assert arrived.dtype == dtype and arrived.shape == (2 * n, width)
    assert torch.equal(floats(arrived), round_rows(rows, power_of_two=True)[source])
    # Sent on, it is the same values.
    again = codec.arrive(codec.encode(floats(arrived)), torch.arange(2 * n), [2 * n], dtype)
    assert torch.equal(floats(again), floats(arrived))


def floats(rows: torch.Tensor) -> torch.Tensor:
    parts = parts_of(rows)
    assert parts is not None
    return restore_rows(parts)


def test_an_overflow_arrives_as_one() -> None:
    rows = torch.ones(2, 200)
    rows[1, 150] = torch.inf
    arrived = Fp8Rows(200).arrive(Fp8Rows(200).encode(rows), torch.arange(2), [2], torch.float32)
    assert floats(arrived).isnan().nonzero().tolist() == [[1, column] for column in range(128, 200)]


def test_coded_rows_are_handed_on_and_not_computed_with() -> None:
    """What a tape does with rows leaves them as they are; a gradient of theirs is a tensor of floats; no memory is
    taken for values that nobody has."""
    codec, entered = Fp8Rows(256), list[torch.Tensor]()
    rows = codec.arrive(codec.encode(torch.randn(4, 256)), torch.tensor([3, 0, 1]), [3], torch.bfloat16)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            entered.append(x)
            return floats(x).bfloat16() * 2

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            entered.append(dy)
            return torch.full((3, 256), 2.0).bfloat16()

    leaf = rows.detach().requires_grad_()
    y = Doubled.apply(leaf.view_as(leaf))
    torch.autograd.backward(y, codec.arrive(codec.encode(torch.ones(3, 256)), torch.arange(3), [3], torch.bfloat16))
    assert torch.equal(y, floats(rows).bfloat16() * 2) and torch.equal(leaf.grad, torch.full((3, 256), 2.0).bfloat16())
    assert all(parts_of(each) is not None for each in entered) and parts_of(leaf) == parts_of(rows)
    assert rows.untyped_storage().nbytes() == 0
    with pytest.raises(NotImplementedError, match=r"add.*quantised"):
        rows + 1


def test_bytes_of_a_row() -> None:
    """The hidden state of DeepSeek-V3 takes half of its bfloat16, and 56 bytes."""
    assert Fp8Rows(7168).num_bytes == 7168 + 56


def published(n: int, k: int, seed: int, power_of_two: bool) -> Quantised:
    """A pair as a publisher makes it, with scales of any last bit."""
    return quantise(matrix((n, k), seed + (seed % 5 == 0)) + 1e-3, BLOCKS, power_of_two)


@given(st.integers(1, 300), st.integers(1, 300), seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_published_weights_through_float32_are_exact(n: int, k: int, seed: int, power_of_two: bool) -> None:
    pair = published(n, k, seed, power_of_two)
    weight = from_published(*pair)
    assert weight.dtype == torch.float32 and weight.shape == (n, k)
    again = to_published(weight)
    assert again.scales.shape == (-(-n // 128), -(-k // 128)) and again.scales.dtype == torch.float32
    assert torch.equal(from_published(*again), weight)


@given(st.integers(1, 300), st.integers(1, 300), seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_published_weights_through_bfloat16_are_within_an_ulp(n: int, k: int, seed: int, power_of_two: bool) -> None:
    weight = from_published(*published(n, k, seed, power_of_two), torch.bfloat16)
    again = from_published(*to_published(weight), torch.bfloat16)
    codes = [each.view(torch.int16).to(torch.int32) & 0x7FFF for each in (weight, again)]
    assert torch.equal(weight.sign(), again.sign())
    assert int((codes[0] - codes[1]).abs().max()) <= 1


def test_the_released_floor_is_for_publishing_alone() -> None:
    tiny = torch.full((4, 4), 1e-7)
    assert to_published(tiny).scales.item() == pytest.approx(1e-4 / 448, rel=1e-6)
    assert quantise(tiny, BLOCKS).scales.item() == pytest.approx(1e-7 / 448, rel=1e-6)


def test_many_scales_survive() -> None:
    """Blocks of one element: the division by 448 alone would miss one scale in ten by its last bit."""
    scales = torch.rand(3000, generator=torch.Generator().manual_seed(0)) + 0.5
    missed = (scales * 448) / 448 != scales
    assert missed.float().mean() > 0.05
    for scale in scales[missed][:40]:
        values = torch.tensor([[448.0, 3.25, -17.0, 0.01953125]]).to(torch.float8_e4m3fn)
        weight = from_published(values, scale.view(1, 1))
        again = to_published(weight)
        assert torch.equal(dequantise(again, BLOCKS), weight)


def test_a_pair_that_is_none_is_refused() -> None:
    values = torch.zeros(130, 5).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(130, 5\).*\(1, 1\)"):
        from_published(values, torch.ones(1, 1))
    with pytest.raises(ValueError, match="float32"):
        from_published(values.float(), torch.ones(2, 1))
    with pytest.raises(ValueError, match="NaN"):
        to_published(torch.tensor([[torch.nan]]))
