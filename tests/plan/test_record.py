"""What is written down of a pass: work and bytes of operations, memory, names."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from launch.plan.events import Answer, Calls, Enter, Event, Kernel, Launch, Memory, Read, Turn, Wait
from launch.plan.record import Entry, Recorder, events_of
from launch.plan.world import world
from tests.plan.jobs import RECOMPUTE, WAYS, job
from train.config import RunConfig
from train.job import Job
from train.model.loss import LossTerms


def micro_batch(made: Job, recorder: Recorder, number: int) -> list[Entry]:
    """All three passes of a micro-batch through a job of one stage."""
    (stage,) = made.stages.values()
    start = recorder.num_entries
    with recorder.on():
        recorder.drive(stage.forward(number, None))
        recorder.drive(stage.backward(number, None))
        stage.weight_gradients(number)
        stage.findings.clear()
    return recorder.entries(start)


def traced(config: RunConfig, kernels: str = "cuda", num_micro_batches: int = 1) -> tuple[list[list[Entry]], int]:
    """Entries of each micro-batch on rank 0, and what the dispatch itself has counted between nodes."""
    recorder = Recorder()
    with world(config, 0, kernels, recorder=recorder) as made:
        (stage,) = made.stages.values()
        rows = config.train.micro_batch_size
        stage.begin(lambda _: made.train_rows.rows(0, rows), LossTerms(1.0, 1.0, 1.0))
        found = [micro_batch(made, recorder, number) for number in range(num_micro_batches)]
        return found, made.dispatch.internode_bytes


def kernel(do: Any) -> Kernel:
    """The only operation that `do` asks for."""
    recorder = Recorder()
    with FakeTensorMode():
        operands = torch.empty(8, 16), torch.empty(16, 4), torch.zeros(3, dtype=torch.int64)
        with recorder.on():
            do(*operands)
    (found,) = [entry.event for entry in recorder.entries() if isinstance(entry.event, Kernel)]
    return found


BYTES = {
    "a product": (lambda x, w, i: x @ w, 512 + 256, 128),
    "a sum": (lambda x, w, i: x.sum(), 512, 4),
    "one row for all": (lambda x, w, i: x + w[:, 0], 512 + 64, 512),
    "spread by a stride of zero": (lambda x, w, i: x * x[:, :1].expand(8, 16), 512 + 32, 512),
    "in place": (lambda x, w, i: x.mul_(2.0), 512, 512),
    "overwritten": (lambda x, w, i: x.zero_(), 0, 512),
    "copied": (lambda x, w, i: x.copy_(x[:1]), 64, 512),
    "into another": (lambda x, w, i: torch.mul(x, 2.0, out=torch.empty(8, 16)), 512, 512),
    "rows taken": (lambda x, w, i: x.index_select(0, i), 24 + 192, 192),
    "rows looked up": (lambda x, w, i: F.embedding(i, x), 24 + 192, 192),
    "rows put": (lambda x, w, i: x.index_copy_(0, i, x[:3]), 24 + 192, 192),
    "rows added": (lambda x, w, i: x.index_add_(0, i, x[:3]), 24 + 192 + 192, 192),
    "sums of rows": (lambda x, w, i: F.embedding_bag(i, x, i, mode="sum"), 24 + 24 + 192, 192),
    "widened": (lambda x, w, i: x.double(), 512, 1024),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str) -> None:
    do, read, written = BYTES[name]
    found = kernel(do)
    assert found.read_bytes == read
    # Beside its sums, embedding_bag gives out places that only its own backward reads.
    assert found.written_bytes == written or (name == "sums of rows" and found.written_bytes >= 192)


def test_views_and_empty_memory_are_no_work() -> None:
    recorder = Recorder()
    with FakeTensorMode():
        x = torch.empty(8, 16)
        with recorder.on():
            x.view(16, 8).t()[:, 1:].unsqueeze(0).expand(5, 8, 15)
            torch.empty_like(x)
    calls, *memory = [entry.event for entry in recorder.entries()]
    assert calls == Calls(6), "the host has called them all the same"
    assert [type(event) for event in memory] == [Memory, Memory]


PRODUCTS = {
    "mm": lambda x, w: x @ w,
    "addmm": lambda x, w: torch.addmm(torch.ones(4), x, w),
    "bmm": lambda x, w: torch.bmm(x.expand(3, 8, 16), w.expand(3, 16, 4)),
    "attention": lambda x, w: F.scaled_dot_product_attention(*(x.expand(2, 5, 8, 16).contiguous() for _ in range(3))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    do = PRODUCTS[name]
    counter, recorder = FlopCounterMode(display=False), Recorder()
    with counter:
        do(torch.ones(8, 16), torch.ones(16, 4))
    with FakeTensorMode(), recorder.on():
        do(torch.ones(8, 16), torch.ones(16, 4))
    found = [entry.event for entry in recorder.entries() if isinstance(entry.event, Kernel) and entry.event.flops]
    expected = counter.get_total_flops() or 2 * 2 * 5 * 8 * 8 * (16 + 16)  # torch has none for attention on a CPU
    assert sum(each.flops for each in found) == expected


def test_causal_attention_counts_half_and_its_gradient_two_and_a_half_times_that() -> None:
    def attend(causal: bool) -> list[Kernel]:
        recorder = Recorder()
        with FakeTensorMode(), recorder.on():
            q, k, v = (torch.ones(2, 3, 8, 16, requires_grad=True) for _ in range(3))
            F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
        events = [entry.event for entry in recorder.entries()]
        return [event for event in events if isinstance(event, Kernel) and event.work == "attention"]

    forward, backward = attend(True)
    whole, _ = attend(False)
    assert (forward.sizes, forward.backward, backward.backward) == ((2, 3, 8, 8, 16, 16), False, True)
    assert whole.flops == 2 * forward.flops == 2 * 2 * 2 * 3 * 8 * 8 * 16
    assert backward.flops == 5 * forward.flops // 2


def test_grouped_products_have_the_rows_of_all_groups() -> None:
    recorder = Recorder()
    with FakeTensorMode(), recorder.on():
        rows, weights = torch.empty(48, 32, dtype=torch.bfloat16), torch.empty(3, 32, 16, dtype=torch.bfloat16)
        torch._grouped_mm(rows, weights, offs=torch.empty(3, dtype=torch.int32))
    (found,) = [entry.event for entry in recorder.entries() if isinstance(entry.event, Kernel)]
    assert found.sizes == (3, 48, 16, 32) and found.flops == 2 * 48 * 16 * 32
    assert found.read_bytes == 2 * 48 * 32 + 2 * 3 * 32 * 16 + 12 and found.written_bytes == 2 * 48 * 16


def test_memory_is_seen_from_birth_to_death_in_order() -> None:
    recorder = Recorder()
    with FakeTensorMode():
        outside = torch.empty(1000)
        with recorder.on():
            x = torch.empty(1000)
            view = x[:10]
            del x
            y = outside + 1
            outside.add_(1)
            del view, y
    sizes = [entry.event.num_bytes for entry in recorder.entries() if isinstance(entry.event, Memory)]
    assert sizes == [4096, 4096, -4096, -4096]


def check_names(events: list[Entry]) -> None:
    for piece, event, _ in events:
        assert piece.name.layer and piece.name.node and piece.kind in "FBW", event


def payload(events: list[Entry], group: str) -> int:
    return sum(
        entry.event.sent_bytes for entry in events if isinstance(entry.event, Launch) and entry.event.group == group
    )


CASES = [
    ("two_hop", "bf16", "norms and heads", "cuda"),
    ("flat", "fp32", "nodes", "cpu"),
    *[pytest.param(way, "bf16", "nothing", "cuda", marks=pytest.mark.slow) for way in WAYS],
    pytest.param("two_hop", "fp8", "norms and heads", "cuda", marks=pytest.mark.slow),
    pytest.param("local", "fp64", "norms and heads", "cpu", marks=pytest.mark.slow),
    pytest.param("two_hop", "bf16", "nodes", "cpu", marks=pytest.mark.slow),
    pytest.param("flat", "fp8", "nothing", "cpu", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("way", "precision", "recompute", "kernels"), CASES)
def test_a_micro_batch(way: str, precision: str, recompute: str, kernels: str) -> None:
    """Names, memory, waits, turns, and the bytes that the dispatch itself counts between nodes; twice the same."""
    config = job(*WAYS[way], f"precision={precision}", *RECOMPUTE[recompute])
    (_, second, third), counted = traced(config, kernels, 3)
    assert [entry[1] for entry in second] == [entry[1] for entry in third]
    check_names(second)
    sizes = [entry.event.num_bytes for entry in second if isinstance(entry.event, Memory)]
    # What routers count stays until the step is over, and takes the place of what the micro-batch before left.
    assert sum(sizes) == 0 and max(sizes) > 0
    launched = [entry.event.number for entry in second if isinstance(entry.event, Launch)]
    waited = {entry.event.number for entry in second if isinstance(entry.event, Wait)}
    read = {entry.event.after for entry in second if isinstance(entry.event, Read)}
    assert len(set(launched)) == len(launched) and set(launched) <= waited | read
    asked = [entry.event.number for entry in second if isinstance(entry.event, Read)]
    assert sorted(asked) == sorted(entry.event.number for entry in second if isinstance(entry.event, Answer))
    slots = {entry.event.slot for entry in second if isinstance(entry.event, Turn)}
    hops = {"local": [], "flat": ["last hop"], "two_hop": ["first hop", "last hop"]}[way]
    legs = [f"{trip} {leg}" for trip in ("dispatch", "combine") for leg in ("departure", *hops)]
    assert slots == {"dispatch counts", *legs}
    if way == "two_hop":
        # Counts of rows, which the dispatch does not count, go over the rail right before those over the node, which
        # the host reads.
        rail = [e.event for e in second if isinstance(e.event, Launch) and e.event.group == "rail"]
        rows = [each for each in rail if each.number + 1 not in read]
        assert sum(each.sent_bytes for each in rows) * 3 == counted and len(rows) < len(rail)


def test_every_layer_and_node_has_its_name() -> None:
    (entries,), _ = traced(job(*WAYS["two_hop"]))
    events: tuple[Event, ...] = events_of(entries)
    entered = {(each.layer, each.node, each.kind) for each in events if isinstance(each, Enter)}
    moe = {("attention", "FBW"), ("dispatch", "FB"), ("experts", "FBW"), ("combine", "FB"), ("aggregate", "FB")}
    expected = {("moe", node, kind) for node, kinds in moe for kind in kinds}
    expected |= {("mtp", node, kind) for node, kinds in moe for kind in kinds}
    expected |= {("dense", "dense", kind) for kind in "FBW"} | {("embedding", "embedding", kind) for kind in "FBW"}
    expected |= {("mtp", "join", "F"), ("mtp", "join", "B"), ("mtp", "join", "W"), ("head", "norm", "F")}
    expected |= {(layer, "loss", kind) for layer in ("head", "mtp") for kind in "FB"}
    assert expected <= entered


def test_a_backward_runs_on_the_thread_that_asks_for_it() -> None:
    """Or its events would not stand in order."""
    seen: list[int] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            seen.append(threading.get_ident())
            return dy * 2

    recorder = Recorder()
    with FakeTensorMode(), recorder.on():
        Noting.apply(torch.ones(3, requires_grad=True)).sum().backward()
    assert seen == [threading.get_ident()]
    assert sum(isinstance(entry.event, Kernel) and entry.event.name == "mul" for entry in recorder.entries()) == 2
