"""`data`: which text is trained on, and how it is cut and stored."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.files import SHA256, checksum_of

# 256 bytes and the token that ends a document: the smallest byte-level vocabulary.
MIN_VOCAB_SIZE = 257
# Before the name of a data set of the `datasets` library.
DATASETS = "datasets:"
FORMATS = ("auto", "text", "jsonl", "json", "parquet")
ON_BAD_DOCUMENT = ("skip", "refuse")


# What DeepSeek's tokenizers call the tokens of fill-in-the-middle: begin, hole, end.
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # noqa: RUF001
# Settings of `data` that hold for a blend as a whole.
_SHARED = frozenset(
    {"source", "dir", "blend", "valid_sources", "max_epochs", "document_mask", "tokenizer", "end_of_document"}
    | {"fim_tokens", "vocab_size", "seed", "num_workers"}
)


# Which text, and how it is rearranged: of another text nothing of this holds.
_OF_TEXT = (
    *("source", "suffixes", "format", "text_field", "dataset_name", "dataset_split", "dataset_files", "deduplicate"),
    *("fim_rate", "split_merged_rate"),
)


def _check_item(listed: str, name: str, settings: Mapping[str, Any], fixed: frozenset[str]) -> None:
    """ValueError for an item of a list of sources whose name or settings cannot be. fixed: keys that it cannot set."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"data.{listed} has a source named {name!r}: a name is letters, digits, - and _")
    known = {each.name for each in dataclasses.fields(DataConfig)}
    for key in settings:
        if key not in known or key in fixed:
            why = f"holds for the whole {listed}" if key in known else "is not a key of data"
            raise ValueError(f"data.{listed}: {name} sets {key}={settings[key]}, which {why}")


@dataclass(frozen=True)
class BlendSource:
    """One source of a blend.

    Attributes:
        name: of the source's folder of tokens, and in reports.
        weight: its share of the run's sequences, over the sum of all weights.
        source: as `data.source`.
        settings: other keys of `data` for this source alone, as in `{fim_rate: 0.5}`.
    """

    name: str
    weight: float
    source: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError, naming the source, where it is illegal by itself."""
        _check_item("blend", self.name, self.settings, _SHARED)
        if not 0 < self.weight < math.inf:
            raise ValueError(f"data.blend: weight={self.weight} of {self.name} must be above 0 and finite")


@dataclass(frozen=True)
class ValidSource:
    """One source of text that is only evaluated on.

    Attributes:
        name: in `valid/<source>/loss`.
        source: as `data.source`.
        settings: other keys of `data` for this source, as in `{text_field: body}`. Which files it has, how they are
            read and whether documents are rearranged is not taken from the run's own text.
    """

    name: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError, naming the source, where it is illegal by itself."""
        _check_item("valid_sources", self.name, self.settings, _SHARED | {"valid_fraction"})
        if self.source in ("", DATASETS):
            raise ValueError(f"data.valid_sources: source of {self.name} is empty: name a file, a folder or a data set")


