"""Text to token shards: in parallel, the same bytes whatever the number of workers, whole or not there at all.

One process reads the source in order, workers parse and encode, and their results are written in order. Everything is
written in `<folder>/partial`, read back, and moved into place; `meta.json` comes last. A call that is killed leaves a
folder without it, which nothing takes for prepared data; the next call goes on where the journal says that the killed
one was. A folder that is whole is checked and left alone, and refused where its settings or its source's files are not
those that were asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from train.data.config import DataConfig
from train.data.meta import FILES, META, SPLITS, TOKENIZER, Meta, Split
from train.data.prepare import journal
from train.data.prepare.contents import CONTENTS, write_contents, write_stamps
from train.data.prepare.encode import Encoding, Task
from train.data.prepare.encoder import Variations
from train.data.prepare.folder import PARTIAL, READY, alone_in, check_prepared, clear, given_tokenizer, refuse_strangers
from train.data.prepare.journal import Progressed
from train.data.prepare.progress import Progress
from train.data.prepare.report import REPORT, read_as, report_of
from train.data.prepare.sample import SAMPLE_BYTES, sample
from train.data.prepare.workers import encode_in_order
from train.data.prepare.writer import HASHES, Writer
from train.data.read.blocks import Block, Position, Trouble
from train.data.read.source import Source, digest_of, num_bytes_of, open_source, walk
from train.data.read.trouble import BAD, Troubles
from train.data.tokenizer import Tokenizer
from train.files import SHA256, FileRecord, checksum_of, in_words, sync, write_durably

_TASK_BYTES = 1 << 20  # work handed to a worker at a time
_JOURNAL_EVERY_S = 5.0  # what a kill can cost


def prepare(config: DataConfig, say: Callable[[str], None] = print) -> Meta:
    """Prepare the tokens of `config` in `config.folder` unless they are there; return what lies there.

    say: is given progress and what was done, in sentences.
    Raises ValueError when the source is missing, unreadable or without text, when it holds what
    `data.on_bad_document` refuses, when the folder holds something else or has been changed, and when it cannot be
    written or a worker dies.
    """
    folder = config.folder
    if (folder / META).exists():
        return check_prepared(config, folder, say)
    listed_ns = time.time_ns()
    source = open_source(config)
    tokenizer = given_tokenizer(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_strangers(folder)
        with alone_in(folder, say):
            if (folder / META).exists():  # by the process that this one has waited for
                return check_prepared(config, folder, say)
            return _Preparation(config, source, tokenizer, folder, say, listed_ns).run()
    except OSError as error:
        raise ValueError(f"data.dir={folder} could not be prepared: {in_words(error)}") from None


class _Preparation:
    """One call's work on a folder that it holds alone."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenizer: Tokenizer | None,
        folder: Path,
        say: Callable[[str], None],
        listed_ns: int,
    ) -> None:
        self._config, self._source, self._folder, self._say = config, source, folder, say
        self._given, self._partial = tokenizer, folder / PARTIAL
        self._listed_ns = listed_ns
        self._dtype = "<u2" if config.vocab_size <= 1 << 16 else "<u4"
        parts = [config.settings(), digest_of(source, times=True), tokenizer.digest if tokenizer else None]
        self._identity = checksum_of(parts, SHA256)

    def run(self) -> Meta:
        """Start, or go on, and finish."""
        meta = self._described()
        if meta is None:
            since, tokenizer, writer = self._since() or self._start()
            written = self._write(since, tokenizer, writer)
            meta = self._describe(*written, tokenizer)
        return self._publish(meta)

    def _start(self) -> tuple[Progressed, Tokenizer, Writer]:
        """An empty folder with a tokenizer."""
        clear(self._folder)
        self._partial.mkdir()
        source, threshold = self._source, _threshold(self._config)
        size = f"{len(source.files)} files, {num_bytes_of(source) / 1e6:.1f} MB"
        self._say(f"preparing {source.said.removeprefix('data.source=')}: {size}, into {self._folder}")
        if source.left_out:
            more = f" and {len(source.left_out) - 3} more" if len(source.left_out) > 3 else ""
            named = ", ".join(source.left_out[:3])
            self._say(f"left out of it, as runs and preparations wrote them: {named}{more}")
        troubles = self._troubles(None)
        troubles.add_unlisted(source.unreadable)
        tokenizer = self._given
        if tokenizer is None:
            tokenizer = self._train(threshold)
        tokenizer.save(self._partial / TOKENIZER)
        since = Progressed(self._identity, threshold, (), Position(), 0, troubles.skipped(), None, {})
        journal.save(since, self._partial)
        return since, tokenizer, self._writer(since)

    def _train(self, threshold: int) -> Tokenizer:
        config = self._config
        special = config.fim_tokens if config.fim_rate else ()
        text = sample(self._source, config, threshold, SAMPLE_BYTES)
        tokenizer = Tokenizer.train(text, config.vocab_size, special)
        self._say(f"trained a tokenizer: byte-level BPE with {tokenizer.vocab_size} tokens")
        return tokenizer

    def _since(self) -> tuple[Progressed, Tokenizer, Writer] | None:
        """Where a killed call has stopped; None when there is nothing to go on from."""
        since = journal.load(self._partial, self._identity)
        if since is None or (self._config.on_bad_document == "refuse" and self._troubles(since).num_bad):
            return None
        clear(self._folder, keep=PARTIAL)
        try:
            tokenizer = Tokenizer.load(self._partial / TOKENIZER, self._config.end_of_document)
            writer = self._writer(since)
        except (OSError, ValueError) as error:
            self._say(f"what an earlier call has left in {self._partial} cannot be used: {error}; starting again")
            return None
        total = num_bytes_of(self._source)
        self._say(f"going on in {self._folder}, after {since.disk_bytes / 1e6:.1f} of {total / 1e6:.1f} MB")
        return since, tokenizer, writer

    def _writer(self, since: Progressed) -> Writer:
        return Writer(
            self._partial, self._dtype, self._config.shard_tokens, since.threshold, self._config.deduplicate,
            since.writer, since.counts,
        )  # fmt: skip

    def _troubles(self, since: Progressed | None) -> Troubles:
        files = self._source.files
        troubles = Troubles(lambda file: files[file].name, self._config.on_bad_document == "refuse")
        if since is not None:
            troubles.restore(since.troubles)
        return troubles

    def _write(
        self, since: Progressed, tokenizer: Tokenizer, writer: Writer
    ) -> tuple[Progressed, dict[str, Split], dict[str, FileRecord]]:
        """Encode and write. When the hashes leave a split without a document, move the nearest one over and repeat."""
        config, said = self._config, self._source.said
        while True:
            since = self._encode(since, tokenizer, writer)
            splits, files = writer.close()
            num_documents = sum(split.num_documents for split in splits.values())
            if not num_documents:
                raise ValueError(f"{said} holds no text: {_in_words(self._troubles(since), config)}")
            bare = [name for name in SPLITS if not splits[name].num_documents]
            if not bare or config.valid_fraction in (0, 1):
                return since, splits, files
            if writer.least_hash == writer.largest_hash:
                raise ValueError(
                    f"{said} holds one document ({num_documents} times), and data.valid_fraction="
                    f"{config.valid_fraction} asks for two splits: add text, or cut it into several documents with "
                    f"data.max_document_bytes={_cut_size(splits, num_documents)}"
                )
            note = (
                f"data.valid_fraction={config.valid_fraction} left no document to {bare[0]} among {num_documents}: "
                "the one with the nearest hash was moved there"
            )
            nearest = writer.least_hash + 1 if bare == ["valid"] else writer.largest_hash
            unlisted = self._troubles(None)
            unlisted.add_unlisted(self._source.unreadable)
            since = Progressed(self._identity, nearest, (note,), Position(), 0, unlisted.skipped(), None, {})
            journal.save(since, self._partial)
            for path in self._partial.glob("*.bin"):
                path.unlink()
            writer = self._writer(since)

    def _encode(self, since: Progressed, tokenizer: Tokenizer, writer: Writer) -> Progressed:
        """Encode and write all that lies behind `since`, and keep the journal."""
        troubles, config = self._troubles(since), self._config
        encoding = Encoding(
            str(self._partial / TOKENIZER), tokenizer.digest, tokenizer.end_of_document, self._dtype,
            Variations(config.fim_rate, config.fim_tokens, config.split_merged_rate, config.seed),
            config.text_field, config.max_document_bytes,
        )  # fmt: skip
        total, saved_s = num_bytes_of(self._source), time.monotonic()
        tasks = _tasks(walk(self._source, since.position), encoding)
        with Progress("tokenising", total, self._say, since.disk_bytes) as progress:
            for encoded in encode_in_order(tasks, _num_workers(config, total)):
                duplicates = writer.add(encoded)
                troubles.add(encoded.troubles)
                troubles.add(map(_duplicate, duplicates))
                progress.add(encoded.disk_bytes)
                since = since._replace(position=encoded.next, disk_bytes=since.disk_bytes + encoded.disk_bytes)
                if time.monotonic() - saved_s >= _JOURNAL_EVERY_S:
                    since = self._save(since, troubles, writer)
                    saved_s = time.monotonic()
        return self._save(since, troubles, writer)

    def _save(self, since: Progressed, troubles: Troubles, writer: Writer) -> Progressed:
        since = since._replace(troubles=troubles.skipped(), writer=writer.state(), counts=writer.counts())
        journal.save(since, self._partial)
        return since

    def _describe(
        self, end: Progressed, splits: dict[str, Split], files: dict[str, FileRecord], tokenizer: Tokenizer
    ) -> Meta:
        """Write what goes beside the tokens, and say so where the next call finds it."""
        source, partial = self._source, self._partial
        report = report_of(partial, len(source.files), splits, end.troubles) | {"read_as": read_as(source)}
        names = ",\n".join(json.dumps(file.name) for file in source.files)
        files = {
            **files,
            TOKENIZER: FileRecord((partial / TOKENIZER).stat().st_size, SHA256, tokenizer.digest),
            CONTENTS: write_contents(partial, source),
            FILES: write_durably(partial / FILES, f"[\n{names}\n]\n".encode(), SHA256),
            REPORT: write_durably(partial / REPORT, (json.dumps(report, indent=1) + "\n").encode(), SHA256),
        }
        meta = Meta(
            settings=self._config.settings(),
            source_num_files=len(source.files),
            source_num_bytes=num_bytes_of(source),
            source_digest=digest_of(source),
            dtype=self._dtype,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            tokenizer_digest=tokenizer.digest,
            splits=splits,
            skipped=end.troubles,
            notes=end.notes,
            report=report,
            files=dict(sorted(files.items())),
        )
        meta.save(self._folder, READY)
        return meta

    def _described(self) -> Meta | None:
        """What a call has left that was killed while it moved its files into place; None when there is none."""
        try:
            meta = Meta.load(self._folder, READY)
        except ValueError:
            return None
        same = meta.settings == self._config.settings() and meta.source_digest == digest_of(self._source)
        refused = self._config.on_bad_document == "refuse" and any(meta.skipped[reason].count for reason in BAD)
        same &= self._given is None or self._given.digest == meta.tokenizer_digest
        return meta if same and not refused else None

    def _publish(self, meta: Meta) -> Meta:
        """Move the finished files into place, and only when the disk has them there say so in `meta.json`."""
        for name in meta.files:
            if (self._partial / name).exists():
                (self._partial / name).replace(self._folder / name)
        meta.check_sizes(self._folder)
        if self._partial.exists():
            for name in (HASHES, journal.JOURNAL):
                (self._partial / name).unlink(missing_ok=True)
            shutil.rmtree(self._partial)
        sync(self._folder)
        write_stamps(self._folder, self._source, self._listed_ns)
        (self._folder / READY).replace(self._folder / META)
        sync(self._folder)
        return meta


