"""The step loop: it reads like the training section of the paper (DeepSeek-V3 report, section 4.2)."""

from __future__ import annotations

import logging
from contextlib import closing

from torch import Tensor

from train.evaluate import evaluate, evaluation_due
from train.job import Job
from train.model.loss import LossTerms
from train.not_finite import check_validation, stop_not_finite
from train.recipe.balance import update_bias
from train.recipe.recipe import StepPlan
from train.resume import save
from train.samples import samples
from train.stopping import StopRequest
from train.tally import Tally, describe, reduce, tally_of
from train.track.gauges import StepTimer
from train.track.metrics import Sample
from train.track.sinks import Tracker
from train.warm_up import warm_up

log = logging.getLogger(__name__)


def run(job: Job, tracker: Tracker, peak_flops_per_s: float, stop: StopRequest) -> bool:
    """Train until the run is done or a stop was asked for; True when it is done. What was trained is saved.

    Raises NotFiniteError; the last good checkpoint then stays as it is.
    """
    with closing(job.reader):
        return _run(job, tracker, peak_flops_per_s, stop)


def _run(job: Job, tracker: Tracker, peak_flops_per_s: float, stop: StopRequest) -> bool:
    config, recipe = job.config, job.recipe
    found: list[Sample] = []
    if job.step == 0 and evaluation_due(job):
        measured, found = look(job)
        tracker.write(job.metrics.report({"step": 0, "train/consumed_tokens": 0, **measured}, samples=found))
    if job.host.runs_ahead and not job.is_done:
        plan = recipe.at(job.step)
        warm_up(job, plan, loss_terms(job, plan))
    timer = StepTimer()
    job.meet()
    if job.any_rank(stop.asked):
        return False
    while not job.is_done:
        plan = recipe.at(job.step)
        terms = loss_terms(job, plan)

        tally = accumulate(job, plan, terms, timer)
        update = job.update(plan.lr)
        totals = reduce(job, plan, tally, stop.asked)
        if not (update.finite and job.metrics.finite(totals.values)):
            stop_not_finite(job, plan, terms, update.grad_norm)
        for model in job.models:
            update_bias(model, tally.load, plan.bias_update_rate)
        job.step += 1

        stopping = bool(totals.values["run/asked_to_stop"])
        values = totals.values | describe(job, plan, update.grad_norm, timer.stop(), peak_flops_per_s)
        if job.step in config.profile.steps:
            job.write_timeline(len(list(job.micro_batches(plan))))
            timer.stop()
        found = []
        if evaluation_due(job):
            measured, found = look(job)
            values |= measured
            stopping = job.any_rank(stop.asked) or stopping
            timer.stop()
        if ending := stopping or job.is_done:
            values |= job.planned()
        tracker.write(job.metrics.report(values, totals.loads, found))
        job.checkpoints.poll()

        if ending or config.checkpoint.due(job.step, recipe.num_steps):
            tracker.checkpoint()
            save(job)
        if stopping and not job.is_done:
            log.info("asked to stop: saved after step %d", job.step)
            break
    job.optimizer.settle()
    job.checkpoints.wait()
    if job.ema is not None:
        job.ema.wait()
    return job.is_done


def look(job: Job) -> tuple[dict[str, float], list[Sample]]:
    """Evaluate the step just finished: its losses, and samples where they are due.

    Raises NotFiniteError as `check_validation` does. Whether the run's patience is at its end is decided here, on all
    ranks alike.
    """
    measured = evaluate(job)
    check_validation(job, measured)
    job.patience.see(measured["valid/loss"])
    due = job.prompts is not None and job.config.evaluate.prompts_due(job.step, job.is_done)
    return measured, samples(job, job.prompts) if job.prompts is not None and due else []


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


def accumulate(job: Job, plan: StepPlan, terms: LossTerms, timer: StepTimer) -> Tally:
    """Forward and backward of this rank's micro-batches; gradients add up in `main_grad`."""
    job.begin(f"step {job.step + 1}")
    job.optimizer.zero_grad()
    job.recorder.open(events=job.step + 1 in job.config.profile.steps)
    micro_batches = list(job.micro_batches(plan))

    def tokens(micro_batch: int) -> Tensor:
        with timer.waiting_for_data():
            return job.host.put(job.reader.rows(*micro_batches[micro_batch]))

    job.read_ahead(plan)
    if job.step + 1 < job.recipe.num_steps:
        job.read_ahead(job.recipe.at(job.step + 1))
    job.forward_backward(tokens, terms, len(micro_batches))
    return tally_of(job)
