"""Loss on the validation text: always the same sequences, whatever the topology."""

from __future__ import annotations

from torch import Tensor

from train.data.rows.valid import Validation
from train.job import Job


def evaluation_due(job: Job) -> bool:
    """Whether the step just finished, or the start of the run, is followed by an evaluation."""
    return job.config.evaluate.due(job.step, job.step == job.recipe.num_steps)


def evaluate(job: Job) -> dict[str, float]:
    """`valid/loss`, the mean next-token cross-entropy over the validation split, and that of every source by itself.

    Sequences go one by one, so that the number is of the same rows in the same shape under any topology. All ranks run
    equally many, as their experts are needed; one that has no sequence left runs any and drops its loss. Expert load,
    balance and prediction depths play no part.
    """
    job.begin(f"evaluation after step {job.step}")
    validation, mesh = job.validation, job.groups.mesh
    per_rank = -(-validation.num_sequences // mesh.config.dp)
    own = range(mesh.dp_rank * per_rank, min((mesh.dp_rank + 1) * per_rank, validation.num_sequences))

    def tokens(micro_batch: int) -> Tensor:
        return job.host.put(validation.sequence(own[micro_batch] if micro_batch < len(own) else 0))

    job.forward(tokens, per_rank)
    measured: dict[str, Tensor] = {}
    for stage in job.stages.values():
        for micro_batch, findings in sorted(stage.findings.items()):
            if micro_batch < len(own) and "train/loss" in findings.metrics:
                loss = findings.metrics["train/loss"]
                job.metrics.add(measured, dict.fromkeys(metrics_of(validation, own[micro_batch]), loss))
    job.forget_exchanges()
    (rows,) = job.host.read("validation loss", job.gather(job.metrics.pack(measured, job.host.put)))
    return job.metrics.unpack(rows, counts(validation))


def metrics_of(validation: Validation, sequence: int) -> list[str]:
    """The metrics that the loss of a sequence is part of."""
    portion, _ = validation.at(sequence)
    return ["valid/loss"] * portion.in_mean + [f"valid/{portion.name}/loss"] * portion.is_reported


def counts(validation: Validation) -> dict[str, int]:
    """What sums of an evaluation are divided by."""
    each = {f"targets of {portion.name}": portion.num_targets for portion in validation.portions}
    return {"targets": validation.num_targets, **each}