def _tasks(blocks: Iterator[Block], encoding: Encoding) -> Iterator[Task]:
    """Blocks in groups of about `_TASK_BYTES`."""
    group: list[Block] = []
    weight = 0
    for block in blocks:
        group.append(block)
        weight += block.weight
        if weight >= _TASK_BYTES:
            yield Task(encoding, tuple(group))
            group, weight = [], 0
    if group:
        yield Task(encoding, tuple(group))


def sample_text(config: DataConfig, num_bytes: int) -> Iterator[str]:
    """About so many bytes of a source's training documents, the same ones every time."""
    return sample(open_source(config), config, _threshold(config), num_bytes)


def _duplicate(place: np.ndarray) -> Trouble:
    file, start, _ = (int(value) for value in place)
    return Trouble("duplicate", file, f"at {start}" if start else "")


def _cut_size(splits: Mapping[str, Split], num_documents: int) -> int:
    """A limit that cuts the one document that there is into about twenty, as many as leave some to validation."""
    return max(64, sum(split.num_bytes for split in splits.values()) // num_documents // 20)


def _threshold(config: DataConfig) -> int:
    """Documents whose hash is below it validate."""
    return int(config.valid_fraction * 2.0**64)


def _in_words(troubles: Troubles, config: DataConfig) -> str:
    """What became of all documents when none was one."""
    found = troubles.found()
    if not found:
        return "its files hold no documents"
    other = any(troubles.skipped()[reason].count for reason in ("missing", "wrong_type", "ambiguous"))
    remedy = f"; data.text_field names the field or column of the text, and is {config.text_field}" if other else ""
    return f"its documents are {found}{remedy}"


def _num_workers(config: DataConfig, num_bytes: int) -> int:
    """As configured; by default no more than cores, and one per few megabytes: starting one costs half a second."""
    if config.num_workers:
        return config.num_workers
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // (2 << 20)))
