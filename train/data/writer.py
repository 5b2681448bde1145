"""Writes the encoded documents of each split into shards of a fixed number of tokens."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from train.data.encode import Encoded
from train.data.meta import SPLITS, FileSum, Split, sha256_of


class SummedFile:
    """A new file whose SHA-256 is taken while it is written and compared with the disk's when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)

    def close(self) -> FileSum:
        """Flush to the disk, read back, compare. OSError when the file does not hold what was written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        if sha256_of(self._path) != self._digest.hexdigest():
            raise OSError(f"{self._path} does not read back as it was written")
        return FileSum(self._num_bytes, self._digest.hexdigest())


class SplitWriter:
    """One split: its stream of tokens cut into shards, and the table of its documents."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._num_documents = self._num_bytes = self._num_tokens = 0
        self._counts = np.zeros(0, dtype=np.int64)
        self._shard: SummedFile | None = None
        self._shards: list[str] = []
        self._documents = SummedFile(folder / f"{split}-documents.bin")
        self.files: dict[str, FileSum] = {}

    def add(self, ids: np.ndarray, num_tokens: np.ndarray, pieces: np.ndarray) -> None:
        """Append documents: their ids, the length of each, and their places (see Encoded)."""
        ends = self._num_tokens + np.cumsum(num_tokens)
        self._documents.write(np.column_stack([ends, pieces]).astype("<i8"))
        counts = np.bincount(ids, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._num_documents += len(num_tokens)
        self._num_bytes += int((pieces[:, 2] - pieces[:, 1]).sum())
        while len(ids):
            room = self._shard_tokens - self._num_tokens % self._shard_tokens
            if self._shard is None:
                self._shards.append(f"{self._split}-{len(self._shards):05d}.bin")
                self._shard = SummedFile(self._folder / self._shards[-1])
            self._shard.write(ids[:room].astype(self._dtype, copy=False))
            self._num_tokens += len(ids[:room])
            if len(ids) >= room:
                self._close_shard()
            ids = ids[room:]

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.files[self._shards[-1]] = self._shard.close()
            self._shard = None

    def close(self) -> Split:
        """Close the last files; `files` then holds the sums of all."""
        self._close_shard()
        self.files[f"{self._split}-documents.bin"] = self._documents.close()
        return Split(
            num_documents=self._num_documents,
            num_bytes=self._num_bytes,
            num_tokens=self._num_tokens,
            unigram_entropy_nats=entropy_nats(self._counts) if self._num_tokens else None,
            shards=tuple(self._shards),
        )


class Writer:
    """Both splits. A document validates when its hash is below `threshold`, which lies in [0, 2**64)."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int, threshold: int) -> None:
        self._threshold = np.uint64(threshold)
        self.least_hash, self.largest_hash = (1 << 64) - 1, 0
        self._splits = {split: SplitWriter(folder, split, np.dtype(dtype), shard_tokens) for split in SPLITS}

    def add(self, encoded: Encoded) -> None:
        """Give each document of a task to its split, in order."""
        if not len(encoded.hashes):
            return
        self.least_hash = min(self.least_hash, int(encoded.hashes.min()))
        self.largest_hash = max(self.largest_hash, int(encoded.hashes.max()))
        validates = encoded.hashes < self._threshold
        for split, chosen in (("train", ~validates), ("valid", validates)):
            if chosen.any():
                ids = encoded.ids[np.repeat(chosen, encoded.num_tokens)]
                self._splits[split].add(ids, encoded.num_tokens[chosen], encoded.pieces[chosen])

    def close(self) -> tuple[dict[str, Split], dict[str, FileSum]]:
        """Counts of each split and sums of all files."""
        splits = {split: writer.close() for split, writer in self._splits.items()}
        return splits, {name: each for writer in self._splits.values() for name, each in writer.files.items()}


def entropy_nats(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution with these counts: the loss of a model that knows the frequencies alone."""
    total = int(counts.sum())
    shares = [int(count) / total for count in counts if count]
    return -math.fsum(share * math.log(share) for share in shares)
