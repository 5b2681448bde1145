"""The step loop: it reads like the training section of the paper (DeepSeek-V3 report, section 4.2)."""

from __future__ import annotations

import json
import logging
import math
import operator
from dataclasses import dataclass, replace
from functools import reduce as fold
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from train.evaluate import evaluate
from train.job import Job
from train.model.transformer import NUM_SUMS, LossTerms
from train.recipe.balance import update_bias
from train.recipe.recipe import StepPlan
from train.resume import save
from train.track import metrics
from train.track.metrics import StepReport, StepTimer
from train.track.sinks import Tracker

log = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite: all ranks raise it in the same step, of which nothing is saved."""


@dataclass
class StopRequest:
    """Set by a signal on any rank; the ranks agree on it at the end of a step."""

    asked: bool = False


@dataclass
class Tally:
    """What one step adds up to: sums only, never means. On the device; the losses of this rank alone."""

    losses: Tensor  # `Report.sums`
    load: Tensor  # [num_routers, n_routed_experts]: tokens that chose each expert, after `reduce` over all ranks


@dataclass(frozen=True)
class StepStats:
    """What the host reads of a step, over all ranks."""

    losses: tuple[float, ...]  # `Report.sums`
    nodes_per_token: float
    internode_bytes: int
    peak_bytes: int
    max_vio: float | None  # None for a model without routers
    min_load: float | None
    loads: list[list[int]] | None  # where they are due
    waits_s: tuple[float, float, float] | None  # bubble, exposed communication, the optimizer's
    stopping: bool  # whether any rank was asked to stop


def run(job: Job, tracker: Tracker, peak_flops_per_s: float, stop: StopRequest) -> bool:
    """Train until the recipe is done or a stop was asked for; True when it is done. Saved either way.

    Raises NotFiniteError; the last good checkpoint then stays as it is.
    """
    config, recipe, timer = job.config, job.recipe, StepTimer()
    job.meet()
    while job.step < recipe.num_steps:
        plan = recipe.at(job.step)
        job.watch.during = f"step {job.step + 1}"
        job.watch.do("start of the pipeline")
        tally = accumulate(job, plan, timer)
        job.watch.do("optimizer")
        update = job.update(plan.lr)
        job.watch.do("after the optimizer")
        stats = reduce(job, tally, stop)
        if not (update.finite and all(map(math.isfinite, stats.losses))):
            stop_not_finite(job, plan, update.grad_norm)
        for model in job.models:
            update_bias(model, tally.load, plan.bias_update_rate)
        job.step += 1
        last = job.step == recipe.num_steps
        report = describe(job, plan, stats, update.grad_norm, timer.stop(), peak_flops_per_s)
        if job.step in config.profile.steps:
            job.write_timeline(len(list(job.micro_batches(plan))))
            timer.stop()
        if last or (config.evaluate.interval and job.step % config.evaluate.interval == 0):
            report = replace(report, valid_loss=finite_valid_loss(job))
            timer.stop()
        tracker.write(report)
        if stats.stopping or config.checkpoint.due(job.step, recipe.num_steps):
            tracker.checkpoint()
            save(job)
        if stats.stopping and not last:
            log.info("asked to stop: saved after step %d", job.step)
            break
    job.checkpoints.wait()
    if job.ema is not None:
        job.ema.wait()
    return job.step == recipe.num_steps


def accumulate(job: Job, plan: StepPlan, timer: StepTimer) -> Tally:
    """Forward and backward of this rank's micro-batches; gradients add up in `main_grad`."""
    job.optimizer.zero_grad()
    micro_batches = list(job.micro_batches(plan))
    job.recorder.open(events=job.step + 1 in job.config.profile.steps)

    def tokens(micro_batch: int) -> Tensor:
        with timer.waiting_for_data():
            return job.host.put(job.train_rows.rows(*micro_batches[micro_batch]))

    job.forward_backward(tokens, loss_terms(job, plan), len(micro_batches))
    tally = Tally(torch.zeros(NUM_SUMS, dtype=torch.float64, device=job.device), job.no_load())
    for stage in job.stages.values():
        for _, report in sorted(stage.reports.items()):
            tally.losses += report.sums
            tally.load += report.load
    return tally


