"""The same slice in `transformers`, with the same weights: its loss, and the time of a forward and a backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import _peers
from benchmarks.gpu_check.layers import config_of_slice
from benchmarks.gpu_check.small_job import Rows, job_of
from benchmarks.gpu_check.table import Row, verdict
from train.config import RunConfig
from train.hf import names
from train.job import Job
from train.model.loss import LossTerms

NUM_ROUNDS, NUM_FIRST = 5, 2
# In nats: both round to bfloat16 after every operation, in other places, which a mean over a row levels out.
TOLERANCE = 0.02


def rows(size: str, device: str) -> Iterator[Row]:
    """Ours beside theirs."""
    config = config_of_slice(size, "bf16", device)
    tokens = Rows(config.train.seq_len, config.model.vocab_size).rows(0, 1).to(device)
    with job_of(config, device) as job:
        theirs = their_model(job, config, device)
        sides = {"ours": _ours(job, tokens), "transformers": _theirs(theirs, tokens)}
        seconds, losses = _rounds(sides, device)
    near = verdict(abs(losses["ours"] - losses["transformers"]) <= TOLERANCE)
    note = f"up to {TOLERANCE} nats apart, with the same weights and tokens"
    yield Row("loss of the slice in bf16", losses["ours"], "nats", losses["transformers"], "transformers", near, note)
    found = [1e3 * statistics.median(seconds[name]) for name in sides]
    note = f"the median of {NUM_ROUNDS} rounds, taken in turns; without an optimizer"
    yield Row("forward and backward of the slice in bf16", found[0], "ms", found[1], "transformers", note=note)


def their_model(job: Job, config: RunConfig, device: str) -> Any:
    """`transformers`' model with the weights of ours, which are on the device."""
    with torch.device("meta"):
        shape, _ = _peers.transformers(config.model)
    (ours,) = job.models
    state, disk = ours.state_dict(), {}
    for entry in names.table(config.model):
        tensor = state[entry.ours]
        tensor = tensor if entry.expert is None else tensor[entry.expert]
        disk[entry.theirs] = (tensor if entry.rows is None else tensor[entry.rows]).detach().clone()
    model = type(shape).from_pretrained(None, config=shape.config, state_dict=disk, dtype=torch.bfloat16)
    return model.to(device).train()


def _ours(job: Job, tokens: Tensor) -> Callable[[], float]:
    terms = LossTerms(1 / (tokens.numel() - len(tokens)), 0.0, 0.0)

    def run() -> float:
        job.optimizer.zero_grad()
        job.forward_backward(lambda _: tokens, terms, 1)
        (stage,) = job.stages.values()
        return float(stage.findings[0].metrics["train/loss"]) * terms.main

    return run


def _theirs(model: Any, tokens: Tensor) -> Callable[[], float]:
    def run() -> float:
        model.zero_grad()
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]).loss
        loss.backward()
        return float(loss.detach())

    return run


def _rounds(sides: dict[str, Callable[[], float]], device: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every side's rounds, which take turns, and its loss."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for number in range(NUM_FIRST + NUM_ROUNDS):
        for name, run in sides.items():
            started = time.perf_counter()
            losses[name] = run()  # read by the host, which waits for the forward alone
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= NUM_FIRST:
                seconds[name].append(time.perf_counter() - started)
    return seconds, losses
