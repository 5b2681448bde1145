"""Text to token shards: in parallel, the same bytes whatever the number of workers, whole or not there at all.

Everything is written in `<folder>/partial`, read back, and moved into place; `meta.json` comes last. A call that is
killed leaves a folder without it, which nothing takes for prepared data; the next call starts again. A folder that is
whole is checked and left alone, and refused where its settings or its source's files are not those that were asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from train.data.config import DataConfig
from train.data.encode import Task, document_hash, read_text
from train.data.encoder import Variations, fim_ids
from train.data.meta import FILES, META, SPLITS, TOKENIZER, FileSum, Meta, Skipped, Split, flush_folder, write_flushed
from train.data.progress import Progress
from train.data.source import Piece, Source, cut, open_source
from train.data.tokenizer import Tokenizer
from train.data.workers import encode_in_order
from train.data.writer import Writer

_PARTIAL, _LOCK = "partial", ".lock"
# Text that the tokenizer is trained on: more takes longer and hardly shortens the result (3.19 bytes per token
# from 4 MB or all 12 MB of the standard library, 2048 tokens).
SAMPLE_BYTES = 6 << 20
_TASK_BYTES = 1 << 20  # work handed to a worker at a time
_NUM_EXAMPLES = 10  # of each kind of trouble, in the report

Trouble = dict[str, list[str]]  # kind -> documents, in words


def prepare(config: DataConfig, say: Callable[[str], None] = print) -> Meta:
    """Prepare the tokens of `config` in `config.folder` unless they are there; return what lies there.

    say: is given progress and what was done, in sentences.
    Raises ValueError when the source is missing, unreadable or without text, when the folder holds something else or
    has been changed, and when it cannot be written or a worker dies.
    """
    folder = config.folder
    if (folder / META).exists():
        return _check_prepared(config, folder, say)
    source = open_source(config)
    tokenizer = given_tokenizer(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(folder)
        with _alone_in(folder, say):
            if (folder / META).exists():  # by the process that this one has waited for
                return _check_prepared(config, folder, say)
            _clear(folder)
            return _prepare(config, source, tokenizer, folder, say)
    except OSError as error:
        raise ValueError(f"data.dir={folder} could not be prepared: {error}") from None


def _prepare(
    config: DataConfig, source: Source, tokenizer: Tokenizer | None, folder: Path, say: Callable[[str], None]
) -> Meta:
    say(f"preparing {source.root}: {len(source.files)} files, {source.num_bytes / 1e6:.1f} MB, into {folder}")
    partial = folder / _PARTIAL
    partial.mkdir()
    trouble: Trouble = {kind: [] for kind in ("empty", "undecodable", "unreadable", "cut")}
    trouble["unreadable"] += source.unreadable
    pieces = _plan(source, config.max_document_bytes, trouble)
    if tokenizer is None:
        special = config.fim_tokens if config.fim_rate else ()
        sample = _sample(source, pieces, _threshold(config), SAMPLE_BYTES)
        tokenizer = Tokenizer.train(sample, config.vocab_size, special)
        say(f"trained a tokenizer: byte-level BPE with {tokenizer.vocab_size} tokens")
    tokenizer.save(partial / TOKENIZER)
    tasks = _tasks(source, pieces, tokenizer, partial, "<u2" if config.vocab_size <= 1 << 16 else "<u4", _variations(config))
    written, notes = _write(config, source, tasks, partial, say)
    for why, file, start in written.skipped:
        name = source.files[file].name
        trouble[why].append(name if start == 0 else f"{name} (from byte {start})")
    names = ",\n".join(json.dumps(file.name) for file in source.files)
    files = {
        **written.files,
        TOKENIZER: FileSum((partial / TOKENIZER).stat().st_size, tokenizer.digest),
        FILES: write_flushed(partial / FILES, f"[\n{names}\n]\n".encode()),
    }
    meta = Meta(
        settings=config.settings(),
        source_num_files=len(source.files),
        source_num_bytes=source.num_bytes,
        source_digest=source.digest(),
        dtype=tasks[0].dtype,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        tokenizer_digest=tokenizer.digest,
        splits=written.splits,
        skipped={kind: Skipped(len(each), tuple(each[:_NUM_EXAMPLES])) for kind, each in trouble.items()},
        notes=notes,
        files=dict(sorted(files.items())),
    )
    _publish(meta, partial, folder)
    return meta


def _publish(meta: Meta, partial: Path, folder: Path) -> None:
    """Move the finished files into place, and only when the disk has them there say so in `meta.json`."""
    for name in meta.files:
        (partial / name).replace(folder / name)
    partial.rmdir()
    flush_folder(folder)
    meta.save(folder)


def _plan(source: Source, max_document_bytes: int, trouble: Trouble) -> list[Piece]:
    """The documents of all files, in order; what is empty, unreadable or too long is noted."""
    pieces: list[Piece] = []
    for index, file in enumerate(source.files):
        if not file.num_bytes:
            trouble["empty"].append(file.name)
            continue
        try:
            found = cut(source, index, max_document_bytes)
        except OSError:
            trouble["unreadable"].append(file.name)
            continue
        if len(found) > 1:
            trouble["cut"].append(f"{file.name} ({file.num_bytes} bytes, into {len(found)} documents)")
        pieces += found
    return pieces


def sample_text(config: DataConfig, num_bytes: int) -> Iterator[str]:
    """About so many bytes of a source's training documents, the same ones every time."""
    source = open_source(config)
    trouble: Trouble = {kind: [] for kind in ("empty", "unreadable", "cut")}
    return _sample(source, _plan(source, config.max_document_bytes, trouble), _threshold(config), num_bytes)