def loss_terms(job: Job, plan: StepPlan) -> LossTerms:
    """What every unit of a loss weighs: known before the step, so gradients are plain sums (report, Eq. 17, 25)."""
    num_targets = max(1, job.num_targets(plan))
    depth = max(1, job.config.model.num_nextn_predict_layers)
    moe = job.config.moe
    return LossTerms(
        main=1 / num_targets,
        mtp=plan.mtp_loss_weight / (depth * num_targets),
        balance=moe.seq_aux_coeff / plan.num_sequences,
        device_balance=moe.device_aux_coeff / plan.num_sequences,
        comm_balance=moe.comm_aux_coeff / plan.num_sequences,
    )


def reduce(job: Job, tally: Tally, stop: StopRequest) -> StepStats:
    """Sum the tally over all ranks, in rank order, its load in place; read the outcome in one go."""
    visits, num_tokens = job.dispatch.take_node_visits()
    mine = [0.0, num_tokens, job.dispatch.take_internode_bytes(), metrics.peak_memory_bytes(job.device), stop.asked]
    numbers = job.host.put(torch.tensor([*mine, *job.times()], dtype=torch.float64))
    numbers[0] += visits
    everyone = job.gather(torch.cat([tally.losses, numbers]))
    tally.load = job.sum_counts(tally.load)
    job.meet()
    spread = [metrics.max_vio(tally.load), metrics.min_load(tally.load)] if tally.load.numel() else []
    if spread and job.config.track.loads_due(job.step + 1, job.recipe.num_steps):
        spread.append(tally.load.double())
    rows, *balance = job.host.read("step", everyone, *spread)
    columns = list(zip(*rows, strict=True))[: NUM_SUMS + len(mine)]
    *losses, nodes, tokens, internode_bytes, _, asked = (fold(operator.add, each) for each in columns)
    return StepStats(
        losses=tuple(losses),
        nodes_per_token=nodes / max(tokens, 1),
        internode_bytes=int(internode_bytes),
        peak_bytes=int(max(columns[NUM_SUMS + 3])),
        max_vio=balance[0] if spread else None,
        min_load=balance[1] if spread else None,
        loads=[[int(count) for count in row] for row in balance[2]] if len(spread) > 2 else None,
        waits_s=job.mean_times([row[len(columns) :] for row in rows]),
        stopping=asked > 0,
    )


def describe(
    job: Job,
    plan: StepPlan,
    stats: StepStats,
    grad_norm: float,
    times_s: tuple[float, float],
    peak_flops_per_s: float,
) -> StepReport:
    """What this step reports, but for the validation loss."""
    model = job.config.model
    num_tokens, num_targets = plan.num_sequences * job.config.train.seq_len, max(1, job.num_targets(plan))
    main, mtp, *balance = stats.losses
    step_s, data_wait_s = times_s
    report = StepReport(
        step=plan.step + 1,
        loss=main / num_targets,
        grad_norm=grad_norm,
        lr=plan.lr,
        consumed_tokens=plan.consumed_tokens,
        tokens_per_s=num_tokens / step_s,
        step_s=step_s,
        data_wait_s=data_wait_s,
        peak_bytes=stats.peak_bytes,
        mfu=metrics.mfu(job.flops_per_token, num_tokens / step_s, peak_flops_per_s),
    )
    if stats.waits_s is not None:
        bubble_s, exposed_comm_s, zero_comm_s = stats.waits_s
        report = replace(report, bubble_s=bubble_s, exposed_comm_s=exposed_comm_s, zero_comm_s=zero_comm_s)
    if model.num_nextn_predict_layers:
        report = replace(report, mtp_loss=mtp / (model.num_nextn_predict_layers * num_targets))
    if model.num_routers:
        expert, device, comm = (each / plan.num_sequences for each in balance)
        moe = job.config.moe
        report = replace(
            report,
            seq_balance_loss=expert,
            device_balance_loss=device if moe.device_aux_coeff else None,
            comm_balance_loss=comm if moe.comm_aux_coeff else None,
            max_vio=stats.max_vio,
            min_load=stats.min_load,
            nodes_per_token=stats.nodes_per_token,
            internode_bytes=stats.internode_bytes,
            loads=stats.loads,
        )
    return report


