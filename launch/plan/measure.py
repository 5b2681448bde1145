"""What one rank measures of this machine: products, passes over memory, attention, and what ranks send each other.

`calibrate` starts it as a job's ranks are started, with the same allocator, threads and groups: on a processor these
decide as much as the cores do. Rank 0 writes what it found as JSON.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from launch.plan.calibrate import LARGE_PASS_BYTES, USUAL
from launch.plan.crowd import contention, measured_messages
from launch.plan.figures import AttentionRate, FarTime, PassRate, ProductRate
from launch.plan.own_code import measured_code
from launch.plan.stopwatch import Stopwatch
from train.environment import num_threads, read

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# (m, n, k): from what a head of attention multiplies and an expert gets on small runs to what fills a processor.
PRODUCTS = (
    *((8, 128, 128), (32, 256, 128), (64, 64, 64), (128, 512, 128), (128, 128, 512), (256, 256, 1024)),
    *((512, 1024, 256), (512, 256, 1024), (1024, 1024, 1024), (2048, 512, 512), (64, 2048, 512)),
    *((16, 512, 512), (128, 128, 128), (256, 512, 256), (512, 512, 512), (1024, 64, 256), (4096, 256, 128)),
)
# (groups, m of a group, n, k): batches of small products, as attention's core has them.
BATCHES = ((8, 64, 64, 32), (16, 128, 128, 64), (16, 256, 64, 256))
PASS_BYTES = (16 << 10, 256 << 10, 1 << 20, 4 << 20)
LENGTHS = (128, 512, 1024)
WIDTHS = (32, 64)
NUM_HEADS = 4
# Operands in turn that are so much together lie in no cache of a core when it comes back to one.
FAR_BYTES = 64 << 20
WIDTH = 256  # of a row that passes over memory work on


@dataclass
class Found:
    """What was measured, and how far the blocks of a figure were apart in the mean."""

    products: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    attention: list[dict[str, Any]]
    far_products: list[dict[str, Any]]
    far_passes: list[dict[str, Any]]
    code: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    contention: dict[str, float]
    least_us: float
    spreads: dict[str, float]


def program(arguments: Sequence[str]) -> None:
    """A rank: `OUT` is the file for rank 0's findings."""
    (out,) = arguments
    place = read()
    if place.world_size == 1:
        found = alone(num_threads() or 1, _say)
    else:
        dist.init_process_group("gloo")
        found = together()
        dist.destroy_process_group()
    if place.rank == 0:
        Path(out).write_text(json.dumps(asdict(found)))


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def alone(most_threads: int, say: Callable[[str], object]) -> Found:
    """All that a rank finds by itself, with one thread and with all."""
    watch = Stopwatch()
    products, passes, attention, far_products, far_passes = [], [], [], [], []
    for threads in sorted({1, most_threads}):
        torch.set_num_threads(threads)
        say(f"{threads} {'thread' if threads == 1 else 'threads'}: products")
        products += [asdict(row) for row in measured_products(watch, threads)]
        say(f"{threads} {'thread' if threads == 1 else 'threads'}: passes over memory")
        passes += [asdict(row) for row in measured_passes(watch, threads)]
        say(f"{threads} {'thread' if threads == 1 else 'threads'}: memory out of cache")
        of_products, of_passes = measured_far(watch, threads)
        far_products += [asdict(row) for row in of_products]
        far_passes += [asdict(row) for row in of_passes]
        say(f"{threads} {'thread' if threads == 1 else 'threads'}: attention")
        attention += [asdict(row) for row in measured_attention(watch, threads)]
    torch.set_num_threads(1)
    say("our own code")
    code = [asdict(row) for row in measured_code()]
    least = 1e6 * least_s(watch)
    return Found(products, passes, attention, far_products, far_passes, code, [], {}, least, watch.spreads())


def measured_products(watch: Stopwatch, threads: int) -> Iterator[ProductRate]:
    """Plain and batched products of each type."""
    for name, dtype in DTYPES.items():
        for m, n, k in PRODUCTS:
            a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype).t()
            seconds = watch.seconds("products", lambda a=a, b=b: a @ b)  # type: ignore[misc]
            yield ProductRate(name, m, n, k, 2 * m * n * k / seconds / 1e12, 1, name, threads)
        for groups, m, n, k in BATCHES:
            a, b = torch.randn(groups, m, k, dtype=dtype), torch.randn(groups, k, n, dtype=dtype)
            seconds = watch.seconds("products", lambda a=a, b=b: torch.bmm(a, b))  # type: ignore[misc]
            yield ProductRate(name, groups * m, n, k, 2 * groups * m * n * k / seconds / 1e12, groups, name, threads)


