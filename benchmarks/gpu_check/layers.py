"""A slice of DeepSeek-V3 on the device, one rank's share of two MoE layers: each node as it went beside its plan.

Every token goes to all eight experts here, so that they multiply as many rows as a rank's experts get in the published
job: 32,768 of 4,096 tokens. Nothing is sent.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu_check.small_job import config_of, job_of, step
from benchmarks.gpu_check.table import Row
from launch.plan import cluster as clusters
from launch.plan.events import Enter, Event, Kernel
from launch.plan.kernels import Rates
from launch.plan.layers import layers_of
from launch.plan.names import Piece
from parallel.pipeline.segments import Name
from train.config import RunConfig

NUM_STEPS, NUM_FIRST = 3, 2
SHARE = (
    *("model.num_hidden_layers=2", "model.first_k_dense_replace=0", "model.num_nextn_predict_layers=0"),
    *("model.n_routed_experts=8", "model.num_experts_per_tok=8", "model.n_group=1", "model.topk_group=1"),
    *("model.vocab_size=4096", "train.micro_batch_size=1", "train.global_batch_size=2", "train.max_tokens=null"),
    *(f"train.max_steps={NUM_FIRST + NUM_STEPS}", "lr_scheduler.warmup_steps=1"),
)
SIZES = {"full": ("model=v3_671b", "train.seq_len=4096"), "small": ("model=tiny", "train.seq_len=64")}


class Stopwatch:
    """Marks where pieces begin, on the device's own clock where there is one."""

    def __init__(self, device: str) -> None:
        self._marks: list[tuple[Enter, Any]] = []
        self.piece = Piece(Name("step", 0, "begin"), "U", 0, 0)
        self.num_turns = 0
        self._mark: Callable[[], Any] = time.perf_counter if device == "cpu" else self._event

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begins(self, name: Name, kind: str, turn: int | None = None) -> None:
        """What was going on is over."""
        self.piece = Piece(name, kind, 0, 0)
        self._marks.append((Enter(name.layer, name.node or name.layer, kind), self._mark()))

    def step_ms(self) -> dict[Enter, float]:
        """Milliseconds of each piece since the last call. Waits for the device."""
        self.begins(Name("step", 0, "rest"), "U")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found: defaultdict[Enter, float] = defaultdict(float)
        for (enter, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[enter] += 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
        self._marks = []
        return dict(found)


def config_of_slice(size: str, precision: str, device: str) -> RunConfig:
    """The run whose layers are timed."""
    return config_of([*SIZES[size], *SHARE, f"precision={precision}"], device)


def measured_ms(config: RunConfig, device: str) -> dict[Enter, float]:
    """Of each piece of an MoE layer, for one layer and one micro-batch: the median over steps."""
    watch, steps = Stopwatch(device), []
    with job_of(config, device, watch) as job:
        for _ in range(NUM_FIRST + NUM_STEPS):
            step(job)
            steps.append(watch.step_ms())
    times = config.model.num_hidden_layers * config.train.global_batch_size // config.train.micro_batch_size
    pieces = [enter for enter in steps[-1] if enter.layer == "moe"]
    return {each: statistics.median(found.get(each, 0.0) for found in steps[NUM_FIRST:]) / times for each in pieces}


def planned_ms(config: RunConfig, cluster: str) -> dict[Enter, float]:
    """The same by the plan of a run on GPUs, as written."""
    rates, passes = Rates(clusters.load(cluster)), layers_of(config).passes["moe"]
    found: defaultdict[Enter, float] = defaultdict(float)
    events: Sequence[Event]
    for events in (passes.forward, passes.backward, *passes.weights):
        enter = Enter("moe", "moe", "")
        for event in events:
            if isinstance(event, Enter):
                enter = event
            elif isinstance(event, Kernel):
                found[enter] += 1e3 * rates.seconds(event)
    return dict(found)


def rows(size: str, precision: str, device: str, cluster: str) -> Iterator[Row]:
    """Each node of a layer, each pass, and both together."""
    config = config_of_slice(size, precision, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    went, planned = measured_ms(config, device), planned_ms(config, cluster)
    where = f"planned for {cluster}"
    for each in sorted({*went, *planned}, key=lambda each: ("FBW".find(each.kind), each.node)):
        yield Row(f"MoE {each.node} {each.kind} in {precision}", went.get(each), "ms", planned.get(each), where)
    for kind in "FBW":
        both = [sum(ms for each, ms in found.items() if each.kind == kind) for found in (went, planned)]
        yield Row(f"MoE layer {kind} in {precision}", both[0], "ms", both[1], where, note="the sum of its nodes")
    if device == "cuda":
        yield Row(f"memory at its fullest in {precision}", torch.cuda.max_memory_allocated() / 1e9, "GB")
