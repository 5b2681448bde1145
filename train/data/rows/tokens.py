"""Reading prepared tokens: one long stream per split, whatever the number of shards. No file is held open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.meta import FILES, Meta
from train.data.read.streams import stamp

# Up to this size a split's checksums are verified at every opening (some 50 ms); above, sizes alone are.
_VERIFY_BYTES = 64 << 20


class DocumentSpan(NamedTuple):
    """One document: its place in a source file, tokens [first_token, stop_token) of its split, its end included.

    first_byte, stop_byte: of the file's uncompressed text; of the line that holds the document in JSON lines; rows,
    not bytes, of a table.
    """

    file: str
    first_byte: int
    stop_byte: int
    first_token: int
    stop_token: int


class Tokens:
    """One split of a prepared folder: document, end of document, document, end of document, and so on."""

    def __init__(self, folder: Path, split: str, meta: Meta) -> None:
        counts = meta.splits[split]
        self.folder, self.split, self.meta = folder, split, meta
        self.num_tokens = counts.num_tokens
        self.num_documents = counts.num_documents
        self.unigram_entropy_nats = counts.unigram_entropy_nats
        self.vocab_size = meta.vocab_size
        self.eod = meta.eod
        self._shard_tokens = int(meta.settings["shard_tokens"])
        self._dtype = np.dtype(meta.dtype)
        self._paths = [str(folder / name) for name in counts.shards]
        self._stamps = [stamp(os.stat(path)) for path in self._paths]

    @classmethod
    def open(cls, folder: str | Path, split: str, verify: bool | None = None) -> Tokens:
        """Open `split` ("train" or "valid") of a folder that `prepare` has written.

        verify: whether to compare all checksums; None does so for small data, and compares sizes for large.
        Raises ValueError, naming the file, when the folder is not whole or one of its files was cut or changed.
        """
        folder = Path(folder)
        meta = Meta.load(folder)
        if split not in meta.splits:
            raise ValueError(f"split={split} is not one of {', '.join(meta.splits)}")
        if not meta.splits[split].num_tokens:
            raise ValueError(
                f"{folder} holds no {split} tokens: it was prepared with "
                f"data.valid_fraction={meta.settings['valid_fraction']}"
            )
        if verify is None:
            verify = sum(file.num_bytes for file in meta.files.values()) <= _VERIFY_BYTES
        if verify:
            meta.check_contents(folder)
        else:
            meta.check_sizes(folder)
        return cls(folder, split, meta)

    @property
    def fingerprint(self) -> str:
        """Equal exactly where a run would read the same tokens: for refusing to resume on other data."""
        return self.meta.fingerprint

    def copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (1-D, any integer type that holds the ids) with the tokens from position `start` on.

        Raises ValueError, naming the file, when a shard was changed since it was opened: of one that was cut, reading
        on would end the process without a word.
        """
        done = 0
        while done < len(out):
            shard, offset = divmod(start + done, self._shard_tokens)
            count = min(len(out) - done, self._shard_tokens - offset)
            out[done : done + count] = self._part(shard, offset, count)
            done += count

    def _part(self, shard: int, offset: int, count: int) -> np.ndarray:
        """Tokens of one shard. It is opened for it: a process may not have as many files open as there are shards."""
        part = np.empty(count, dtype=self._dtype)
        try:
            with open(self._paths[shard], "rb", buffering=0) as file:
                same = stamp(os.fstat(file.fileno())) == self._stamps[shard]
                file.seek(offset * self._dtype.itemsize)
                same = same and file.readinto(part.view(np.uint8).data) == part.nbytes
        except FileNotFoundError:
            same = False
        if not same:
            raise ValueError(
                f"{self._paths[shard]} was changed or removed while it was read: leave prepared tokens alone as long "
                "as a run reads them; prepare them again before the next one"
            )
        return part

    def _documents(self) -> np.ndarray:
        """The table of documents, int64 [num_documents, 4], mapped into memory as long as it is used."""
        path = self.folder / f"{self.split}-documents.bin"
        return np.asarray(np.memmap(path, dtype="<i8", mode="r").reshape(-1, 4))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), int64. ValueError when they are not all in the split."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start} to {stop} are not within the {self.num_tokens} of {self.split}")
        out = np.empty(stop - start, dtype=np.int64)
        self.copy(start, out)
        return out

    def num_ends(self, starts: np.ndarray, stops: np.ndarray) -> int:
        """How many documents end in the ranges of tokens [start, stop), all ranges together."""
        return int((self._num_ends_before(stops) - self._num_ends_before(starts)).sum())

    def _num_ends_before(self, positions: np.ndarray) -> np.ndarray:
        """Documents whose last token lies before each position."""
        return np.searchsorted(self._documents()[:, 0], positions, side="right")

    def documents(self, start: int, stop: int) -> list[DocumentSpan]:
        """The documents that own the tokens [start, stop), in order. ValueError when they are not in the split."""
        if not 0 <= start < stop <= self.num_tokens:
            raise ValueError(f"tokens {start} to {stop} are not within the {self.num_tokens} of {self.split}")
        table = self._documents()
        ends = table[:, 0]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, stop - 1, side="right"))
        files = json.loads((self.folder / FILES).read_text(encoding="utf-8"))
        found = []
        for index in range(first, last + 1):
            end, file, first_byte, stop_byte = (int(value) for value in table[index])
            begin = int(ends[index - 1]) if index else 0
            found.append(DocumentSpan(files[file], first_byte, stop_byte, begin, end))
        return found