def measured_passes(watch: Stopwatch, threads: int) -> Iterator[PassRate]:
    """Operations that multiply nothing, by size and type."""
    for dtype_name in ("float32", "bfloat16", "float64"):
        dtype = DTYPES[dtype_name]
        for name, make in PASSES.items():
            if dtype_name == "float64" and name not in PLAIN:
                continue
            for size in (*PASS_BYTES, *((LARGE_PASS_BYTES,) if name in USUAL else ())):
                rows = max(size // (WIDTH * dtype.itemsize), 2)
                function, num_bytes = make(torch.randn(2, WIDTH, dtype=dtype).repeat(rows // 2, 1))
                seconds = watch.seconds("passes", function)
                yield PassRate(name, num_bytes, num_bytes / seconds / 1e9, dtype_name, threads)


def measured_far(watch: Stopwatch, threads: int) -> tuple[list[FarTime], list[FarTime]]:
    """What operands cost that lie in no cache: (of products, of passes), by size."""
    of_products, of_passes = [], []
    for size in PASS_BYTES:
        rows = max(size // (WIDTH * 4), 1)
        ring = [(torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)) for _ in range(max(FAR_BYTES // (2 * size), 2))]
        weight = torch.randn(WIDTH, 64)
        calls: dict[str, Callable[[Tensor, Tensor], object]] = {
            "product": lambda x, _: x @ weight,
            "multiply": torch.mul,
            "copy": lambda x, y: y.copy_(x),
        }
        num_bytes = {"product": size, "multiply": 2 * size, "copy": 2 * size}
        extra = {}
        for name, call in calls.items():
            near = watch.seconds("far", lambda call=call: call(*ring[0]))  # type: ignore[misc]
            turns = itertools.cycle(ring)
            far = watch.seconds("far", lambda call=call, turns=turns: call(*next(turns)))  # type: ignore[misc]
            extra[name] = 1e9 * max(far - near, 0.0) / num_bytes[name]
        of_products.append(FarTime(size, extra["product"], threads))
        of_passes.append(FarTime(2 * size, (extra["multiply"] + extra["copy"]) / 2, threads))
    return of_products, of_passes


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Callable[[], Tensor], int]]:
    return lambda x: (lambda: function(x), x.nbytes + function(x).nbytes)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], tuple[Callable[[], Tensor], int]]:
    def make(x: Tensor) -> tuple[Callable[[], Tensor], int]:
        y = torch.ones_like(x)
        return lambda: function(x, y), 3 * x.nbytes

    return make


def _copied(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    y = torch.empty_like(x)
    return lambda: y.copy_(x), 2 * x.nbytes


def _cast(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    other = torch.float32 if x.dtype is torch.bfloat16 else torch.bfloat16
    return lambda: x.to(other), x.nbytes + x.numel() * other.itemsize


def _taken(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    index = torch.randperm(x.shape[0])
    return lambda: x.index_select(0, index), 2 * x.nbytes + index.nbytes


def _put(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    index, target = torch.randperm(x.shape[0]), torch.zeros_like(x)
    return lambda: target.index_add_(0, index, x), 3 * x.nbytes + index.nbytes


def _joined(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    return lambda: torch.cat([x, x], dim=1), 4 * x.nbytes


def _activated(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    dy = torch.ones_like(x)
    return lambda: torch.ops.aten.silu_backward(dy, x), 3 * x.nbytes


def _chosen(x: Tensor) -> tuple[Callable[[], object], int]:
    return lambda: x.topk(8, dim=-1), x.nbytes + x.shape[0] * 8 * (8 + x.element_size())


def _zeroed(x: Tensor) -> tuple[Callable[[], Tensor], int]:
    return x.zero_, x.nbytes


Make = Callable[[Tensor], tuple[Callable[[], object], int]]
# By torch's name: for rows of a tensor, the operation and the bytes that it reads and writes.
PASSES: dict[str, Make] = {
    "mul": _binary(torch.mul),
    "add": _binary(torch.add),
    "add_": _binary(lambda x, y: y.add_(x)),
    "copy_": _copied,
    "_to_copy": _cast,
    "clone": _unary(torch.clone),
    "cat": _joined,
    "zero_": _zeroed,
    "sum": _unary(lambda x: x.sum(-1)),
    "pow": _unary(lambda x: x.pow(2)),
    "silu": _unary(F.silu),
    "silu_backward": _activated,
    "sigmoid": _unary(torch.sigmoid),
    "exp": _unary(torch.exp),
    "_softmax": _unary(lambda x: x.softmax(-1)),
    "_log_softmax": _unary(lambda x: x.log_softmax(-1)),
    "index_select": _taken,
    "index_add_": _put,
    "topk": _chosen,
}
# Of float64, in which proofs run, the common ones.
PLAIN = ("mul", "add", "copy_", "sum", "silu", "index_select")


def measured_attention(watch: Stopwatch, threads: int) -> Iterator[AttentionRate]:
    """Causal attention, forward and backward."""
    for name, dtype in DTYPES.items():
        for width in WIDTHS:
            for length in LENGTHS:
                q, k, v = (torch.randn(1, NUM_HEADS, length, width, dtype=dtype, requires_grad=True) for _ in range(3))

                def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                out = forward()
                dy = torch.ones_like(out)

                def backward(out: Tensor = out, dy: Tensor = dy, inputs: tuple[Tensor, ...] = (q, k, v)) -> object:
                    return torch.autograd.grad(out, inputs, dy, retain_graph=True)

                flops = 2 * NUM_HEADS * length * length * width  # two products, half of the square
                there, back = watch.seconds("attention", forward), watch.seconds("attention", backward)
                yield AttentionRate(
                    name, width, width, length, flops / there / 1e12, 2.5 * flops / back / 1e12, threads
                )


def least_s(watch: Stopwatch) -> float:
    """Time of the smallest operation."""
    x = torch.ones(8, 8)
    return watch.seconds("overheads", lambda: x.mul(x))


def together() -> Found:
    """What ranks that work at once find: messages by size, and how much longer than alone each takes for the same."""
    watch = Stopwatch()
    group = dist.group.WORLD
    assert group is not None
    messages = [asdict(row) for row in measured_messages(group)]
    return Found([], [], [], [], [], [], messages, contention(group), 0.0, watch.spreads())
