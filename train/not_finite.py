"""A step or an evaluation with a number that is NaN or infinite: which sequences made it, and the end of the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from train.files import in_words
from train.job import Job
from train.model.loss import LossTerms
from train.recipe.recipe import StepPlan

log = logging.getLogger(__name__)


class NotFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite: all ranks raise it in the same step, of which nothing is saved."""


def check_validation(job: Job, losses: Mapping[str, float]) -> None:
    """NotFiniteError, on all ranks, when one of an evaluation's losses shows that the weights are spoilt."""
    bad = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
    if not bad:
        return
    record = {name: repr(loss) for name, loss in bad.items()}
    path = record_not_finite(job, {"step": job.step, **record, "sequences": []})
    said = "the validation loss" if "valid/loss" in bad else next(iter(bad))
    loss = bad.get("valid/loss", next(iter(bad.values())))
    if job.step == 0:
        raise NotFiniteError(
            f"step 0: {said} is {loss} before the first step, so the weights that the run starts from are spoilt: "
            f"stopped; {path} records it"
        )
    raise NotFiniteError(
        f"step {job.step}: {said} is {loss} after a finite training loss, so the update was too large: stopped, and "
        f"the step is not saved; {path} records it, and the last checkpoint is as it was"
    )


def stop_not_finite(job: Job, plan: StepPlan, terms: LossTerms, grad_norm: float) -> NoReturn:
    """Write which sequences made the step's loss or gradient not finite, then raise NotFiniteError on all ranks.

    terms: those of the step.
    """
    job.optimizer.settle()
    found = job.gather_objects(sequences_with_bad_losses(job, plan))
    if not any(found):
        # The losses were finite: the weights have not changed, so each micro-batch can be asked for its gradient.
        found = job.gather_objects(sequences_with_bad_gradients(job, plan, terms))
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
    job.checkpoints.settle()
    path = job.folder / "not_finite.json"
    if job.is_main:
        try:
            path.write_text(json.dumps(what, indent=1) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s; it would have held %s", path, in_words(error), json.dumps(what))
    return path


def describe_sequence(job: Job, rank: int, position: int) -> dict[str, object]:
    """Where a sequence was trained on and which text it is cut from."""
    documents = [document._asdict() for document in job.train_rows.documents(position)]
    return {"rank": rank, "sequence": position, "documents": documents}


def sequences_with_bad_losses(job: Job, plan: StepPlan) -> list[int]:
    """Those of this rank's sequences whose micro-batch had a loss that is not finite."""
    micro_batches = list(job.micro_batches(plan))
    seen = [each for stage in job.stages.values() for each in sorted(stage.findings.items())]
    losses = [(number, job.metrics.losses(findings.metrics)) for number, findings in seen]
    measured = [(number, torch.stack(list(found.values())).isfinite().all()) for number, found in losses if found]
    if not measured:
        return []
    (finite,) = job.host.read("losses", torch.stack([is_finite for _, is_finite in measured]))
    bad = {number for (number, _), good in zip(measured, finite, strict=True) if not good}
    return [first + i for first, count in (micro_batches[number] for number in sorted(bad)) for i in range(count)]


def sequences_with_bad_gradients(job: Job, plan: StepPlan, terms: LossTerms) -> list[int]:
    """Those of this rank's sequences whose micro-batch, alone, makes a gradient that is not finite.

    A dense gradient on any of its stages accuses a micro-batch. An expert's also comes from other ranks' tokens: where
    nothing else is to blame, it accuses all that were trained on at that moment.
    """
    bad: list[int] = []
    for first, count in job.micro_batches(plan):
        job.optimizer.zero_grad()
        job.forward_backward_alone(job.host.put(job.reader.rows(first, count)), terms)
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
