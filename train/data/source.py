"""Where text comes from: the files of a source, and their documents as byte ranges.

A file is one document, or several when it is longer than `data.max_document_bytes`. Documents are planned without
reading the text, so that worker processes can read it in parallel, from one giant file too.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from train.data.config import DataConfig

# Folders of the standard library's place that are not the library, or that not every machine has.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# A cut looks this far back for the end of a line.
_CUT_WINDOW_BYTES = 16384


class SourceFile(NamedTuple):
    """One file of a source: its path relative to the source's root, with `/`, and its size."""

    name: str
    num_bytes: int


class Piece(NamedTuple):
    """One document to be: bytes [start, stop) of the file with index `file`."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """The files of a source in the order of their relative paths, whatever the file system's own order is."""

    root: Path
    is_folder: bool  # a source that is one file is its own root
    files: tuple[SourceFile, ...]
    unreadable: tuple[str, ...]  # folders and files that could not even be listed

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def digest(self) -> str:
        """SHA-256 over names and sizes: tells another set of files without reading them."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file.name) + b"\0%d\n" % file.num_bytes)
        return digest.hexdigest()

    def path(self, file: int) -> Path:
        """Where the file with this index lies."""
        return self.root / self.files[file].name if self.is_folder else self.root


def open_source(config: DataConfig) -> Source:
    """List the files of `data.source`.

    Raises ValueError when it does not exist, cannot be read, or holds no file that fits.
    """
    library = config.source is None
    root = Path(sysconfig.get_paths()["stdlib"] if config.source is None else config.source)
    said = f"data.source={root}" if not library else f"data.source=null (this Python's own sources, {root})"
    if not root.exists():
        raise ValueError(f"{said} does not exist: name a text file or a folder of text files")
    suffixes = config.suffixes or ((".py",) if library else ())
    files: list[SourceFile] = []
    unreadable: list[str] = []
    if root.is_dir():
        skip = _NOT_LIBRARY if library else frozenset()
        for name in _walk(root, skip, unreadable):
            if not suffixes or name.endswith(suffixes):
                _add(root / name, name, files, unreadable)
    elif root.is_file():
        _add(root, root.name, files, unreadable)
    else:
        raise ValueError(f"{said} is neither a file nor a folder")
    if not files:
        wanted = f" whose name ends in {' or '.join(suffixes)}" if suffixes else ""
        why = f"; {len(unreadable)} could not be read, the first is {unreadable[0]}" if unreadable else ""
        raise ValueError(f"{said} holds no file{wanted}{why}")
    return Source(root, root.is_dir(), tuple(sorted(files)), tuple(sorted(unreadable)))


def _walk(root: Path, skip: frozenset[str], unreadable: list[str]) -> Iterator[str]:
    """Relative paths of all files that are not hidden, in any order."""

    def refused(error: OSError) -> None:
        unreadable.append(Path(error.filename).relative_to(root).as_posix())

    for folder, folders, names in os.walk(root, onerror=refused):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _add(path: Path, name: str, files: list[SourceFile], unreadable: list[str]) -> None:
    try:
        if path.is_file():  # sockets, pipes and devices are not text
            files.append(SourceFile(name, path.stat().st_size))
    except OSError:
        unreadable.append(name)


def cut(source: Source, file: int, max_document_bytes: int) -> list[Piece]:
    """The documents of one file, in order; together they are the whole file.

    A cut falls behind the last line end within the limit, or, where lines are longer than that, between two UTF-8
    characters. Raises OSError when the file cannot be read.
    """
    size = source.files[file].num_bytes
    if size <= max_document_bytes:
        return [Piece(file, 0, size)]
    pieces: list[Piece] = []
    with source.path(file).open("rb") as stream:
        start = 0
        while size - start > max_document_bytes:
            stop = _cut_before(stream, start, start + max_document_bytes)
            pieces.append(Piece(file, start, stop))
            start = stop
    pieces.append(Piece(file, start, size))
    return pieces


def _cut_before(stream: BinaryIO, start: int, limit: int) -> int:
    """The best place in (start, limit] to end a document."""
    begin = max(start, limit - _CUT_WINDOW_BYTES)
    stream.seek(begin)
    window = stream.read(limit + 1 - begin)  # one more byte shows whether the limit itself splits a character
    line_end = window.rfind(b"\n", 0, limit - begin)
    if line_end >= 0:
        return begin + line_end + 1
    for back in range(4):  # a UTF-8 character has at most three continuation bytes (0b10xxxxxx)
        place = limit - begin - back
        if 0 < place < len(window) and window[place] & 0xC0 != 0x80:
            return begin + place
    return limit


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. Raises OSError when it cannot be read or has become shorter."""
    with open(path, "rb") as stream:
        stream.seek(start)
        data = stream.read(stop - start)
    if len(data) != stop - start:
        raise OSError(f"{path} has become shorter than it was when it was listed")
    return data
