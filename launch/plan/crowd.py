"""What ranks of one machine do to each other: the messages that they send, and how much longer everything takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from launch.plan.figures import MessageTime
from launch.plan.stopwatch import FIGURE_S, NUM_BLOCKS, block_s, figure
from parallel.collectives import all_gather, exchange, reduce_scatter

MESSAGE_BYTES = (64, 4 << 10, 64 << 10, 1 << 20, 8 << 20)
# How long ranks work at once to see how much longer everything takes, and how often that is tried.
CROWDED_S, NUM_CROWDED = 0.25, 3


def measured_messages(group: dist.ProcessGroup) -> Iterator[MessageTime]:
    """As the product sends: every call waits for its result."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    for num_bytes in MESSAGE_BYTES:
        each = max(num_bytes // 4 // size, 1)
        whole, piece = torch.ones(each * size), torch.ones(each)
        counts = [each] * size
        calls: dict[str, Callable[[], object]] = {
            "exchange": lambda: exchange(whole, counts, counts, group).wait(),
            "reduce_scatter": lambda: reduce_scatter(whole, group).wait(),
            "all_gather": lambda: all_gather(piece, group).wait(),
        }
        for name, call in calls.items():
            yield MessageTime(name, size, each * 4 * (size - 1), 1e6 * _agreed_seconds(call))
        tensor = torch.ones(each * size)
        if rank < 2:
            yield MessageTime("send", 2, tensor.nbytes, 1e6 * _sent_seconds(tensor, rank))
        dist.barrier(group)


def _agreed_seconds(call: Callable[[], object]) -> float:
    """Seconds of a call that all ranks make equally often."""
    call()
    once = torch.tensor([block_s(call, 2)], dtype=torch.float64)
    dist.broadcast(once, 0)
    count = max(2, int(FIGURE_S / NUM_BLOCKS / float(once)))
    return figure([block_s(call, count) for _ in range(NUM_BLOCKS)])


def _sent_seconds(tensor: Tensor, rank: int) -> float:
    """One way between ranks 0 and 1: half of there and back."""

    def ping() -> None:
        for turn in (0, 1):
            if rank == turn:
                dist.send(tensor, 1 - rank)
            else:
                dist.recv(tensor, 1 - rank)

    ping()
    count = max(2, int(FIGURE_S / NUM_BLOCKS / (2e-9 * tensor.nbytes + 1e-3)))
    return figure([block_s(ping, count) for _ in range(NUM_BLOCKS)]) / 2


def contention(group: dist.ProcessGroup) -> dict[str, float]:
    """Times longer that a product, a pass and a call take on all ranks at once than on the first alone.

    Ranks above the number of cores take turns, which makes everything as much longer. What they do to each other
    besides, in caches and memory, is told by the time that a processor is at work, which no other program takes away.
    """
    a = torch.randn(256, 256)
    x, y, small = torch.ones(6 << 20), torch.empty(6 << 20), torch.ones(8, 8)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: a @ a,
        "passes": lambda: y.copy_(x),
        "calls": lambda: small.mul(small),
    }
    turns = max(1.0, dist.get_world_size(group) / (os.cpu_count() or 1))
    found = {}
    for kind, call in calls.items():
        times = []
        for _ in range(NUM_CROWDED):
            alone_s = _work_s(call) if dist.get_rank(group) == 0 else 1.0
            dist.barrier(group)
            times.append(_work_s(call) / alone_s)
            dist.barrier(group)
        found[kind] = turns * max(statistics.median(times), 1.0)
    return found


def _work_s(call: Callable[[], object]) -> float:
    """What a processor works on a call, in the mean of a time that is far longer than turns at a core are."""
    call()
    started_s, worked_s, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started_s < CROWDED_S:
        call()
        count += 1
    return (time.process_time() - worked_s) / max(count, 1)
