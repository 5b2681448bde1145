"""What a step adds up to: over its micro-batches on every rank, then over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from train.job import Job
from train.recipe.recipe import StepPlan
from train.track import gauges

LOADS = "loads"  # read beside the metrics; no number


@dataclass
class Tally:
    """Sums and maxima of one step, never means; on the device, the metrics of this rank alone."""

    metrics: dict[str, Tensor]
    load: Tensor
    """[num_routers, n_routed_experts]: tokens that chose each expert, over all ranks once it has been reduced."""


@dataclass(frozen=True)
class Totals:
    """What the host reads of a step, over all ranks: metrics by name, and the loads where they are due."""

    values: dict[str, float]
    loads: list[list[int]] | None


def tally_of(job: Job) -> Tally:
    """The findings of this rank's micro-batches together, in the order of stages and micro-batches."""
    tally = Tally({}, job.no_load())
    for stage in job.stages.values():
        for _, findings in sorted(stage.findings.items()):
            job.metrics.add(tally.metrics, findings.metrics)
            tally.load += findings.load
    return tally


def reduce(job: Job, plan: StepPlan, tally: Tally, asked_to_stop: bool) -> Totals:
    """Everything that ranks have measured in a step, over all of them; `tally.load` in place.

    The host waits for the device once.
    """
    measured = {**tally.metrics, **job.measured(), "run/asked_to_stop": asked_to_stop}
    everyone = job.gather(job.metrics.pack(measured, job.host.put))
    tally.load = job.sum_counts(tally.load)
    job.meet()
    on_device = gauges.of_loads(tally.load)
    if on_device and job.config.track.loads_due(job.step + 1, job.recipe.num_steps):
        on_device[LOADS] = tally.load.double()  # numbers of one read have one type
    rows, *read = job.host.read("step", everyone, *on_device.values())
    values = job.metrics.unpack(rows, counts(job, plan)) | job.bubble(rows) | dict(zip(on_device, read, strict=True))
    loads = values.pop(LOADS, None)
    return Totals(values, None if loads is None else [[int(count) for count in row] for row in loads])


def counts(job: Job, plan: StepPlan) -> dict[str, int]:
    """What sums of a step are divided by, known before it."""
    num_targets = job.num_targets(plan)
    num_depths = job.config.model.num_nextn_predict_layers
    return {
        "targets": num_targets,
        "targets of all depths": num_depths * num_targets,
        "sequences": plan.num_sequences,
    }


def describe(
    job: Job, plan: StepPlan, grad_norm: float, times_s: dict[str, float], peak_flops_per_s: float
) -> dict[str, float]:
    """The metrics of the step just finished that the ranks need not put together. times_s: of rank 0's clock."""
    tokens_per_s = plan.num_sequences * job.config.train.seq_len / times_s["perf/step_s"]
    return {
        **times_s,
        "step": job.step,
        "train/grad_norm": grad_norm,
        "train/lr": plan.lr,
        "train/consumed_tokens": plan.consumed_tokens,
        "perf/tokens_per_s": tokens_per_s,
        "perf/mfu": gauges.mfu(job.flops_per_token, tokens_per_s, peak_flops_per_s),
    }