def _sample(source: Source, pieces: list[Piece], threshold: int, num_bytes: int) -> Iterator[str]:
    """Text for the tokenizer: training documents in the order of their places' hashes, until there is enough."""

    def place(piece: Piece) -> bytes:
        name = os.fsencode(source.files[piece.file].name)
        return hashlib.blake2b(b"%s\0%d" % (name, piece.start), digest_size=8).digest()

    left = num_bytes
    for piece in sorted(pieces, key=place):
        if left <= 0:
            return
        try:
            text, data = read_text(str(source.path(piece.file)), piece.start, piece.stop)
        except ValueError:
            continue
        if document_hash(data) >= threshold:
            left -= len(data)
            yield text


def _tasks(
    source: Source, pieces: list[Piece], tokenizer: Tokenizer, partial: Path, dtype: str, variations: Variations
) -> list[Task]:
    """Pieces in groups of about `_TASK_BYTES`."""
    groups: list[list[Piece]] = [[]]
    room = _TASK_BYTES
    for piece in pieces:
        if room <= 0:
            groups.append([])
            room = _TASK_BYTES
        groups[-1].append(piece)
        room -= piece.stop - piece.start
    path = str(partial / TOKENIZER)
    return [
        Task(
            path,
            tokenizer.digest,
            tokenizer.end_of_document,
            dtype,
            variations,
            tuple(group),
            tuple(str(source.path(piece.file)) for piece in group),
        )
        for group in groups
    ]


class _Written(NamedTuple):
    """What one round of encoding has written, and the pieces that it passed over."""

    splits: dict[str, Split]
    files: dict[str, FileSum]
    skipped: list[tuple[str, int, int]]
    least_hash: int
    largest_hash: int


def _write(
    config: DataConfig, source: Source, tasks: list[Task], partial: Path, say: Callable[[str], None]
) -> tuple[_Written, tuple[str, ...]]:
    """Encode and write; when the hashes leave one split without a document, move the nearest one over and repeat."""
    written = _write_once(config, source, tasks, partial, _threshold(config), say)
    num_documents = sum(split.num_documents for split in written.splits.values())
    if not num_documents:
        raise ValueError(f"data.source={source.root} holds no text: {_in_words(written.skipped)}")
    bare = [name for name in SPLITS if not written.splits[name].num_documents]
    if not bare or not config.valid_fraction:
        return written, ()
    if written.least_hash == written.largest_hash:
        raise ValueError(
            f"data.source={source.root} holds one document ({num_documents} times), and data.valid_fraction="
            f"{config.valid_fraction} asks for two splits: add text, lower data.max_document_bytes="
            f"{config.max_document_bytes} so that it is cut, or set data.valid_fraction=0"
        )
    for path in partial.glob("*.bin"):
        path.unlink()
    nearest = written.least_hash + 1 if bare == ["valid"] else written.largest_hash
    note = (
        f"data.valid_fraction={config.valid_fraction} left no document to {bare[0]} among {num_documents}: "
        "the one with the nearest hash was moved there"
    )
    return _write_once(config, source, tasks, partial, nearest, say), (note,)


