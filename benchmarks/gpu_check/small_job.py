"""A job of one process without files: on any device, over rows that it makes up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from launch.plan.names import Listener, tapes
from launch.plan.world import FakeRows, nothing
from parallel import process
from train import loop
from train.assemble import Files, put_together
from train.compose import compose
from train.config import RunConfig
from train.job import Job
from train.precision.build import settle
from train.recipe.balance import update_bias
from train.tally import reduce
from train.track.gauges import StepTimer

ALONE = ("parallel.dispatch=local", "pipeline.schedule=1f1b", "zero.engine=native", "track.wandb=disabled")


class Rows(FakeRows):
    """Rows that can be learnt: a token follows from the one before, up to a few that are drawn. A function of the
    position, so that all devices see the same. Token 1 ends documents and comes now and then."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len)
        self._vocab_size = vocab_size

    def rows(self, first: int, count: int) -> Tensor:
        return torch.stack([self._row(position) for position in range(first, first + count)])

    def _row(self, position: int) -> Tensor:
        draw = torch.Generator(device="cpu").manual_seed(position)
        steps = torch.randint(3, (self._seq_len + 1,), generator=draw, device="cpu")
        found = (steps.cumsum(0) * 7 + position) % (self._vocab_size - 2) + 2
        ends = torch.rand(self._seq_len + 1, generator=draw, device="cpu") < 0.02
        return found.masked_fill(ends, self.end_of_document)


def config_of(settings: Sequence[str], device: str) -> RunConfig:
    """A checked run of one process on this device."""
    config = compose([*ALONE, *settings, f"run.device={device}"])
    return replace(config, precision=settle(config.precision, device))


@contextmanager
def job_of(config: RunConfig, device: str, pieces: Listener | None = None) -> Iterator[Job]:
    """The job with its weights, on this device; it tells `pieces` what it begins."""
    groups = process.start(config.parallel, device, config.mirrored, config.shared_ends)
    rows = Rows(config.train.seq_len, config.model.vocab_size)
    files = Files(train_rows=rows, validation=nothing(), prompts=None, checkpoints=nothing())
    try:
        yield put_together(config, groups, files, tapes=None if pieces is None else tapes(pieces))
    finally:
        process.stop(groups)


def step(job: Job) -> float:
    """A step as `loop.run` has it, without reports; the loss before it, in nats a token."""
    plan = job.recipe.at(job.step)
    tally = loop.accumulate(job, plan, loop.loss_terms(job, plan), StepTimer())
    job.update(plan.lr)
    totals = reduce(job, plan, tally, False)
    for model in job.models:
        update_bias(model, tally.load, plan.bias_update_rate)
    job.step += 1
    return float(totals.values["train/loss"])
