"""The `data` group of a run's configuration."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

# 256 bytes and the token that ends a document: the smallest byte-level vocabulary.
MIN_VOCAB_SIZE = 257
# Before the name of a data set of the `datasets` library.
DATASETS = "datasets:"
FORMATS = ("auto", "text", "jsonl", "parquet")
ON_BAD_DOCUMENT = ("skip", "refuse")


@dataclass(frozen=True)
class DataConfig:
    """Which text is trained on, and how it is cut and stored.

    source: a file, or a folder of files, of plain text, JSON lines or Parquet, compressed or not; a folder that
        `datasets` has saved; `datasets:` and what that library can load; null is the Python standard library's own
        sources.
    dir: where the prepared tokens live; null is `data/<name>-<settings>` in the working directory, so that
        other settings find another place by themselves.
    suffixes: of a folder, only files whose names end so; empty takes every file that holds text.
    format: what every file is; `auto` goes by the endings of their names, and takes the others for plain text.
    text_field: the field of a line's object, or the column of a table, that holds the text.
    dataset_name, dataset_split, dataset_files: of a data set: its configuration, its split, and the files that a
        builder such as `datasets:json` reads.
    on_bad_document: what happens to documents and files that cannot be used, empty ones included: `skip` counts them
        and goes on, `refuse` stops at the first.
    deduplicate: whether of documents with the same text only the first is kept.
    tokenizer: a `tokenizer.json`; null trains byte-level BPE on the source.
    end_of_document: text of the token that ends a document; null finds the tokenizer's own.
    vocab_size: every token id is below it: the size to train, or the most that a given tokenizer may have.
    valid_fraction: share of the documents that validate. A document's own hash decides, so adding documents moves
        none, and equal documents are on the same side.
    max_document_bytes: longer documents are cut at line ends into documents of at most this size.
    shard_tokens: tokens in one shard file.
    num_workers: processes that tokenise; 0 is one per usable core. The result never depends on it.
    """

    source: str | None = None
    dir: str | None = None
    suffixes: tuple[str, ...] = ()
    format: str = "auto"
    text_field: str = "text"
    dataset_name: str | None = None
    dataset_split: str = "train"
    dataset_files: tuple[str, ...] = ()
    on_bad_document: str = "skip"
    deduplicate: bool = False
    tokenizer: str | None = None
    end_of_document: str | None = None
    vocab_size: int = 2048
    valid_fraction: float = 0.05
    max_document_bytes: int = 65536
    shard_tokens: int = 1 << 26
    num_workers: int = 0

    def __post_init__(self) -> None:
        for field in ("suffixes", "dataset_files"):
            value = getattr(self, field)
            if isinstance(value, str):
                raise ValueError(f"data.{field}={value} must be a list, as in [{value}]")
            object.__setattr__(self, field, tuple(value))  # a configuration file gives a list
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming field, value and rule, where this configuration is illegal by itself."""
        for field in ("source", "dir", "tokenizer", "end_of_document", "text_field", "dataset_name", "dataset_split"):
            if getattr(self, field) in ("", DATASETS):
                raise ValueError(f"data.{field}={getattr(self, field)} is empty: name one, or leave it out")
        for field, words in (("format", FORMATS), ("on_bad_document", ON_BAD_DOCUMENT)):
            if getattr(self, field) not in words:
                raise ValueError(f"data.{field}={getattr(self, field)} must be one of {', '.join(words)}")
        for name in self.dataset_files:
            if not isinstance(name, str) or not name:
                raise ValueError(f"data.dataset_files={list(self.dataset_files)} must hold names of files")
        if (self.dataset_files or self.dataset_name) and not (self.source or "").startswith(DATASETS):
            field = "dataset_files" if self.dataset_files else "dataset_name"
            raise ValueError(f"data.{field} belongs to a data.source that begins with {DATASETS}")
        for suffix in self.suffixes:
            if not isinstance(suffix, str) or not suffix:
                raise ValueError(f"data.suffixes={list(self.suffixes)} must hold file name endings such as .txt")
        if not isinstance(self.deduplicate, bool):
            raise ValueError(f"data.deduplicate={self.deduplicate!r} must be true or false")
        _at_least("vocab_size", self.vocab_size, MIN_VOCAB_SIZE, "256 bytes and the end of a document")
        _at_least("max_document_bytes", self.max_document_bytes, 64, "a document has to hold some lines")
        _at_least("shard_tokens", self.shard_tokens, 1, "a shard holds tokens")
        _at_least("num_workers", self.num_workers, 0, "0 is one process per usable core")
        if self.vocab_size > 1 << 32:
            raise ValueError(f"data.vocab_size={self.vocab_size} is above 2**32: ids are stored in 32 bits at most")
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(f"data.valid_fraction={self.valid_fraction} must be at least 0 and below 1")

    @property
    def name(self) -> str:
        """What the source is called in file names."""
        if self.source is None:
            return f"python-{platform.python_version()}"
        return Path(os.path.abspath(self.source.removeprefix(DATASETS))).stem or "root"

    @property
    def folder(self) -> Path:
        """Where the prepared tokens live: `dir`, or the default place of these settings."""
        if self.dir is not None:
            return Path(self.dir)
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()
        return Path("data") / f"{self.name}-{digest[:8]}"

    def settings(self) -> dict[str, object]:
        """All that the prepared tokens depend on, apart from the contents of files: plain values, for a JSON file."""
        return {
            "source": self._place(),
            "suffixes": list(self.suffixes),
            "format": self.format,
            "text_field": self.text_field,
            "dataset_name": self.dataset_name,
            "dataset_split": self.dataset_split,
            "dataset_files": list(self.dataset_files),
            "deduplicate": self.deduplicate,
            "tokenizer": None if self.tokenizer is None else os.path.abspath(self.tokenizer),
            "end_of_document": self.end_of_document,
            "vocab_size": self.vocab_size,
            "valid_fraction": self.valid_fraction,
            "max_document_bytes": self.max_document_bytes,
            "shard_tokens": self.shard_tokens,
        }

    def _place(self) -> str:
        """The source in a form that does not depend on the working directory."""
        if self.source is None:
            return self.name
        if self.source.startswith(DATASETS):
            local = self.source.removeprefix(DATASETS)
            return DATASETS + (os.path.abspath(local) if os.path.exists(local) else local)
        return os.path.abspath(self.source)


def _at_least(field: str, value: int, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"data.{field}={value!r} must be a whole number of at least {least}: {why}")
