"""Our collectives against torch's own, for uneven and empty splits and all dtypes that travel."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import collectives
from parallel.collectives import Steps, all_gather, drive, exchange, exchange_counts, reduce_scatter
from tests.spawn import Ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn * 100).to(dtype)


def exchanges() -> None:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    random_ = random.Random(size)
    for trial in range(40):
        # counts[a][b] rows go from a to b; about a third of the splits are empty
        counts = [[random_.choice([0, 1, 2, 5, 30]) * random_.randint(0, 1) for _ in range(size)] for _ in range(size)]
        dtype, width = random_.choice(DTYPES), random_.choice([(), (1,), (7,), (3, 2), (0,)])
        send_counts, recv_counts = counts[rank], [row[rank] for row in counts]
        send = values((sum(send_counts), *width), dtype, trial * 10 + rank)
        wanted = torch.empty((sum(recv_counts), *width), dtype=dtype)
        dist.all_to_all_single(wanted, send, recv_counts, send_counts)
        handle = exchange(send, send_counts, recv_counts, group)
        assert torch.equal(handle.wait(), wanted)
        assert handle.wait() is handle.wait()
        transposed = torch.tensor(send_counts)
        assert exchange_counts(transposed, group).wait().tolist() == recv_counts
        strided = values((4, sum(send_counts)), dtype, trial).t()
        assert exchange(strided, send_counts, recv_counts, group).wait().shape == (sum(recv_counts), 4)


def reductions() -> list[Tensor]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    sums = []
    for trial, dtype in enumerate(DTYPES * 3):
        flat = values((size * (trial * 5),), dtype, trial * 10 + rank)
        everyone = [values((size * (trial * 5),), dtype, trial * 10 + other) for other in range(size)]
        exact = torch.stack(everyone).to(torch.int64 if dtype == torch.int64 else torch.float64).sum(0)
        piece = reduce_scatter(flat, group).wait()
        wanted = exact.view(size, -1)[rank]
        # Rank order: one rounding per addition (one in all for bf16, which is added in fp32), none for integers.
        eps = 0 if dtype == torch.int64 else torch.finfo(dtype).eps
        bound = size * eps * torch.stack(everyone).abs().to(wanted.dtype).sum(0).view(size, -1)[rank]
        assert piece.dtype == dtype and bool(((piece.to(wanted.dtype) - wanted).abs() <= bound).all())

        in_order = torch.zeros_like(flat, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
        for other in everyone:
            in_order += other
        assert torch.equal(piece, in_order.to(dtype).view(size, -1)[rank])
        gathered = all_gather(piece, group).wait()
        assert torch.equal(gathered, in_order.to(dtype))
        library = torch.empty((size, piece.numel()), dtype=dtype)
        dist.all_gather_into_tensor(library.view(-1), piece)
        assert torch.equal(all_gather(piece.view(1, -1), group).wait(), library)
        sums.append(gathered)
    return sums


def many_under_way() -> None:
    """Handles waited for in another order than launched, their inputs dropped by the caller."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    handles = []
    for number in range(12):
        ones = [1] * size
        handles.append(exchange(torch.full((size, 1000), float(rank * 100 + number)), ones, ones, group))
        handles.append(all_gather(torch.full((1, 500), float(rank * 100 + number)), group))
        gc.collect()
    for place in reversed(range(len(handles))):
        expected = torch.arange(size) * 100.0 + place // 2
        assert torch.equal(handles[place].wait()[:, 0], expected)


def a_dead_peer() -> str:
    """Rank 1 leaves without a word; the others must hear of it from the exchange they wait in."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    dist.barrier()
    if rank == 1:
        return "left"  # the pool destroys the process group: its connections close
    ones = [1] * size
    try:
        exchange(torch.zeros(size, 4), ones, ones, group).wait()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exchange_equals_all_to_all(ranks: Ranks, world_size: int) -> None:
    ranks.run(exchanges, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_are_in_rank_order_and_equal_everywhere(ranks: Ranks, world_size: int) -> None:
    results = ranks.run(reductions, world_size=world_size)
    for rank_sums in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rank_sums, results[0], strict=True))


def test_many_handles_at_once(ranks: Ranks) -> None:
    ranks.run(many_under_way, world_size=4)


def test_waiting_for_a_rank_that_is_gone_raises(ranks: Ranks) -> None:
    left = ranks.run(a_dead_peer, world_size=2)
    assert "losed" in left[0] or "reset" in left[0], left[0]


def uneven(numels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """On each rank: its piece of the sum of what all ranks have, and what all pieces make together."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    flat = torch.arange(sum(numels), dtype=torch.float64) * (rank + 1) + rank
    piece = reduce_scatter(flat, group, numels).wait()
    return piece, all_gather(piece, group, torch.empty_like(flat), numels).wait()


@pytest.mark.parametrize("numels", [[3, 0, 5], [0, 0, 4], [2, 2, 2], [1, 7, 2]], ids=str)
def test_pieces_may_be_of_any_size(ranks: Ranks, numels: list[int]) -> None:
    total = sum(torch.arange(sum(numels), dtype=torch.float64) * (rank + 1) + rank for rank in range(3))
    found = ranks.run(uneven, numels, world_size=3)
    for (piece, whole), expected in zip(found, torch.as_tensor(total).split(numels), strict=True):
        assert torch.equal(piece, expected) and torch.equal(whole, torch.as_tensor(total))


def refused() -> str:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(ValueError) as error:
        reduce_scatter(torch.zeros(3), group)
    return str(error.value)


def test_reduce_scatter_says_what_does_not_divide(ranks: Ranks) -> None:
    assert "2 ranks must divide" in ranks.run(refused, world_size=2)[0]


def test_drive_returns_the_result() -> None:
    def steps() -> Steps[int]:
        yield
        yield
        return 7

    assert drive(steps()) == 7


class Work:
    """An operation that is queued elsewhere; counts who was made to wait for it."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait(self) -> None:
        self.waited.append(collectives.current_stream(torch.zeros(1)))


def test_each_stream_waits_once_for_what_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are read on a stream of their own, and used on the one that computes."""
    now = ["computing"]
    monkeypatch.setattr(collectives, "current_stream", lambda tensor: now[0])
    work, result, kept = Work(), torch.ones(2), torch.zeros(3)
    held = weakref.ref(kept)
    handle = collectives.Queued(work, (kept,), result)
    del kept
    for stream in ("reading", "reading", "computing", "computing", "reading"):
        now[0] = stream
        assert handle.wait() is result
        assert held() is None, "what was sent is let go at the first wait"
    assert work.waited == ["reading", "computing"]
