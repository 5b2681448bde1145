"""Files as streams of bytes, uncompressed on the way.

How a file is compressed is what its first bytes say (gzip, bzip2, xz, Zstandard), whatever it is called. Streams are
read once, in order; damage is found by the formats' own checksums and ends, and named.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

from train.data.read.blocks import DamagedError

zstandard: ModuleType | None
try:
    import zstandard
except ImportError:  # no wheel for this platform: everything else works without
    zstandard = None

_CHUNK_BYTES = 1 << 14
_HEAD_BYTES = 512


def split_name(name: str) -> tuple[str, str]:
    """(name without the ending of a compression, that ending or nothing)."""
    for ending in OPENERS:
        if name.lower().endswith(ending):
            return name[: -len(ending)], ending
    return name, ""


def compression_of(file: BinaryIO, name: str) -> str:
    """The ending that stands for a file's compression, by its first bytes; nothing where it is not compressed.

    A file that is called compressed and begins with neither its format nor text is a damaged one of its name.
    """
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    for ending, beginnings in _BEGINNINGS.items():
        if head.startswith(beginnings):
            return ending
    return "" if head.startswith(PARQUET) or is_text(head) else split_name(name)[1]


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are text: UTF-8 whose last character may be cut, without a zero byte."""
    try:
        return bool(head) and "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


class _Reader(Protocol):
    def read1(self, num_bytes: int, /) -> bytes: ...


class _Frames:
    """Zstandard frames, one after the other; EOFError where the last one is not whole."""

    def __init__(self, file: BinaryIO) -> None:
        if zstandard is None:
            raise DamagedError("unreadable", "reading .zst needs the package zstandard")
        self._file, self._make = file, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._pending = self._ready = b""

    def read1(self, num_bytes: int, /) -> bytes:
        while not self._ready:
            chunk = self._pending or self._file.read(_CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("its last frame is not whole")
                return b""
            if self._frame is None:
                self._frame = self._make()
            self._ready, self._pending = self._frame.decompress(chunk), b""
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        part, self._ready = self._ready[:num_bytes], self._ready[num_bytes:]
        return part


# What a Parquet file begins with.
PARQUET = b"PAR1"
# What compressed files begin with; Zstandard's frames may come behind ones that are to be skipped.
_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    ".gz": (b"\x1f\x8b",),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))),
}
# What reads a compression, by the ending that stands for it.
OPENERS: dict[str, Callable[[BinaryIO], _Reader]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".bz2": lambda file: bz2.BZ2File(file, "rb"),
    ".xz": lambda file: lzma.LZMAFile(file, "rb"),  # noqa: SIM115 (whoever opens a stream closes it)
    ".zst": _Frames,
}
_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)
if zstandard is not None:
    _ERRORS = (*_ERRORS, zstandard.ZstdError)


def stamp(status: os.stat_result) -> tuple[int, int]:
    """Size and time of the last change: equal as long as nobody writes."""
    return status.st_size, status.st_mtime_ns


class FileStream:
    """One file, uncompressed; `with FileStream(path, expected, start) as stream`. OSError when it cannot be opened."""

    def __init__(self, path: Path, expected: tuple[int, int], start: int = 0) -> None:
        """expected: the file's stamp when it was listed. start: byte of the uncompressed text to begin at."""
        self._file, self._expected, self._told = path.open("rb"), expected, 0
        try:
            self._check()
            compression = compression_of(self._file, path.name)
            if compression:
                self._reader: _Reader = OPENERS[compression](self._file)
                while start > 0 and (part := self.read(min(start, 1 << 20))):
                    start -= len(part)
            else:
                self._reader = self._file  # buffered: it has read1
                self._told = self._file.seek(start)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> FileStream:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, num_bytes: int) -> bytes:
        """Up to `num_bytes`, none at the end. DamagedError when the file is corrupt here, or has been changed."""
        try:
            part = self._reader.read1(num_bytes)
        except _ERRORS as error:
            self._check()
            known = isinstance(error, OSError) and error.errno is not None
            raise DamagedError("unreadable" if known else "corrupt", _short(error)) from None
        if not part:
            self._check()
        return part

    def _check(self) -> None:
        found = stamp(os.fstat(self._file.fileno()))
        if found != self._expected:
            sizes = f"{found[0]} bytes, not {self._expected[0]}" if found[0] != self._expected[0] else "written to"
            raise DamagedError("changed", sizes)

    def disk_bytes(self) -> int:
        """Bytes of the file on the disk that were taken since the last call."""
        before, self._told = self._told, self._file.tell()
        return self._told - before


def _short(error: Exception) -> str:
    """The first line of a library's words."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
