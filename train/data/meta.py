"""What lies in a folder of prepared tokens: `meta.json`, written last, so that its presence says that all is whole.

meta.json              counts, settings, checksums
tokenizer.json         the tokenizer of these tokens
files.json             paths of the source's files, one a line
report.json            counts and lengths of the source (see train/data/prepare/report.py)
train-00000.bin ...    token ids, little-endian, `shard_tokens` a file, the last one shorter
train-documents.bin    int64 [num_documents, 4]: token after the document, file, and its place there: first byte and
                       byte after the last (in JSON lines of its line), or row and row after it; of uncompressed text
valid-...              the same for the validation split
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.read.trouble import Skipped

META = "meta.json"
TOKENIZER = "tokenizer.json"
FILES = "files.json"
SPLITS = ("train", "valid")
_FORMAT = "halocline tokens 2"


@dataclass(frozen=True)
class FileSum:
    """Size and SHA-256 of one file of the folder."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Counts of one split; `num_tokens` includes one end-of-document token per document.

    unigram_entropy_nats: entropy of the split's own token frequencies, in nats per token: the loss of the best model
    that ignores context; null for a split without tokens.
    """

    num_documents: int
    num_bytes: int
    num_tokens: int
    unigram_entropy_nats: float | None
    shards: tuple[str, ...]


@dataclass(frozen=True)
class Meta:
    """The contents of `meta.json`. Nothing in it depends on the machine's speed, the time or the number of workers."""

    settings: dict[str, Any]
    source_num_files: int
    source_num_bytes: int
    source_digest: str
    dtype: str
    vocab_size: int
    eod: int
    tokenizer_digest: str
    splits: dict[str, Split]
    skipped: dict[str, Skipped]
    notes: tuple[str, ...]
    report: dict[str, Any]
    files: dict[str, FileSum]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that two folders share exactly when a run would read the same tokens from them."""
        shards = {name: self.files[name].sha256 for split in self.splits.values() for name in split.shards}
        return _digest([self.tokenizer_digest, self.eod, self.dtype, self.settings["shard_tokens"], shards])

    def save(self, folder: Path, name: str = META) -> None:
        """Write `meta.json` aside, flush it, rename it into place."""
        body = dataclasses.asdict(self)
        aside = folder / f"{META}.aside"
        write_flushed(aside, json.dumps({"format": _FORMAT, "sha256": _digest(body), **body}, indent=1).encode())
        aside.replace(folder / name)
        flush_folder(folder)

    @classmethod
    def load(cls, folder: Path, name: str = META) -> Meta:
        """Read `meta.json`. ValueError when there is none (not prepared, or not to the end) or it was changed."""
        path = folder / name
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds no prepared tokens ({META} is missing): run `python -m launch prepare` to the end"
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(body, dict) or body.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is not of the form `{_FORMAT}`: prepare the data again in another folder")
        if body.pop("sha256", None) != _digest(body):
            raise ValueError(f"{path} was changed after it was written: prepare the data again in another folder")
        body["splits"] = {
            name: Split(**{**split, "shards": tuple(split["shards"])}) for name, split in body["splits"].items()
        }
        body["skipped"] = {
            name: Skipped(each["count"], tuple(each["examples"])) for name, each in body["skipped"].items()
        }
        body["files"] = {name: FileSum(**each) for name, each in body["files"].items()}
        body["notes"] = tuple(body["notes"])
        return cls(**body)

    def check_sizes(self, folder: Path) -> None:
        """ValueError, naming the file, when one is missing or of another size: cheap, for every opening."""
        for name, expected in self.files.items():
            try:
                num_bytes = (folder / name).stat().st_size
            except OSError as error:
                raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from None
            if num_bytes != expected.num_bytes:
                raise ValueError(
                    f"{folder / name} has {num_bytes} bytes, not {expected.num_bytes}: it was cut or changed; "
                    f"remove {folder} and prepare it again"
                )

    def check_contents(self, folder: Path) -> None:
        """ValueError, naming the file, when the contents of one are not those that were written."""
        self.check_sizes(folder)
        for name, expected in self.files.items():
            if sha256_of(folder / name) != expected.sha256:
                if name == TOKENIZER:
                    raise ValueError(
                        f"{folder / name} is another tokenizer than the one that these tokens were made with; "
                        f"remove {folder} and prepare it again"
                    )
                raise ValueError(
                    f"{folder / name} does not have the checksum that {META} holds: it was changed; "
                    f"remove {folder} and prepare it again"
                )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces. ValueError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def write_flushed(path: Path, data: bytes) -> FileSum:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileSum(len(data), hashlib.sha256(data).hexdigest())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has the folder's own entries: renames are not durable before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
