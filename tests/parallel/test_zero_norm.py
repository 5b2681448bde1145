"""The sum of squares: right in size and range for every length, whatever fp32 can hold."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from parallel.host import Host
from parallel.watch import Watch
from parallel.zero.norm import global_norm, sum_of_squares
from tests.spawn import Ranks


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-18, 1e-9, 1.0, 1e18, 1e30, 1e37])
@pytest.mark.parametrize("numel", [1, 5, 4095, 4096, 12_289, 150_001])
def test_equal_to_an_exact_sum(numel: int, scale: float) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel), dtype=torch.float64) * scale
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-13)):
        rounded = values.to(dtype)
        exact = math.fsum(x * x for x in rounded.tolist())
        total = sum_of_squares(rounded)
        assert total.shape == (1,) and total.dtype == torch.float64
        # A row is a sum in fp32 (2^-24 of rounding, in several lanes); rows err in both directions.
        assert total.item() == pytest.approx(exact, rel=tolerance, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 4096, 8199])
def test_one_bad_element_is_enough(dtype: torch.dtype, bad: float, where: int) -> None:
    values = torch.ones(8200, dtype=dtype)
    values[where] = bad
    assert not math.isfinite(sum_of_squares(values).item())


def test_nothing_weighs_nothing() -> None:
    assert sum_of_squares(torch.zeros(10_000)).item() == 0


def test_a_few_large_among_tiny_elements() -> None:
    """The squares of the tiny ones leave fp32's range; the sum does not notice."""
    values = torch.full((20_000,), 1e-25)
    values[::1000] = 1e-3
    assert sum_of_squares(values).item() == pytest.approx(20 * float(values[0]) ** 2, rel=1e-7)


def norm_of_a_stage() -> float:
    """On each of 4 ranks: two stages of two replicas; shards are ones of any size."""
    stage, replica = divmod(dist.get_rank(), 2)
    return global_norm([torch.ones(1 + stage), torch.ones(10 + replica)], dist.new_group([0, 1, 2, 3]), Host(), Watch())


def test_every_shard_of_every_stage_counts_once(ranks: Ranks) -> None:
    norms = ranks.run(norm_of_a_stage, world_size=4)
    assert norms == [math.sqrt(2 * (1 + 2) + 2 * (10 + 11))] * 4
