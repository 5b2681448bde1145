"""Loss on the validation split: always the same sequences, whatever the topology."""

from __future__ import annotations

import torch

from train.assemble import Job
from train.model.transformer import LossTerms


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean next-token cross-entropy (nats) of the first `evaluate.num_sequences` sequences of the validation split.

    All ranks take part in every round, as their experts are needed; one that has no sequence left runs any and drops
    its loss. Expert load, balance and MTP play no part.
    """
    num_sequences = min(job.config.evaluate.num_sequences, job.valid_rows.num_rows)
    micro_batch, mesh = job.config.train.micro_batch_size, job.groups.mesh
    total = torch.zeros(1, dtype=torch.float64, device=job.device)
    job.model.eval()
    per_round = micro_batch * mesh.config.dp
    for start in range(0, num_sequences, per_round):
        first = start + mesh.dp_rank * micro_batch
        count = max(0, min(micro_batch, num_sequences - first))
        tokens = job.valid_rows.rows(first if count else 0, count or 1).to(job.device)
        loss_sum = job.model(tokens, LossTerms(1.0, 0.0, 0.0)).sums[0]
        if count:
            total += loss_sum
    job.model.train()
    job.dispatch.take_internode_bytes()
    job.dispatch.take_node_visits()
    everyone = job.gather(total)
    loss_sum = sum(everyone.flatten().tolist())
    return loss_sum / (num_sequences * job.config.train.seq_len)
