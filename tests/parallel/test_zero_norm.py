"""The sum of squares: right in size and range for every length, whatever fp32 can hold."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from parallel.everyone import Everyone
from parallel.host import Host
from parallel.watch import Watch
from parallel.zero.norm import global_norm, sum_of_squares
from tests.bounds import gamma, likely_gamma
from tests.spawn import Ranks

SCALES = [1e-40, 1e-30, 1e-22, 1e-18, 1e-9, 1.0, 1e18, 1e30, 1e37]
NUMELS = [1, 5, 4095, 4096, 12_289, 150_001]
# A row of 4096 elements is summed in fp32, its root rounded; some forty rows are added in fp64.
NUM_ROUNDINGS, NUM_ROWS = 4096 + 4, 40


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("numel", NUMELS)
def test_equal_to_an_exact_sum(numel: int, scale: float) -> None:
    """In any order of the sums, but for one run in a million: the tests of this file sum less than 1000 rows."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel), dtype=torch.float64) * scale
    for dtype in (torch.float32, torch.float64):
        rounded = values.to(dtype)
        exact = math.fsum(x * x for x in rounded.tolist())
        total = sum_of_squares(rounded, Host())
        assert total.shape == (1,) and total.dtype == torch.float64
        tolerance = likely_gamma(NUM_ROUNDINGS, torch.float32, failure=1e-9) if dtype == torch.float32 else 0.0
        tolerance += gamma(numel + NUM_ROWS, torch.float64)
        assert total.item() == pytest.approx(exact, rel=tolerance, abs=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("numel", NUMELS)
def test_squares_that_fp32_can_sum_lose_their_roots_rounding_alone(numel: int, scale: float) -> None:
    """Whole numbers up to 15 times a power of two: any order of 4096 squares is exact, and a square of a rounded root
    is off by two roundings."""
    whole = torch.randint(-15, 16, (numel,), generator=torch.Generator().manual_seed(numel)).float()
    whole[0] = 1.0
    factor = 2.0 ** max(round(math.log2(scale)), -130)
    for dtype, rounding in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        exact = float(whole.double().square().sum()) * factor**2
        total = sum_of_squares(whole.to(dtype) * factor, Host())
        assert total.item() == pytest.approx(exact, rel=2.01 * rounding + gamma(NUM_ROWS, torch.float64), abs=0)


def test_long_shards_are_not_one_sum_in_fp32() -> None:
    """Ones that are added to 2^24 in fp32 are lost: as many as are in its row, and not the millions behind it."""
    values = torch.ones(1 << 22)
    values[0] = 4096.0
    exact = 2.0**24 + len(values) - 1
    assert sum_of_squares(values, Host()).item() == pytest.approx(exact, rel=gamma(NUM_ROUNDINGS, torch.float32), abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 4096, 8199])
def test_one_bad_element_is_enough(dtype: torch.dtype, bad: float, where: int) -> None:
    values = torch.ones(8200, dtype=dtype)
    values[where] = bad
    assert not math.isfinite(sum_of_squares(values, Host()).item())


def test_nothing_weighs_nothing() -> None:
    assert sum_of_squares(torch.zeros(10_000), Host()).item() == 0


def test_a_few_large_among_tiny_elements() -> None:
    """The squares of the tiny ones leave fp32's range; the sum does not notice."""
    values = torch.full((20_000,), 1e-25)
    values[::1000] = 1e-3
    assert sum_of_squares(values, Host()).item() == pytest.approx(20 * float(values[0]) ** 2, rel=1e-7)


def norm_of_a_stage() -> float:
    """On each of 4 ranks: two stages of two replicas; shards are ones of any size."""
    stage, replica = divmod(dist.get_rank(), 2)
    world = Everyone.of(dist.new_group([0, 1, 2, 3]))
    return global_norm([torch.ones(1 + stage), torch.ones(10 + replica)], world, Host(), Watch())


def test_every_shard_of_every_stage_counts_once(ranks: Ranks) -> None:
    norms = ranks.run(norm_of_a_stage, world_size=4)
    assert norms == [math.sqrt(2 * (1 + 2) + 2 * (10 + 11))] * 4
