"""Where text comes from: the files of a source, and the walk through their documents.

A folder may hold plain text, JSON lines, Parquet and compressed files side by side. They are read in the order of their
paths, each from its beginning to its end, by one process; what they hold is parsed and tokenised by many.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from train.data.config import DATASETS, DataConfig
from train.data.read.blocks import (
    JSON,
    LINES,
    ROWS,
    TEXT,
    Block,
    DamagedError,
    Position,
    Trouble,
    line_blocks,
    text_blocks,
)
from train.data.read.forms import form_of
from train.data.read.hub import DatasetRows, is_saved, load
from train.data.read.json_documents import json_blocks
from train.data.read.ours import is_ours
from train.data.read.streams import FileStream, stamp
from train.files import SHA256, record_of

# Folders of the standard library's place that are not the library, or that not every machine has.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class SourceFile(NamedTuple):
    """One file of a source: its path relative to the source's root, with `/`, its size, and its last change."""

    name: str
    num_bytes: int
    changed_ns: int = 0


class Source(Protocol):
    """Documents in a fixed order, in blocks that can be read again from any position."""

    @property
    def said(self) -> str:
        """What it is called in messages."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """In the order in which they are read."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Folders and files that could not even be listed."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Folders that runs and preparations have written, which are no text."""

    def digest(self, file: int) -> str:
        """SHA-256 of the contents of the file with this index; empty for one that is not as it was listed."""

    def stamp(self, file: int) -> tuple[int, ...]:
        """What changes whenever that file is written to: size, times of change of contents and of inode in ns, inode.

        Empty for one that is gone, or of which only the digest says something.
        """

    def blocks(self, at: Position) -> Iterator[Block]:
        """The file `at.file` from `at` on; the last block's `next` is in the following file."""

    def path(self, file: int) -> str:
        """Where the file with this index lies, for a message."""

    def form(self, file: int) -> str | None:
        """What the file with this index is read as; None where that cannot be told."""


def num_bytes_of(source: Source) -> int:
    """Size of all files on the disk."""
    return sum(file.num_bytes for file in source.files)


def digest_of(source: Source, times: bool = False) -> str:
    """SHA-256 over names and sizes, with `times` over the last changes too: tells another source without reading it."""
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(os.fsencode(file.name) + b"\0%d\n" % file.num_bytes)
        if times:
            digest.update(b"%d\n" % file.changed_ns)
    return digest.hexdigest()


def walk(source: Source, at: Position) -> Iterator[Block]:
    """All blocks from `at` on."""
    for file in range(at.file, len(source.files)):
        yield from source.blocks(at if at.file == file else Position(file))


@dataclass(frozen=True)
class FileSource:
    """The files of a source in the order of their relative paths, whatever the file system's own order is."""

    said: str
    root: Path
    is_folder: bool  # a source that is one file is its own root
    files: tuple[SourceFile, ...]
    unreadable: tuple[str, ...]
    config: DataConfig
    left_out: tuple[str, ...] = ()

    def path(self, file: int) -> str:
        """Where the file with this index lies."""
        return str(self.root / self.files[file].name if self.is_folder else self.root)

    def digest(self, file: int) -> str:
        """SHA-256 of a file's bytes, a word for one that cannot be read; empty for one that is not as it was listed."""
        listed, path = self.files[file], Path(self.path(file))
        try:
            found = record_of(path, SHA256).checksum
            return found if stamp(path.stat()) == (listed.num_bytes, listed.changed_ns) else ""
        except OSError:
            return "unreadable"

    def stamp(self, file: int) -> tuple[int, ...]:
        """Size, times of the last change of contents and inode, inode."""
        try:
            status = os.stat(self.path(file))
        except OSError:
            return ()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    def form(self, file: int) -> str | None:
        """What the file with this index is read as, by its first bytes; None for one that cannot be read."""
        listed = self.files[file]
        try:
            return form_of(Path(self.path(file)), listed.name, (listed.num_bytes, listed.changed_ns), self.config)
        except (DamagedError, OSError):
            return None

    def blocks(self, at: Position) -> Iterator[Block]:
        """The blocks of one file. Trouble with it is the last one's; never raises."""
        file, place = self.files[at.file], at
        try:
            for block in self._blocks(file, at):
                yield block
                place = block.next
            return
        except DamagedError as error:
            trouble = Trouble(error.reason, at.file, "", error.detail)
        except OSError as error:
            trouble = Trouble("unreadable", at.file, "", error.strerror or type(error).__name__)
        yield Block(TEXT, (), place, Position(at.file + 1), 0, (trouble,))

    def _blocks(self, file: SourceFile, at: Position) -> Iterator[Block]:
        path, expected = Path(self.path(at.file)), (file.num_bytes, file.changed_ns)
        form = form_of(path, file.name, expected, self.config)
        if form == ROWS:
            if stamp(path.stat()) != expected:
                raise DamagedError("changed", f"{path.stat().st_size} bytes, not {file.num_bytes}")
            from train.data.read.tables import (
                table_blocks,  # pyarrow takes a second, which sources without tables need not
            )

            yield from table_blocks(path, file.num_bytes, at, self.config.text_field)
            return
        with FileStream(path, expected, 0 if form == JSON else at.place) as stream:
            if form == JSON:
                yield from json_blocks(stream, at, self.config.text_field)
            elif form == LINES:
                yield from line_blocks(stream, at)
            else:
                yield from text_blocks(stream, at, self.config.max_document_bytes)