def _write_once(
    config: DataConfig, source: Source, tasks: list[Task], partial: Path, threshold: int, say: Callable[[str], None]
) -> _Written:
    """Encode all tasks; documents with hashes below `threshold` validate."""
    writer = Writer(partial, tasks[0].dtype, config.shard_tokens, threshold)
    skipped: list[tuple[str, int, int]] = []
    with Progress("tokenising", source.num_bytes, say) as progress:
        for encoded in encode_in_order(tasks, _num_workers(config, source)):
            writer.add(encoded)
            skipped += encoded.skipped
            progress.add(encoded.num_bytes)
    splits, files = writer.close()
    return _Written(splits, files, skipped, writer.least_hash, writer.largest_hash)


def _variations(config: DataConfig) -> Variations:
    return Variations(config.fim_rate, config.fim_tokens, config.split_merged_rate, config.seed)


def _threshold(config: DataConfig) -> int:
    """Documents whose hash is below it validate."""
    return int(config.valid_fraction * 2.0**64)


def _in_words(skipped: list[tuple[str, int, int]]) -> str:
    """What became of all pieces when none became a document."""
    counts = {why: sum(each[0] == why for each in skipped) for why in ("empty", "undecodable", "unreadable")}
    found = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    return f"its documents are {found} (text is UTF-8)" if found else "its files are empty or could not be read"


def _num_workers(config: DataConfig, source: Source) -> int:
    """As configured; by default no more than cores, and one per few megabytes: starting one costs half a second."""
    if config.num_workers:
        return config.num_workers
    return max(1, min(len(os.sched_getaffinity(0)), source.num_bytes // (2 << 20)))


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of `data.tokenizer`; null when one is to be trained. ValueError when it cannot be used."""
    if config.tokenizer is None:
        if config.end_of_document is not None:
            raise ValueError(
                f"data.end_of_document={config.end_of_document} names a token of a given tokenizer, "
                "and data.tokenizer is null"
            )
        return None
    tokenizer = Tokenizer.load(config.tokenizer, config.end_of_document)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"data.vocab_size={config.vocab_size} is below the {tokenizer.vocab_size} tokens "
            f"of data.tokenizer={config.tokenizer}"
        )
    if config.fim_rate:
        fim_ids(tokenizer, config.fim_tokens)
    return tokenizer


def _check_prepared(config: DataConfig, folder: Path, say: Callable[[str], None]) -> Meta:
    """Prepared data that is there already: whole, unchanged, and what `config` asks for. ValueError otherwise."""
    meta = Meta.load(folder)
    remedy = f"name another data.dir, or remove {folder} to prepare it again"
    for key, asked in config.settings().items():
        if meta.settings.get(key) != asked:
            raise ValueError(f"{folder} was prepared with data.{key}={meta.settings.get(key)}, not {asked}: {remedy}")
    if config.tokenizer is not None:
        tokenizer = given_tokenizer(config)
        if tokenizer is not None and tokenizer.digest != meta.tokenizer_digest:
            raise ValueError(f"{folder} was prepared with another text of data.tokenizer={config.tokenizer}: {remedy}")
    meta.check_contents(folder)
    if config.source is not None and not Path(config.source).exists():
        say(f"{folder} is prepared and whole; its source {config.source} is no longer there, the tokens are used")
        return meta
    source = open_source(config)
    if source.digest() != meta.source_digest:
        raise ValueError(
            f"{folder} was prepared from {meta.source_num_files} files with {meta.source_num_bytes} bytes, and "
            f"{source.root} now holds {len(source.files)} with {source.num_bytes}: its names or sizes changed; {remedy}"
        )
    say(f"{folder} is prepared already and whole: nothing to do")
    return meta


@contextmanager
def _alone_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock, waiting for another process that prepares there; a killed holder frees it."""
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing {folder}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _refuse_strangers(folder: Path) -> None:
    """ValueError when the folder holds anything that no call of `prepare` has left."""
    ours = {_PARTIAL, _LOCK, TOKENIZER, FILES, META, f"{META}.aside"}
    for path in sorted(folder.iterdir()):
        shard = path.suffix == ".bin" and path.name.startswith(tuple(f"{split}-" for split in SPLITS))
        if path.name not in ours and not shard:
            raise ValueError(f"data.dir={folder} holds {path.name}, which is no prepared data: name an empty folder")


def _clear(folder: Path) -> None:
    """Remove what a killed call has left."""
    for path in folder.iterdir():
        if path.name == _PARTIAL:
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
