"""A run's own layers at work on this machine for a moment: the rank that times them.

A model with few layers of each kind, in the run's own sizes, trains on drawn tokens, over as many ranks as the run has
and with experts over as many, all at once: so rows travel, threads and caches are shared and cores change hands as
they do in the run. The stages of a pipeline stand side by side, each with a model of its own. What comes of it are
seconds by piece of a layer, of its own work and of waits for other ranks; a plan composes the step out of them.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from launch.plan.events import Enter
from launch.plan.pieces import Pieces, Spent, job_of, one_step
from launch.plan.state import state_bytes
from train import compose, environment
from train.assemble import DTYPES
from train.checkpoint.config import CheckpointConfig
from train.config import PipelineConfig, RunConfig
from train.recipe.config import BatchRampConfig, LrSchedulerConfig
from train.settle import settled

# Layers of a kind: those in the middle have neighbours of their kind, and the pieces of all are alike.
MOST_LAYERS = 3
MICRO_BATCHES = 2
# Steps in which memory is found and kernels are made, and the most that are done behind them.
NUM_FIRST, MOST_STEPS = 1, 40
EMA = Enter("optimizer", "ema", "U")
# What of the memory that is free may be taken; and what a token keeps of a layer, in numbers of its own width: twice
# what the published account of a transformer's activations comes to (arXiv 2205.05198, equation 2, without recompute).
MEMORY_SHARE, KEPT_WIDTHS = 0.7, 68


@dataclass(frozen=True)
class OwnTimes:
    """Seconds of a run's own pieces, in the mean of its ranks.

    Attributes:
        work_s: of one layer and one micro-batch, by piece; of one step where a piece is of no layer. Where ranks take
            turns at cores these are a processor's seconds, and otherwise the clock's.
        waits_s: of these pieces, for other ranks. Those wait for their turns at cores too: where there are turns, as
            many times less than by the clock.
        once_s: by kind of layer, what the first micro-batch of a step takes longer than others: weights that are
            quantised.
        took_s: how long it was measured.
        turns: how many of the ranks' threads there were for each core, and at least 1.
        num_ranks: that were at work.
    """

    work_s: dict[Enter, float] = field(default_factory=dict)
    waits_s: dict[Enter, float] = field(default_factory=dict)
    once_s: dict[str, float] = field(default_factory=dict)
    took_s: float = 0.0
    turns: float = 1.0
    num_ranks: int = 1

    @property
    def of_step_s(self) -> float:
        """What a step takes that is of no layer and not of the optimizer."""
        work_s, waits_s = (
            sum(seconds for enter, seconds in found.items() if enter.layer == "step")
            for found in (self.work_s, self.waits_s)
        )
        return work_s * self.turns + waits_s

    def slowdown(self, busy_share: float) -> dict[str, float]:
        """Kind of work, or `calls` of the host -> how much longer than `work_s` it takes beside other ranks that work
        such a share of the time. Nothing where each thread has a core: what they do to each other was timed."""
        beside = max(1.0, self.turns * (1 + busy_share * (self.num_ranks - 1)) / self.num_ranks)
        return dict.fromkeys(("product", "attention", "move", "calls"), beside) if self.turns > 1 else {}


class Timed(NamedTuple):
    """Times of a run's own layers, or None and a sentence that says why there are none; that is empty where nobody
    asked for them."""

    times: OwnTimes | None = None
    reason: str = ""


def few_layers(config: RunConfig) -> RunConfig:
    """The run whose steps are timed: as many ranks and experts over as many, one stage, few layers of each kind."""
    model, mesh, train = config.model, config.parallel, config.train
    num_dense, num_moe = min(model.first_k_dense_replace, MOST_LAYERS), min(model.num_moe_layers, MOST_LAYERS)
    num_sequences = MICRO_BATCHES * train.micro_batch_size * mesh.world_size
    steps = replace(train, freeze=[], max_steps=MOST_STEPS + NUM_FIRST, max_tokens=None)
    return replace(
        config,
        model=replace(model, num_hidden_layers=num_dense + num_moe, first_k_dense_replace=num_dense),
        parallel=replace(mesh, pp=1, dp=mesh.world_size),
        pipeline=PipelineConfig(),
        train=replace(steps, global_batch_size=num_sequences, batch_ramp=BatchRampConfig()),
        lr_scheduler=LrSchedulerConfig(phases=[]),
        checkpoint=CheckpointConfig(),
        data=replace(config.data, document_mask=False),
        run=replace(config.run, device="cpu"),
    )


def program(arguments: Sequence[str]) -> None:
    """A rank: the run's config as YAML, how many seconds to measure, and the file for rank 0's findings."""
    given, budget_s, out = arguments
    config = compose.load(Path(given))
    place = environment.read()
    if config.run.num_threads is not None or place.num_threads is None:
        fair = environment.fair_threads(place.local_world_size or 1)
        torch.set_num_threads(config.run.num_threads or fair)
    dist.init_process_group("gloo")
    agreed: list[Any] = [None, None]
    if place.rank == 0:
        agreed = [few_layers(settled(config, "cpu")), too_large(few_layers(config))]
    dist.broadcast_object_list(agreed)
    few, reason = agreed
    found = {"reason": reason} if reason else as_plain(own_times(few, float(budget_s)))
    if place.rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def too_large(config: RunConfig) -> str:
    """Why there is no room to time this on this machine, of which all ranks take their part; empty where there is."""
    train, model = config.train, config.model
    activations = train.micro_batch_size * train.seq_len * (model.num_hidden_layers + 2) * KEPT_WIDTHS
    activations *= model.hidden_size * DTYPES[config.precision.name].itemsize
    needed = config.parallel.world_size * (state_bytes(config, 0).on_device + activations)
    free = MEMORY_SHARE * free_bytes()
    if needed <= free:
        return ""
    return (
        f"the run's layers were not timed: they need about {needed / 1e9:.1f} GB, and of the memory that is free "
        f"{free / 1e9:.1f} GB may be taken"
    )


def free_bytes() -> float:
    """Memory that programs can have now, as Linux says it; all that there is where it does not."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def own_times(config: RunConfig, budget_s: float) -> OwnTimes:
    """Over the ranks that have been started, which all call it: the pieces of a run that `few_layers` has made, timed
    for so long, and for two steps at least, of which the first is left out."""
    pieces, steps = Pieces(), list[tuple[Spent, list[Spent]]]()
    with job_of(config, pieces) as job:
        pieces.listen(job.watch)
        started_s = time.perf_counter()
        while len(steps) < MOST_STEPS + NUM_FIRST:
            one_step(job, pieces.enters)
            if job.ema is not None:
                pieces.enters(EMA)  # beside the next step in a run: here by itself, to be told apart
                job.ema.wait()
            steps.append(pieces.step())
            over = time.perf_counter() - started_s > budget_s and len(steps) > NUM_FIRST
            if job.any_rank(over):
                break
            pieces.step()
        took_s = time.perf_counter() - started_s
    num_ranks = dist.get_world_size()
    turns = max(1.0, num_ranks * torch.get_num_threads() / (os.cpu_count() or 1))
    own = _summed(config, steps[NUM_FIRST:], "processor_s" if turns > 1 else "work_s")
    everyone: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyone, own)
    found = _mean(everyone)
    waits_s = {enter: seconds / turns for enter, seconds in found.waits_s.items()}
    return replace(found, waits_s=waits_s, took_s=took_s, turns=turns, num_ranks=num_ranks)