def open_source(config: DataConfig) -> Source:
    """List the files of `data.source`, or load the data set that it names.

    Raises ValueError when it does not exist, cannot be read, or holds no file that fits.
    """
    if config.source is not None and (config.source.startswith(DATASETS) or is_saved(Path(config.source))):
        return _dataset(config, config.source)
    library = config.source is None
    root = Path(sysconfig.get_paths()["stdlib"] if config.source is None else config.source)
    said = f"data.source={root}" if not library else f"this Python's own sources (data.source=null, {root})"
    if not root.exists():
        raise ValueError(f"{said} does not exist: name a file or a folder of text, or {DATASETS}NAME for a data set")
    suffixes = config.suffixes or ((".py",) if library else ())
    files: list[SourceFile] = []
    unreadable: list[str] = []
    left_out: list[str] = []
    if root.is_dir():
        for name in _walk(root, config, unreadable, left_out):
            if not suffixes or name.endswith(suffixes):
                _add(root / name, name, files, unreadable)
    elif root.is_file():
        _add(root, root.name, files, unreadable)
    else:
        raise ValueError(f"{said} is neither a file nor a folder")
    if not files:
        wanted = f" whose name ends in {' or '.join(suffixes)}" if suffixes else ""
        why = f"; {len(unreadable)} could not be read, the first is {unreadable[0]}" if unreadable else ""
        why += f"; {', '.join(sorted(left_out)[:3])} were written by runs and preparations" if left_out else ""
        raise ValueError(f"{said} holds no file{wanted}{why}")
    return FileSource(
        said, root, root.is_dir(), tuple(sorted(files)), tuple(sorted(unreadable)), config, tuple(sorted(left_out))
    )


@dataclass(frozen=True)
class DatasetSource:
    """One split of a data set of the `datasets` library, as if it were one file of rows."""

    said: str
    files: tuple[SourceFile, ...]
    rows: DatasetRows
    unreadable: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def path(self, file: int) -> str:
        """What the split is called."""
        return self.files[file].name

    def digest(self, file: int) -> str:
        """The library's own fingerprint."""
        return hashlib.sha256(self.rows.fingerprint.encode()).hexdigest()

    def stamp(self, file: int) -> tuple[int, ...]:
        """None: the fingerprint is at hand."""
        return ()

    def form(self, file: int) -> str | None:
        """A table, whatever it was made from."""
        return ROWS

    def blocks(self, at: Position) -> Iterator[Block]:
        """The rows from `at` on."""
        return self.rows.blocks(at)


def _dataset(config: DataConfig, source: str) -> Source:
    rows = load(source.removeprefix(DATASETS), config)
    # The fingerprint stands for the contents, as a file's time of change does.
    changed = int.from_bytes(hashlib.sha256(rows.fingerprint.encode()).digest()[:7], "little")
    return DatasetSource(f"data.source={source}", (SourceFile(rows.name, rows.num_bytes, changed),), rows)


def _walk(root: Path, config: DataConfig, unreadable: list[str], left_out: list[str]) -> Iterator[str]:
    """Relative paths of all files that are neither hidden nor written by ourselves, in any order."""
    skip = _NOT_LIBRARY if config.source is None else frozenset()
    target = os.path.realpath(config.folder)

    def refused(error: OSError) -> None:
        unreadable.append(Path(error.filename).relative_to(root).as_posix())

    for folder, folders, names in os.walk(root, onerror=refused):
        here = Path(folder)
        ours = is_ours(here, (*folders, *names)) or os.path.realpath(folder) == target
        if here != root and config.source is not None and ours:
            left_out.append(here.relative_to(root).as_posix())
            folders.clear()
            continue
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (here / name).relative_to(root).as_posix()


def _add(path: Path, name: str, files: list[SourceFile], unreadable: list[str]) -> None:
    try:
        if path.is_file():  # sockets, pipes and devices are not text
            files.append(SourceFile(name, *stamp(path.stat())))
    except OSError:
        unreadable.append(name)
