"""Writes the encoded documents of each split into shards of a fixed number of tokens.

What is written can be flushed at any document, described in a few numbers (`state`), and gone on with from there by
another process, whatever was written behind it before.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from train.data.meta import SPLITS, Split, plain_record, read_record
from train.data.prepare.encode import Encoded
from train.data.prepare.seen import Seen
from train.files import SHA256, FileRecord, SummedFile, check_sizes

HASHES = "hashes.bin"  # of the documents so far, for a call that goes on


class SplitWriter:
    """One split: its stream of tokens cut into shards, and the table of its documents."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        """state, counts: what a writer before has given, to go on there.

        Raises OSError or ValueError when its files do not hold it.
        """
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        state = state or {"num_documents": 0, "num_bytes": 0, "num_tokens": 0, "shards": [], "files": {}}
        self._num_documents, self._num_bytes = int(state["num_documents"]), int(state["num_bytes"])
        self._num_tokens = int(state["num_tokens"])
        self._shards: list[str] = list(state["shards"])
        self.files = {name: read_record(each) for name, each in state["files"].items()}
        self.counts = np.zeros(0, dtype=np.int64) if counts is None else counts
        self._shard: SummedFile | None = None
        if self._shards and self._shards[-1] not in self.files:
            self._shard = SummedFile(
                folder / self._shards[-1], SHA256, self._num_tokens % shard_tokens * dtype.itemsize
            )
        check_sizes(folder, self.files)
        self._documents = SummedFile(folder / f"{split}-documents.bin", SHA256, self._num_documents * 32)

    def add(self, ids: np.ndarray, num_tokens: np.ndarray, num_bytes: int, places: np.ndarray) -> None:
        """Append documents: their ids, the length of each, the bytes of all, and their places (see Encoded)."""
        ends = self._num_tokens + np.cumsum(num_tokens)
        self._documents.write(np.column_stack([ends, places]).astype("<i8").tobytes())
        counts = np.bincount(ids, minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts
        self._num_documents += len(num_tokens)
        self._num_bytes += num_bytes
        while len(ids):
            room = self._shard_tokens - self._num_tokens % self._shard_tokens
            if self._shard is None:
                self._shards.append(f"{self._split}-{len(self._shards):05d}.bin")
                self._shard = SummedFile(self._folder / self._shards[-1], SHA256)
            self._shard.write(ids[:room].astype(self._dtype, copy=False).tobytes())
            self._num_tokens += len(ids[:room])
            if len(ids) >= room:
                self._close_shard()
            ids = ids[room:]

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.files[self._shards[-1]] = self._shard.close_and_compare()
            self._shard = None

    def state(self) -> dict[str, Any]:
        """Flush to the disk, and say in plain values what a writer needs to go on from here, beside `counts`."""
        for file in (self._shard, self._documents):
            if file is not None:
                file.sync()
        return {
            "num_documents": self._num_documents,
            "num_bytes": self._num_bytes,
            "num_tokens": self._num_tokens,
            "shards": list(self._shards),
            "files": {name: plain_record(each) for name, each in self.files.items()},
        }

    def close(self) -> Split:
        """Close the last files; `files` then holds the sums of all."""
        self._close_shard()
        self.files[f"{self._split}-documents.bin"] = self._documents.close_and_compare()
        return Split(
            num_documents=self._num_documents,
            num_bytes=self._num_bytes,
            num_tokens=self._num_tokens,
            unigram_entropy_nats=entropy_nats(self.counts) if self._num_tokens else None,
            shards=tuple(self._shards),
        )


class Writer:
    """Both splits. A document validates when its hash is below `threshold`, which lies in [0, 2**64].

    With `deduplicate` a document whose hash was there before is not written.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        shard_tokens: int,
        threshold: int,
        deduplicate: bool,
        state: dict[str, Any] | None = None,
        counts: dict[str, np.ndarray] | None = None,
    ) -> None:
        """state, counts: what a writer before has given, by split, to go on there.

        Raises OSError or ValueError when its files do not hold it.
        """
        self._threshold, self._deduplicate = threshold, deduplicate
        first: dict[str, Any] = {"least_hash": (1 << 64) - 1, "largest_hash": 0, "num_hashes": 0, "splits": {}}
        state, counts = state or first, counts or {}
        self.least_hash, self.largest_hash = int(state["least_hash"]), int(state["largest_hash"])
        self._splits = {
            split: SplitWriter(
                folder, split, np.dtype(dtype), shard_tokens, state["splits"].get(split), counts.get(split)
            )
            for split in SPLITS
        }
        self._hashes = SummedFile(folder / HASHES, SHA256, state["num_hashes"] * 8)
        self._seen = Seen()
        if state["num_hashes"]:
            self._seen.add(np.fromfile(folder / HASHES, dtype="<u8", count=state["num_hashes"]))

    @property
    def num_documents(self) -> int:
        """Different documents so far."""
        return self._hashes.num_bytes // 8

    def add(self, encoded: Encoded) -> np.ndarray:
        """Give each document of a task to its split, in order; int64 [n, 3], the places of those seen before."""
        if not len(encoded.hashes):
            return encoded.places
        self.least_hash = min(self.least_hash, int(encoded.hashes.min()))
        self.largest_hash = max(self.largest_hash, int(encoded.hashes.max()))
        new = self._seen.add(encoded.hashes)
        self._hashes.write(encoded.hashes[new].astype("<u8").tobytes())
        kept = new if self._deduplicate else np.ones(len(new), dtype=bool)
        # The hashes are of 64 bits, which do not hold a threshold that all of them are below.
        validates = encoded.hashes <= np.uint64(max(self._threshold - 1, 0))
        validates &= self._threshold > 0
        for split, chosen in (("train", kept & ~validates), ("valid", kept & validates)):
            if chosen.any():
                ids = encoded.ids[np.repeat(chosen, encoded.num_tokens)]
                num_bytes = int(encoded.num_bytes[chosen].sum())
                self._splits[split].add(ids, encoded.num_tokens[chosen], num_bytes, encoded.places[chosen])
        return encoded.places[~new]

    def state(self) -> dict[str, Any]:
        """Flush to the disk, and say in plain values what a writer needs to go on from here, beside `counts`."""
        self._hashes.sync()
        return {
            "least_hash": self.least_hash,
            "largest_hash": self.largest_hash,
            "num_hashes": self.num_documents,
            "splits": {split: writer.state() for split, writer in self._splits.items()},
        }

    def counts(self) -> dict[str, np.ndarray]:
        """How often each token is in each split, int64 [largest id + 1]."""
        return {split: writer.counts for split, writer in self._splits.items()}

    def close(self) -> tuple[dict[str, Split], dict[str, FileRecord]]:
        """Counts of each split and sums of all files."""
        self._hashes.close_and_compare()
        splits = {split: writer.close() for split, writer in self._splits.items()}
        return splits, {name: each for writer in self._splits.values() for name, each in writer.files.items()}


def entropy_nats(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution with these counts: the loss of a model that knows the frequencies alone."""
    total = int(counts.sum())
    shares = [int(count) / total for count in counts if count]
    return -math.fsum(share * math.log(share) for share in shares)
