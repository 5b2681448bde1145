"""Every metric that a run can report, declared once: its name, its unit, and how it becomes one number of many.

A metric is measured under its name: by the model as a scalar on the device, elsewhere as a number of the host. What
micro-batches and ranks measured is put together by its declaration (`train.track.vector`). A metric that nobody has
measured in a step is not in that step's report. To add one: declare it here, and measure it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """How the numbers of several places become one.

    micro_batches: of two micro-batches of one rank, scalars on its device. ranks: of those ranks that have measured
    it, in rank order; None keeps every rank's number apart.
    """

    micro_batches: Callable[[Tensor, Tensor], Tensor]
    ranks: Callable[[Sequence[float]], float] | None


def _sum(column: Sequence[float]) -> float:
    """One addition after the other: Python's own `sum` rounds otherwise from version 3.12 on."""
    return reduce(operator.add, column)


def _largest(column: Sequence[float]) -> float:
    """NaN if any is."""
    return max(column, key=lambda number: (number != number, number))


SUM = Reduction(operator.add, _sum)
MEAN = Reduction(operator.add, lambda column: _sum(column) / len(column))  # over ranks, of their micro-batches' sums
MAX = Reduction(torch.maximum, _largest)
EACH = Reduction(operator.add, None)
SOURCE = "<source>"  # in a name: there is one such metric for every source that validates
OWN = None  # the same on every rank, or rank 0's: it does not travel


@dataclass(frozen=True)
class Metric:
    """One number of a step.

    Attributes:
        name: as reported, in `metrics.jsonl`, wandb and every picture.
        unit: for axes and documents.
        over: how micro-batches and ranks are put together.
        per: what the result is divided by: another metric, or a count that is known where it is unpacked.
        is_whole: whether it is reported as an integer.
        is_loss: whether a step in which it is NaN or infinite is given up.
        is_reported: False for what is only needed to make another one.
    """

    name: str
    unit: str
    over: Reduction | None = OWN
    per: str | None = None
    is_whole: bool = False
    is_loss: bool = False
    is_reported: bool = True

    @property
    def is_per_source(self) -> bool:
        return SOURCE in self.name

    def of(self, source: str) -> Metric:
        """The metric of one source."""
        return replace(self, name=self.name.replace(SOURCE, source), per=self.per and self.per.replace(SOURCE, source))

    def source_of(self, name: str) -> str | None:
        """The source whose metric this name is; None for a name that is none."""
        before, _, after = self.name.partition(SOURCE)
        source = name.removeprefix(before).removesuffix(after)
        return source if self.is_per_source and source and name == f"{before}{source}{after}" else None


#: In the order of a report. Definitions: docs/symbols.md. The balance losses are unweighted by their alphas.
METRICS = (
    Metric("step", "steps finished", is_whole=True),
    Metric("train/loss", "nats per token", SUM, per="targets", is_loss=True),
    Metric("train/grad_norm", "before clipping"),
    Metric("train/lr", "per step"),
    Metric("train/consumed_tokens", "tokens", is_whole=True),
    Metric("perf/tokens_per_s", "tokens per second, all ranks"),
    Metric("perf/step_s", "seconds"),
    Metric("perf/data_wait_s", "seconds"),
    Metric("memory/peak_bytes", "bytes, the fullest rank", MAX, is_whole=True),
    Metric("train/mtp_loss", "nats per token, mean over depths", SUM, per="targets of all depths", is_loss=True),
    Metric("train/seq_balance_loss", "sum over MoE layers, 1 each: even", SUM, per="sequences", is_loss=True),
    Metric("train/device_balance_loss", "as before, of devices", SUM, per="sequences", is_loss=True),
    Metric("train/comm_balance_loss", "as before, of communication", SUM, per="sequences", is_loss=True),
    Metric("valid/loss", "nats per token", SUM, per="targets"),
    Metric("valid/<source>/loss", "nats per token", SUM, per="targets of <source>"),
    Metric("perf/bubble_s", "seconds, mean over ranks"),
    Metric("perf/exposed_comm_s", "seconds, mean over ranks", MEAN),
    Metric("perf/zero_comm_s", "seconds, mean over ranks", MEAN),
    Metric("perf/mfu", "share of the peak"),
    Metric("moe/max_vio", "largest load / mean - 1, worst router"),
    Metric("moe/min_load", "smallest load / mean, worst router"),
    Metric("moe/nodes_per_token", "nodes", SUM, per="moe/routed_tokens"),
    Metric("moe/internode_bytes", "bytes, all ranks", SUM, is_whole=True),
    Metric("plan/step_s", "seconds, planned before the run"),
    Metric("plan/peak_bytes", "bytes, the fullest rank, planned before the run", is_whole=True),
    # What others are made of.
    Metric("moe/routed_tokens", "tokens through MoE layers", SUM, is_reported=False),
    Metric("pipeline/start_s", "seconds", EACH, is_reported=False),
    Metric("pipeline/stop_s", "seconds", EACH, is_reported=False),
    Metric("pipeline/busy_s", "seconds", EACH, is_reported=False),
    Metric("run/asked_to_stop", "1: asked", MAX, is_reported=False),
)

#: Reported name -> unit, for documents and axes.
UNITS: dict[str, str] = {metric.name: metric.unit for metric in METRICS if metric.is_reported}


def of_run(metrics: Sequence[Metric], sources: Sequence[str]) -> list[Metric]:
    """Those of a run with these sources that validate: what there is per source, once for each."""
    return [one for each in metrics for one in ([each.of(name) for name in sources] if each.is_per_source else [each])]


def source_of(name: str) -> str | None:
    """The source whose metric this name is; None for a metric that is of no source."""
    if name in UNITS:
        return None
    return next((source for each in METRICS if (source := each.source_of(name)) is not None), None)


@dataclass(frozen=True)
class Sample:
    """How the model went on with a prompt of `evaluate.prompts`."""

    prompt: str
    text: str


@dataclass(frozen=True)
class StepReport:
    """The numbers of one finished step by name, "step" first; those that were not measured are absent.

    `step` counts finished steps, so the first report has step 1 and a checkpoint of step N holds reports 1..N. A run
    that is evaluated before its first step has a report of step 0, with little else in it.
    loads: [num_routers][experts], tokens of the batch that chose each expert, in the steps that write them.
    samples: of the prompts, in the evaluations that go on with them.
    """

    values: Mapping[str, float]
    loads: list[list[int]] | None = None
    samples: list[Sample] = field(default_factory=list)

    @property
    def step(self) -> int:
        return int(self.values["step"])

    @property
    def consumed_tokens(self) -> int:
        return int(self.values["train/consumed_tokens"])
