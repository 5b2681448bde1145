"""One micro-batch before the first step, of which nothing is kept: what a device does for the first time.

Kernels are loaded when they are first launched, and an allocator first asks for memory, both of which may wait for all
that the device has under way. Here one micro-batch passes through the pipeline alone.
"""

from __future__ import annotations

from train.job import Job
from train.model.loss import LossTerms
from train.recipe.recipe import StepPlan


def warm_up(job: Job, plan: StepPlan, terms: LossTerms) -> None:
    """Forward and backward of this rank's first micro-batch of a step. All ranks call it together.

    Gradients and findings are those of no step: the next one begins with zeros and findings of its own.
    """
    job.begin("warm-up")
    job.recorder.open()
    job.optimizer.zero_grad()
    position, count = next(iter(job.micro_batches(plan)))
    job.forward_backward_alone(job.host.put(job.reader.rows(position, count)), terms)
    job.forget_exchanges()
