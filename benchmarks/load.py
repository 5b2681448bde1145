"""`python -m benchmarks.load [tensors=24 numel=4000000 ranges=4 rounds=5]`: how fast a checkpoint becomes tensors.

One process saves float32 tensors in some ranges each, as ranks would, and reads them back whole: by the reader of runs
and exports, and by the reader of torch.distributed.checkpoint, which loads every saved range and copies it. Neither
looks at checksums, whose time is a row of its own. Files come from the page cache, so what is measured is the reader
and not the disk. `tensors=4500 numel=1000` shows many small ranges.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks._ranks import read_settings
from benchmarks._sides import Neighbours, median_ms, speedup, take_turns
from parallel.shards import Piece
from train.checkpoint import step_folders
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.reader import RangeReader
from train.checkpoint.saver import Checkpoints
from train.checkpoint.state import TrainState, capture_rng
from train.files import check_contents

OURS, THEIRS, CHECKSUMS = "ranged reader", "torch.distributed.checkpoint", "checksums"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        tensors: how many tensors the checkpoint holds.
        numel: elements of each, float32.
        ranges: in how many ranges each is saved.
        rounds: how often each side reads them all.
    """

    tensors: int = 24
    numel: int = 4_000_000
    ranges: int = 4
    rounds: int = 5

    def check(self) -> None:
        """ValueError for a count below one, or more ranges than elements."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be a whole number of at least 1")
        if self.ranges > self.numel:
            raise ValueError(f"ranges={self.ranges} must be at most numel={self.numel}")


def save(folder: Path, values: Mapping[str, Tensor], num_ranges: int) -> Path:
    """A step folder with these 1-D tensors, each saved in `num_ranges` ranges of nearly one length."""
    pieces = {}
    for name, tensor in values.items():
        cuts = [len(tensor) * index // num_ranges for index in range(num_ranges + 1)]
        pieces[name] = [Piece(start, tensor[start:end]) for start, end in itertools.pairwise(cuts)]
    checkpoints = Checkpoints(folder, CheckpointConfig(async_mode="disabled"))
    sizes = {name: tensor.numel() for name, tensor in values.items()}
    checkpoints.save(TrainState(1, 0, 0, 0, capture_rng(), None, {}, ""), pieces, sizes)
    return step_folders.step_folder(folder, 1)


def sides(path: Path, targets: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """By its name what each side does: fill `targets` from the checkpoint at `path`, or only sum up its files."""

    def ours() -> None:
        with RangeReader(path) as reader:
            reader.fill({name: [Piece(0, tensor)] for name, tensor in targets.items()})

    def theirs() -> None:
        dcp.load(dict(targets), storage_reader=dcp.FileSystemReader(path), no_dist=True)

    def checksums() -> None:
        manifest = step_folders.read_manifest(path)
        check_contents(path, manifest, list(manifest))

    return {OURS: ours, THEIRS: theirs, CHECKSUMS: checksums}


def main(arguments: list[str]) -> None:
    _, settings = read_settings(Settings, arguments, "benchmarks.load")
    values = {f"tensor_{index}": torch.randn(settings.numel) for index in range(settings.tensors)}
    with tempfile.TemporaryDirectory() as folder, Neighbours() as neighbours:
        path = save(Path(folder), values, settings.ranges)
        targets = {name: torch.empty_like(tensor) for name, tensor in values.items()}
        readers = sides(path, targets)
        for name in (OURS, THEIRS):
            for tensor in targets.values():
                tensor.zero_()
            readers[name]()
            if not all(torch.equal(targets[key], values[key]) for key in values):
                raise SystemExit(f"{name} read other numbers than were saved")
        seconds = take_turns(readers, settings.rounds)
    num_bytes = settings.tensors * settings.numel * 4
    print(f"{settings.tensors} tensors in {settings.ranges} ranges each, {num_bytes / 1e6:.0f} MB")
    for name, taken in seconds.items():
        ms = median_ms(taken)
        print(f"{name:<30}{ms:10.1f} ms{num_bytes / ms / 1e6:8.2f} GB/s")
    print(f"{OURS}: {speedup(seconds, OURS, THEIRS)} as fast as {THEIRS}; {neighbours}")


if __name__ == "__main__":
    main(sys.argv[1:])