def _summed(config: RunConfig, steps: Sequence[tuple[Spent, list[Spent]]], clock: str) -> OwnTimes:
    """What one rank spent: the middle micro-batches and the middle steps, by piece."""
    quantises = config.precision.name == "fp8"
    later = [each for _, spent in steps for each in (spent[1:] if quantises else spent)]
    number = _numbers(config)
    work_s, waits_s = (_each(_middle(later), name, number) for name in (clock, "waits_s"))
    of_step = _middle([spent for spent, _ in steps])
    once: defaultdict[str, float] = defaultdict(float)
    if quantises:
        first = _each(_middle([spent[0] for _, spent in steps]), clock, number)
        for enter, seconds in first.items():
            once[enter.layer] += seconds - work_s.get(enter, 0.0)
    return OwnTimes(
        work_s | _each(of_step, clock, {}),
        waits_s | _each(of_step, "waits_s", {}),
        {layer: max(seconds, 0.0) for layer, seconds in once.items()},
    )


def _numbers(config: RunConfig) -> dict[str, int]:
    """How many layers of a kind a micro-batch goes through, where it is not one."""
    return {"dense": config.model.first_k_dense_replace, "moe": config.model.num_moe_layers}


def _middle(spent: Sequence[Spent]) -> list[Spent]:
    """The middle half of them by their length: what a neighbour has disturbed is left out, and what is usual kept."""
    ordered = sorted(spent, key=lambda each: each.all_s)
    aside = len(ordered) // 4
    return ordered[aside : len(ordered) - aside]


def _each(spent: Sequence[Spent], name: str, number: Mapping[str, int]) -> dict[Enter, float]:
    """The mean over these, of one layer."""
    enters = {enter for each in spent for enter in getattr(each, name)}
    return {
        enter: statistics.mean(getattr(each, name)[enter] for each in spent) / max(number.get(enter.layer, 1), 1)
        for enter in enters
    }


def _mean(everyone: Sequence[OwnTimes]) -> OwnTimes:
    """The mean of what ranks spent."""

    def mean(name: str) -> dict[Any, float]:
        total: Counter[Any] = Counter()
        for each in everyone:
            total.update(getattr(each, name))
        return {key: seconds / len(everyone) for key, seconds in total.items()}

    return OwnTimes(mean("work_s"), mean("waits_s"), mean("once_s"))


def as_plain(times: OwnTimes) -> dict[str, Any]:
    """For a file."""

    def rows(found: Mapping[Enter, float]) -> list[list[Any]]:
        return [[enter.layer, enter.node, enter.kind, seconds] for enter, seconds in found.items()]

    return {
        "work_s": rows(times.work_s),
        "waits_s": rows(times.waits_s),
        "once_s": times.once_s,
        "took_s": times.took_s,
        "turns": times.turns,
        "num_ranks": times.num_ranks,
    }


def from_plain(found: Mapping[str, Any]) -> OwnTimes:
    """What `as_plain` made plain."""
    work_s, waits_s = ({Enter(*row[:3]): row[3] for row in found[name]} for name in ("work_s", "waits_s"))
    return OwnTimes(work_s, waits_s, found["once_s"], found["took_s"], found["turns"], found["num_ranks"])