@dataclass(frozen=True)
class DataConfig:
    """`data`: which text is trained on, and how it is cut and stored.

    Attributes:
        source: file or folder of text, or `datasets:NAME`; None is the Python standard library's sources. A file is
            plain text, JSON lines or Parquet, compressed or not; a folder may also be one that `datasets` has saved;
            NAME is whatever that library loads (docs/data.md).
        dir: where prepared tokens live; None is `data/<name>-<digest of the settings>`, so that other settings find
            another place by themselves.
        suffixes: of a folder, only files whose names end so, as in `'data.suffixes=[.md,.txt]'`; `[]` takes every file
            that holds text.
        format: what every file is: `auto` (by its first bytes, whatever it is called), `text`, `jsonl`, `json`,
            `parquet`. JSON lines have one object a line; `json` is one document, several, or an array of them.
            `prepare` reports what was taken for what.
        text_field: field of a line's object or column of a table that holds the text.
        dataset_name: of `datasets:NAME`: the data set's configuration.
        dataset_split: of a data set: its split.
        dataset_files: files for a builder, as in `data.source=datasets:json 'data.dataset_files=[a.json]'`.
        on_bad_document: documents and files that cannot be used, empty ones included: `skip` (and count) or `refuse`
            (stop at the first).
        deduplicate: of documents with the same text only the first is kept.
        tokenizer: a `tokenizer.json`; None trains byte-level BPE on the source.
        end_of_document: text of the token that ends a document; None finds the tokenizer's own.
        vocab_size: size to train, or the most a given tokenizer may have; `model.vocab_size` unless set.
        valid_fraction: share of documents that validate, chosen by each document's hash. So adding documents moves
            none, and equal documents are on the same side. It may be 0 where `data.valid_sources` are given.
        valid_sources: text that is only evaluated on, as in `[{name: web, source: web.txt}]`, and reported as
            `valid/<name>/loss`. It is prepared whole, with the run's tokenizer.
        max_document_bytes: longer documents are cut at line ends.
        shard_tokens: tokens of one shard file.
        num_workers: processes that tokenise; 0 is one per usable core; the result does not depend on it.
        blend: several sources instead of `data.source`, blended by weight; all have one tokenizer (docs/data.md).
        max_epochs: a run that would see a source more often is refused before it starts.
        document_mask: the documents of a row see nothing of each other: attention, positions and targets end at their
            borders.
        fim_rate: share of the documents rearranged as prefix, suffix, middle before packing; 0.1 in DeepSeek-V3.
        fim_tokens: names of the three tokens: begin, hole, end; a trained tokenizer gets them where the rate is above
            0.
        split_merged_rate: share of the tokens that join punctuation and line ends which are split into both parts.
        seed: draws what the two rates choose, together with each document's contents.
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
    blend: tuple[BlendSource, ...] = ()
    valid_sources: tuple[ValidSource, ...] = ()
    max_epochs: float | None = None
    document_mask: bool = False
    fim_rate: float = 0.0
    fim_tokens: tuple[str, ...] = FIM_TOKENS
    split_merged_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("suffixes", "dataset_files", "blend", "valid_sources", "fim_tokens"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise ValueError(f"data.{key}={value} must be a list, as in [{value}]")
            object.__setattr__(self, key, tuple(value))  # a configuration file gives a list
        self.check()

    def check(self) -> None:
        """Raise ValueError, naming field, value and rule, where this configuration is illegal by itself."""
        for key in ("source", "dir", "tokenizer", "end_of_document", "text_field", "dataset_name", "dataset_split"):
            if getattr(self, key) in ("", DATASETS):
                raise ValueError(f"data.{key}={getattr(self, key)} is empty: name one, or leave it out")
        for key, words in (("format", FORMATS), ("on_bad_document", ON_BAD_DOCUMENT)):
            if getattr(self, key) not in words:
                raise ValueError(f"data.{key}={getattr(self, key)} must be one of {', '.join(words)}")
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
        if not 0.0 <= self.valid_fraction <= 1.0:
            raise ValueError(f"data.valid_fraction={self.valid_fraction} is a share: it must lie in 0..1")
        self._check_rows()
        self._check_blend()
        self._check_valid_sources()

    def _check_rows(self) -> None:
        for key in ("fim_rate", "split_merged_rate"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"data.{key}={getattr(self, key)} is a share: it must lie in 0..1")
        if len(self.fim_tokens) != 3 or len(set(self.fim_tokens)) != 3 or not all(self.fim_tokens):
            raise ValueError(
                f"data.fim_tokens={list(self.fim_tokens)} must be three different tokens: begin, hole, end"
            )
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ValueError(f"data.max_epochs={self.max_epochs} must be above 0, or null for any number")

    def _check_blend(self) -> None:
        for each in self.blend:
            each.check()
        names = [each.name for each in self.blend]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"data.blend has {twice[0]} twice: name each source once")
        if self.blend and self.source is not None:
            raise ValueError(f"data.source={self.source} and data.blend are both set: a run reads one or the other")
        for each in self.blend:
            try:
                self._source(each)
            except (TypeError, ValueError) as error:
                raise ValueError(f"data.blend: {each.name}: {error}") from None

    def _check_valid_sources(self) -> None:
        names = [each.name for each in self.blend]
        for each in self.valid_sources:
            each.check()
            if each.name in names:
                raise ValueError(f"data.valid_sources: {each.name} is the name of another source: name each once")
            names.append(each.name)
            try:
                self._valid_source(each)
            except (TypeError, ValueError) as error:
                raise ValueError(f"data.valid_sources: {each.name}: {error}") from None

    @property
    def name(self) -> str:
        """What the source is called in file names."""
        if self.blend:
            return "-".join(each.name for each in self.blend)
        if self.source is None:
            return f"python-{platform.python_version()}"
        return Path(os.path.abspath(self.source.removeprefix(DATASETS))).stem or "root"

    @property
    def folder(self) -> Path:
        """Where the prepared tokens live: `dir`, or the default place of these settings."""
        if self.dir is not None:
            return Path(self.dir)
        digest = checksum_of(self.settings(), SHA256)
        return Path("data") / f"{self.name}-{digest[:8]}"

    @property
    def sources(self) -> Mapping[str, DataConfig]:
        """What is prepared by itself, by name: the one source, or each of a blend in the blend's folder."""
        if not self.blend:
            return {self.name: self}
        return {each.name: self._source(each) for each in self.blend}

    def _source(self, each: BlendSource) -> DataConfig:
        tokenizer, folder = self.tokenizer or str(self.folder / "tokenizer.json"), str(self.folder / each.name)
        own = {**each.settings, "source": each.source, "tokenizer": tokenizer, "dir": folder}
        return dataclasses.replace(self, **own, blend=(), valid_sources=())

    @property
    def evaluated(self) -> Mapping[str, DataConfig]:
        """What `valid_sources` prepares, by name: whole, as validation data, in a folder beside that of the tokens."""
        return {each.name: self._valid_source(each) for each in self.valid_sources}

    def _valid_source(self, each: ValidSource) -> DataConfig:
        """In a folder of its settings' digest, so that another text of the same name finds another place."""
        other = self.for_other_text(self.tokenizer or str(self.folder / "tokenizer.json"))
        whole = dataclasses.replace(other, **{**each.settings, "source": each.source}, valid_fraction=1.0)
        return dataclasses.replace(whole, dir=f"{self.folder}-valid/{each.name}-{whole.folder.name[-8:]}")

    def for_other_text(self, tokenizer: str) -> DataConfig:
        """For another text in the same tokens, in its default folder. Which one is still to be said."""
        fresh: dict[str, Any] = {each.name: each.default for each in dataclasses.fields(self) if each.name in _OF_TEXT}
        return dataclasses.replace(self, **fresh, tokenizer=tokenizer, dir=None, blend=(), valid_sources=())

    @property
    def validating(self) -> Mapping[str, DataConfig]:
        """Those of `sources` that leave a share of their documents to validation."""
        return {name: source for name, source in self.sources.items() if source.valid_fraction > 0}

    @property
    def valid_names(self) -> tuple[str, ...]:
        """The sources that have a validation loss of their own: those of a blend, and `valid_sources`."""
        return (*(self.validating if self.blend else ()), *(each.name for each in self.valid_sources))

    def settings(self) -> dict[str, object]:
        """All that the prepared tokens depend on, apart from the contents of files: plain values, for a JSON file."""
        return {
            "source": self.name if self.source is None else _place(self.source),
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
            "fim_rate": self.fim_rate,
            "fim_tokens": list(self.fim_tokens),
            "split_merged_rate": self.split_merged_rate,
            "seed": self.seed,
            **self._blend_settings(),
        }

    def _blend_settings(self) -> dict[str, object]:
        """Weights count only where the tokenizer is trained by them: prepared sources can be weighed anew."""
        if not self.blend:
            return {}
        blend = {each.name: [each.source and _place(each.source), each.settings] for each in self.blend}
        weights = None if self.tokenizer else {each.name: each.weight for each in self.blend}
        return {"blend": blend, "weights": weights}


def _place(source: str) -> str:
    """A source in a form that does not depend on the working directory."""
    if source.startswith(DATASETS):
        local = source.removeprefix(DATASETS)
        return DATASETS + (os.path.abspath(local) if os.path.exists(local) else local)
    return os.path.abspath(source)


def _at_least(field: str, value: int, least: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"data.{field}={value!r} must be a whole number of at least {least}: {why}")
