"""What the tensors of each rank of a run take at their fullest. A processor's own figure, resident memory, does not
tell: it has the program in it, and what an allocator has kept.

    allocated   bytes of all storages that are alive, each rounded up to 512 as an allocator of device memory does

A rank is put together as a run's is, does a step, and is followed through the next one: what lies there before it is
found among Python's objects, and what is made in it by every operation of torch's.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._storages import Storages
from launch.plan.pieces import job_of, one_step
from launch.ranks import start_ranks
from train import compose, environment
from train.config import RunConfig
from train.settle import settled

ROUNDING_BYTES = 512


class _Peak(Storages):
    """Storages whose most is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._bound = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        found = out if isinstance(out, (tuple, list)) else (out,)
        self._bound += sum(each.untyped_storage().nbytes() for each in found if isinstance(each, Tensor))
        if self._bound > self.most:  # all that is alive is counted where it may be more than before
            self._bound = self.num_bytes()
            self.most = max(self.most, self._bound)
        return out


def held_bytes() -> int:
    """Of all tensors that Python's objects hold."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = -(-storage.nbytes() // ROUNDING_BYTES) * ROUNDING_BYTES
    return sum(storages.values())


def most_bytes(config: RunConfig) -> int:
    """This rank's most in a step, without what lay there before the job was put together."""
    gc.collect()
    before = held_bytes()
    with job_of(settled(config, "cpu")) as job:
        one_step(job)
        gc.collect()
        lasting = held_bytes() - before
        with _Peak() as peak:
            one_step(job)
        return lasting + peak.most


def measured_bytes(words: Sequence[str], num_ranks: int) -> list[int]:
    """The most that each rank of a run holds in a step. RuntimeError if its ranks failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks._allocated", folder, *words]
        ended = start_ranks(command, num_ranks, Path(folder) / "logs")
        if ended.code:
            raise RuntimeError(ended.reason)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def main(words: Sequence[str]) -> int:
    folder, *settings = words
    torch.set_num_threads(1)
    found = most_bytes(compose.compose(settings))
    (Path(folder) / f"{environment.read().rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
