"""Loss on the validation split: always the same sequences, whatever the topology."""

from __future__ import annotations

from torch import Tensor

from train.job import Job


def evaluation_due(job: Job) -> bool:
    """Whether the step just finished is followed by an evaluation: every `evaluate.interval`-th, and the last one."""
    interval = job.config.evaluate.interval
    return job.step == job.recipe.num_steps or (interval > 0 and job.step % interval == 0)


def evaluate(job: Job) -> dict[str, float]:
    """`valid/loss`: mean next-token cross-entropy of the first `evaluate.num_sequences` sequences of the split.

    Sequences go one by one, so that the number is of the same rows in the same shape under any topology. All ranks run
    equally many, as their experts are needed; one that has no sequence left runs any and drops its loss. Expert load,
    balance and prediction depths play no part.
    """
    job.begin(f"evaluation after step {job.step}")
    num_sequences = min(job.config.evaluate.num_sequences, job.valid_rows.num_rows)
    mesh = job.groups.mesh
    per_rank = -(-num_sequences // mesh.config.dp)
    own = range(mesh.dp_rank * per_rank, min((mesh.dp_rank + 1) * per_rank, num_sequences))

    def tokens(micro_batch: int) -> Tensor:
        return job.host.put(job.valid_rows.rows(own[micro_batch] if micro_batch < len(own) else 0, 1))

    job.forward(tokens, per_rank)
    measured: dict[str, Tensor] = {}
    for stage in job.stages.values():
        for micro_batch, findings in sorted(stage.findings.items()):
            if micro_batch < len(own) and "train/loss" in findings.metrics:
                job.metrics.add(measured, {"valid/loss": findings.metrics["train/loss"]})
    job.dispatch.take_internode_bytes()
    job.dispatch.take_node_visits()
    (rows,) = job.host.read("validation loss", job.gather(job.metrics.pack(measured, job.host.put)))
    return job.metrics.unpack(rows, {"targets": job.valid_rows.num_targets(0, num_sequences)})
