"""Sixty-four real ranks on this machine: they meet, train a step, save, and are gone within a minute of two cores."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from tests.launched import local
from tests.runs import SMALL, last_checkpoint, prepare_text
from train.track.metrics_file import read_metrics

# A minute of two cores. Processor time: how long it takes beside other programs is the machine's matter.
NUM_RANKS, LIMIT_CPU_S = 64, 120.0
# Two stages over 32 ranks each, experts over eight: three kinds of groups of 2 to 32, and a tree of two levels of all.
SETTINGS = [
    *("parallel.pp=2", "parallel.dp=32", "parallel.ep=8", "pipeline.schedule=1f1b"),
    *("train.global_batch_size=64", "train.max_steps=1", "lr_scheduler.warmup_steps=1"),
    *("evaluate.interval=0", "checkpoint.interval=1"),
]


@pytest.mark.slow
def test_64_ranks_start_train_and_save_in_a_minute_of_two_cores(tmp_path: Path) -> None:
    text, folder = prepare_text(tmp_path / "tokens"), tmp_path / "run"
    begun_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with local([*SMALL, *text, *SETTINGS], folder) as job:
        code, out, err = job.finish()
    took_s, after = time.monotonic() - begun_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert code == 0, (out, err)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 1
    assert last_checkpoint(folder).name.endswith("1")
    print(f"{NUM_RANKS} ranks: {took_s:.1f} s, {cpu_s:.1f} s of processor time")
    assert cpu_s < LIMIT_CPU_S
