"""Small models trained on the device, their losses held against a CPU's; and every attention kernel that is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu_check.small_job import config_of, job_of, step
from benchmarks.gpu_check.table import Row, verdict
from train.model.attention.choice import AUTO, CORES, objection
from train.model.attention.installed import missing

NUM_STEPS = 20
# Widths that every kernel takes: multiples of 16 for FP8, of 8 for attention; values narrower than keys.
MODEL = (
    *("model=tiny", "model.num_hidden_layers=3", "model.vocab_size=512", "model.hidden_size=256"),
    *("model.intermediate_size=512", "model.moe_intermediate_size=128", "model.q_lora_rank=128"),
    *("model.kv_lora_rank=128", "model.qk_nope_head_dim=32", "model.qk_rope_head_dim=16", "model.v_head_dim=32"),
    *("train.seq_len=128", "train.micro_batch_size=2", "train.global_batch_size=4", "lr_scheduler.lr=0.003"),
    *("lr_scheduler.warmup_steps=2", "train.max_tokens=null"),
)
# How far a loss may lie from a CPU's, in nats. Both round alike, once a product, to 8 bits (bf16) or values of 4 bits
# with scales (fp8); sums in another order then move single values by one of these roundings, which a step's mean over
# 512 tokens levels out, and now and then the route of a token. A product with wrong operands is off by whole nats.
TOLERANCES = {"bf16": 0.03, "fp8": 0.1}
# What training must gain in these steps to be training.
MIN_GAIN = 0.5


def losses(settings: Sequence[str], device: str, num_steps: int) -> list[float]:
    """The loss of each step of a run on this device."""
    with job_of(config_of([*MODEL, *settings, f"train.max_steps={num_steps}"], device), device) as job:
        return [step(job) for _ in range(num_steps)]


def precision(name: str, device: str, num_steps: int = NUM_STEPS) -> Iterator[Row]:
    """One precision, by what multiplies in it on the device."""
    settings = [f"precision={name}"]
    ours, theirs = losses(settings, device, num_steps), losses(settings, "cpu", num_steps)
    farthest = max(range(num_steps), key=lambda each: abs(ours[each] - theirs[each]))
    gap = abs(ours[farthest] - theirs[farthest])
    note = f"the farthest of {num_steps} steps, of which {TOLERANCES[name]} nats are allowed"
    right = verdict(gap <= TOLERANCES[name])
    yield Row(f"loss of step {farthest + 1} in {name}", ours[farthest], "nats", theirs[farthest], "CPU", right, note)
    # A short run on a small machine need not have learnt much.
    needed = MIN_GAIN if num_steps >= NUM_STEPS else 0.0
    yield Row(f"loss gained in {name}", ours[0] - ours[-1], "nats", verdict=verdict(ours[0] - ours[-1] > needed))


def attention(device: str, num_steps: int = 3) -> Iterator[Row]:
    """Each kernel that computes attention, for rows that are one text and for documents."""
    for by_document in (False, True):
        shared = ["precision=bf16", f"data.document_mask={str(by_document).lower()}"]
        theirs = losses(shared, "cpu", num_steps)
        demand = config_of([*MODEL, *shared], device).attention_demand
        for name in (AUTO, *CORES):
            what = f"attention by {name}, {'documents' if by_document else 'one text'}"
            reason = None if name == AUTO else objection(name, demand) or missing(name, demand, torch.device(device))
            if reason is not None:
                yield Row(what, "not run", note=reason)
                continue
            ours = losses([*shared, f"run.attention_kernel={name}"], device, num_steps)
            gap = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
            right = verdict(gap <= TOLERANCES["bf16"])
            yield Row(f"loss after {num_steps} steps, {what}", ours[-1], "nats", theirs[-1], "CPU", right)
