"""What lies in a folder of prepared tokens: `meta.json`, written last, so that its presence says that all is whole.

meta.json              counts, settings, checksums
tokenizer.json         the tokenizer of these tokens
files.json             paths of the source's files, one a line
contents.json          SHA-256 of each of them (see train/data/prepare/contents.py, which may leave .stamps.json)
report.json            counts and lengths of the source (see train/data/prepare/report.py)
train-00000.bin ...    token ids, little-endian, `shard_tokens` a file, the last one shorter
train-documents.bin    int64 [num_documents, 4]: token after the document, file, and its place there: first byte and
                       byte after the last (in JSON lines of its line), or row and row after it; of uncompressed text
valid-...              the same for the validation split
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.read.trouble import Skipped
from train.files import (
    SHA256,
    DamagedFileError,
    FileRecord,
    check_contents,
    check_sizes,
    checksum_of,
    replace_durably,
)

META = "meta.json"
TOKENIZER = "tokenizer.json"
FILES = "files.json"
SPLITS = ("train", "valid")
_FORMAT = "halocline tokens 2"


@dataclass(frozen=True)
class Split:
    """Counts of one split; `num_tokens` includes one end-of-document token per document.

    unigram_entropy_nats: entropy of the split's own token frequencies, in nats per token: the loss of the best model
    that ignores context; None for a split without tokens.
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
    files: dict[str, FileRecord]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that two folders share exactly when a run would read the same tokens from them."""
        shards = {name: self.files[name].checksum for split in self.splits.values() for name in split.shards}
        parts = [self.tokenizer_digest, self.eod, self.dtype, self.settings["shard_tokens"], shards]
        return checksum_of(parts, SHA256)

    def save(self, folder: Path, name: str = META) -> None:
        """Write `meta.json`, whole or not at all; the disk has it when this returns."""
        body = dataclasses.asdict(self) | {"files": {name: plain_record(each) for name, each in self.files.items()}}
        text = json.dumps({"format": _FORMAT, "sha256": checksum_of(body, SHA256), **body}, indent=1)
        replace_durably(folder / name, text.encode())

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
        if body.pop("sha256", None) != checksum_of(body, SHA256):
            raise ValueError(f"{path} was changed after it was written: prepare the data again in another folder")
        body["splits"] = {
            name: Split(**{**split, "shards": tuple(split["shards"])}) for name, split in body["splits"].items()
        }
        body["skipped"] = {
            name: Skipped(each["count"], tuple(each["examples"])) for name, each in body["skipped"].items()
        }
        body["files"] = {name: read_record(each) for name, each in body["files"].items()}
        body["notes"] = tuple(body["notes"])
        return cls(**body)

    def check_sizes(self, folder: Path) -> None:
        """ValueError, naming the file, when one is missing or of another size: cheap, for every opening."""
        with _with_remedy(folder):
            check_sizes(folder, self.files)

    def check_contents(self, folder: Path) -> None:
        """ValueError, naming the file, when the contents of one are not those that were written."""
        self.check_sizes(folder)
        with _with_remedy(folder):
            try:
                check_contents(folder, self.files)
            except DamagedFileError as error:
                if error.path.name == TOKENIZER:
                    raise ValueError(
                        f"{error.path} is another tokenizer than the one that these tokens were made with"
                    ) from None
                raise ValueError(f"{error.path} does not have the checksum that {META} holds: it was changed") from None


def is_meta(body: Mapping[str, Any]) -> bool:
    """Whether plain values are those of a `meta.json`, of any version."""
    return str(body.get("format", "")).startswith(_FORMAT.rpartition(" ")[0])


def plain_record(record: FileRecord) -> dict[str, Any]:
    """A file's record as plain values, for a JSON file."""
    return {"num_bytes": record.num_bytes, "sha256": record.checksum}


def read_record(plain: Mapping[str, Any]) -> FileRecord:
    """What `plain_record` was given."""
    return FileRecord(plain["num_bytes"], SHA256, plain["sha256"])


@contextmanager
def _with_remedy(folder: Path) -> Iterator[None]:
    """Say what helps against a damaged file, as one ValueError with what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; remove {folder} and prepare it again") from None
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
