"""A rank on an emulated node, which does a few steps and says how many bytes its node has sent in each.

python -m benchmarks.emulate nodes=2 -- python -m tests.emulated_steps key=value ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.emulate import LINK
from launch.plan.pieces import job_of, one_step
from train.compose import compose
from train.settle import settled

NUM_STEPS = 2
SENT = Path(f"/sys/class/net/{LINK}/statistics/tx_bytes")


def main(words: Sequence[str]) -> int:
    torch.set_num_threads(1)
    sent = []
    with job_of(settled(compose(words), "cpu")) as job:
        for _ in range(NUM_STEPS):
            job.groups.world.barrier(job.groups.watch, "the other rank")
            torch.manual_seed(job.step)  # both ranks draw the same tokens: what one sends to the other it gets back
            before = int(SENT.read_text())
            one_step(job)
            job.optimizer.settle()  # new weights may still be on their way
            job.groups.world.barrier(job.groups.watch, "the other rank")
            sent.append(int(SENT.read_text()) - before)
    print(json.dumps(sent))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