def finite_valid_loss(job: Job) -> float:
    """Loss on the validation split. NotFiniteError, on all ranks, when the step's update has spoilt the weights."""
    job.watch.during = f"evaluation after step {job.step}"
    job.watch.do("start of the pipeline")
    loss = evaluate(job)
    if not math.isfinite(loss):
        path = record_not_finite(job, {"step": job.step, "valid/loss": repr(loss), "sequences": []})
        raise NotFiniteError(
            f"step {job.step}: the validation loss is {loss} after a finite training loss, so the update was too "
            f"large: stopped, and the step is not saved; {path} records it, and the last checkpoint is as it was"
        )
    return loss


def stop_not_finite(job: Job, plan: StepPlan, grad_norm: float) -> NoReturn:
    """Write which sequences made the step's loss or gradient not finite, then raise NotFiniteError on all ranks."""
    found = job.gather_objects(sequences_with_bad_losses(job, plan))
    if not any(found):
        # The losses were finite: the weights have not changed, so each micro-batch can be asked for its gradient.
        found = job.gather_objects(sequences_with_bad_gradients(job, plan))
    # Every stage that saw it reports a sequence; the first is named.
    first_rank = {position: rank for rank, bad in reversed(list(enumerate(found))) for position in bad}
    sequences = [describe_sequence(job, rank, position) for position, rank in sorted(first_rank.items())]
    path = record_not_finite(job, {"step": plan.step + 1, "grad_norm": repr(grad_norm), "sequences": sequences})
    raise NotFiniteError(
        f"step {plan.step + 1}: loss or gradient is not finite (gradient norm {grad_norm}, {len(sequences)} "
        f"sequences): stopped, and the step is not saved; {path} lists them, and the last checkpoint is as it was"
    )


def record_not_finite(job: Job, what: dict[str, object]) -> Path:
    """Rank 0 writes what is known into the run's folder; where. The last good checkpoint may still be on its way."""
    job.checkpoints.wait()
    path = job.folder / "not_finite.json"
    if job.is_main:
        path.write_text(json.dumps(what, indent=1) + "\n")
    return path


def describe_sequence(job: Job, rank: int, position: int) -> dict[str, object]:
    """Where a sequence was trained on and which text it is cut from."""
    documents = [document._asdict() for document in job.train_rows.documents(position)]
    return {"rank": rank, "sequence": position, "documents": documents}


def sequences_with_bad_losses(job: Job, plan: StepPlan) -> list[int]:
    """Those of this rank's sequences whose micro-batch reported a loss that is not finite."""
    micro_batches = list(job.micro_batches(plan))
    reports = [each for stage in job.stages.values() for each in sorted(stage.reports.items())]
    (finite,) = job.host.read("losses", torch.stack([report.sums for _, report in reports]).isfinite().all(1))
    bad = {number for (number, _), good in zip(reports, finite, strict=True) if not good}
    return [first + i for first, count in (micro_batches[number] for number in sorted(bad)) for i in range(count)]


def sequences_with_bad_gradients(job: Job, plan: StepPlan) -> list[int]:
    """Those of this rank's sequences whose micro-batch, alone, makes a gradient that is not finite.

    A dense gradient on any of its stages accuses a micro-batch. An expert's also comes from other ranks' tokens: where
    nothing else is to blame, it accuses all that were trained on at that moment.
    """
    bad: list[int] = []
    for first, count in job.micro_batches(plan):
        job.optimizer.zero_grad()
        job.forward_backward_alone(job.host.put(job.train_rows.rows(first, count)), loss_terms(job, plan))
        everyone = job.gather_objects(bad_gradients(job))
        own_stages = everyone[job.groups.mesh.dp_rank :: job.groups.mesh.config.dp]
        dense_anywhere = any("dense" in kinds for kinds in everyone)
        if any("dense" in kinds for kinds in own_stages) or (not dense_anywhere and any(everyone)):
            bad += range(first, first + count)
    return bad


def bad_gradients(job: Job) -> set[str]:
    """Which of the kinds "dense" and "expert" have a gradient on this rank that is not finite."""
    return {
        "expert" if model.is_expert(name) else "dense"
        for model in job.models
        for name, param in model.named_parameters()
        if not bool(param.main_grad.isfinite().all())  # type: ignore[attr-defined]
    }
