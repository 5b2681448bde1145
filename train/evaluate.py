"""Loss on the validation split: always the same sequences, whatever the topology."""

from __future__ import annotations

import torch
from torch import Tensor

from train.job import Job


def evaluate(job: Job) -> float:
    """Mean next-token cross-entropy (nats) of the first `evaluate.num_sequences` sequences of the validation split.

    Sequences go one by one, so that the number is of the same rows in the same shape under any topology. All ranks run
    equally many, as their experts are needed; one that has no sequence left runs any and drops its loss. Expert load,
    balance and prediction depths play no part.
    """
    num_sequences = min(job.config.evaluate.num_sequences, job.valid_rows.num_rows)
    mesh = job.groups.mesh
    per_rank = -(-num_sequences // mesh.config.dp)
    own = range(mesh.dp_rank * per_rank, min((mesh.dp_rank + 1) * per_rank, num_sequences))

    def tokens(micro_batch: int) -> Tensor:
        return job.host.put(job.valid_rows.rows(own[micro_batch] if micro_batch < len(own) else 0, 1))

    job.forward(tokens, per_rank)
    loss_sum = torch.zeros(1, dtype=torch.float64, device=job.device)
    for stage in job.stages.values():
        for micro_batch, report in sorted(stage.reports.items()):
            if micro_batch < len(own):
                loss_sum += report.sums[0]
    job.dispatch.take_internode_bytes()
    job.dispatch.take_node_visits()
    (loss_sums,) = job.host.read("validation loss", job.gather(loss_sum).flatten())
    return sum(loss_sums) / max(1, job.valid_rows.num_targets(0, num_sequences))
