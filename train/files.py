"""Files that are whole or not there: checksums, writes that the disk has kept, files and folders put in place, locks.

Checkpoints, prepared tokens, exported models, pages and pictures are all kept with it.
The standard library is all that it needs, so workers without torch may use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

CRC32, SHA256 = "crc32", "sha256"
PARTIAL = ".partial"
_BLOCK_BYTES = 1 << 22


class _Sum(Protocol):
    """What a checksum is to `hashlib`."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    """CRC-32, which `hashlib` lacks."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


_SUMS: Mapping[str, Callable[[], _Sum]] = {CRC32: _Crc32, SHA256: hashlib.sha256}
_SPELLED = {CRC32: "CRC-32", SHA256: "SHA-256"}


@dataclass(frozen=True)
class FileRecord:
    """What a file holds.

    Attributes:
        algorithm: of the checksum, `CRC32` or `SHA256`.
        checksum: of the whole content, in hexadecimal.
    """

    num_bytes: int
    algorithm: str
    checksum: str

    def __str__(self) -> str:
        return f"{self.num_bytes} bytes with {_SPELLED[self.algorithm]} {self.checksum}"


# What a disk says that has no room left: for anybody, for this user, for one file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def in_words(error: OSError) -> str:
    """What the system says of a file or folder, and of which one, where it says so."""
    said = error.strerror or str(error) or type(error).__name__
    return said if error.filename is None else f"{said}, {error.filename}"


def is_full(error: BaseException) -> bool:
    """Whether a disk has refused bytes for want of room."""
    return isinstance(error, OSError) and error.errno in _FULL


@contextlib.contextmanager
def refusing(what: str, how: str = "written") -> Iterator[None]:
    """ValueError, in a sentence, for a file or folder that cannot be written (or read, or used) in the block.

    what: the setting that names it, as "run.dir=out".
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what} cannot be {how}: {in_words(error)}") from error


def named_files() -> contextlib.AbstractContextManager[None]:
    """`refusing` for a block that uses files and folders of several settings: the path must tell."""
    return refusing("a file or folder that the settings name", "used")


def check_takes_files(folder: Path) -> None:
    """OSError unless a new file can be put into a folder, or, where it is not there yet, into the nearest one above it,
    in which it will be made. Leaves nothing behind."""
    with contextlib.suppress(FileNotFoundError):
        folder.stat()
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.exists():
        raise FileExistsError(errno.EEXIST, "there is a link that leads nowhere", str(there))
    # A file without a name, where the system has such: also a process that is killed here leaves nothing behind.
    tempfile.TemporaryFile(dir=there).close()


class DamagedFileError(ValueError):
    """A file is missing, or is not what its record says."""

    def __init__(self, path: Path, trouble: str) -> None:
        super().__init__(f"{path} {trouble}")
        self.path = path


def record_of(path: Path, algorithm: str) -> FileRecord:
    """Read a file once and describe it; OSError when it cannot be read."""
    total, num_bytes = _SUMS[algorithm](), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            total.update(block)
            num_bytes += len(block)
    return FileRecord(num_bytes, algorithm, total.hexdigest())


def checksum_of(values: Any, algorithm: str) -> str:
    """Checksum, in hexadecimal, of plain values as JSON: equal for mappings whose keys came in another order."""
    total = _SUMS[algorithm]()
    total.update(json.dumps(values, sort_keys=True).encode())
    return total.hexdigest()


def check_sizes(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Compare presence and size of all files, without reading them. DamagedFileError names the first that is bad."""
    for name, meant in records.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except FileNotFoundError:
            raise DamagedFileError(folder / name, "is missing") from None
        if num_bytes != meant.num_bytes:
            trouble = f"is damaged: it has {num_bytes} bytes, was saved with {meant.num_bytes}"
            raise DamagedFileError(folder / name, trouble)


def check_contents(folder: Path, records: Mapping[str, FileRecord], names: Iterable[str] | None = None) -> None:
    """Read the files of `names` (None: all) whole. DamagedFileError names the first that is not what was recorded."""
    for name in records if names is None else names:
        try:
            found = record_of(folder / name, records[name].algorithm)
        except FileNotFoundError:
            raise DamagedFileError(folder / name, "is missing") from None
        if found != records[name]:
            raise DamagedFileError(folder / name, f"is damaged: it has {found}, was saved with {records[name]}")


def check_read_back(path: Path, meant: FileRecord) -> None:
    """OSError when the disk gives something else back than what was meant to be written."""
    found = record_of(path, meant.algorithm)
    if found != meant:
        raise OSError(f"{path} reads back as {found}, {meant} were written")


class SummedFile:
    """A new file, open for writing, and the record of all that it is meant to hold, whatever the disk makes of it.

    The disk has it when it is closed, unless a `with` block around it failed. An OSError of a write names the file; it
    is also what the block raises where a library, to which the file was handed, put words of its own in its place.
    """

    def __init__(self, path: Path, algorithm: str, keep_bytes: int = 0) -> None:
        """keep_bytes: what to keep of a file that is there already; the rest is cut off. OSError when it has fewer."""
        self.path, self.num_bytes = path, keep_bytes
        self._algorithm, self._sum = algorithm, _SUMS[algorithm]()
        self._refused: OSError | None = None
        self._stream: BinaryIO = path.open("r+b" if keep_bytes else "wb")
        self.tell, self.flush, self.fileno = self._stream.tell, self._stream.flush, self._stream.fileno
        if keep_bytes:
            self._sum_what_is_kept()

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the block's own error says more
            self._stream.close()
        if self._refused is not None and not isinstance(error, OSError):
            raise self._refused from error

    @property
    def record(self) -> FileRecord:
        """Size and checksum of what was written so far."""
        return FileRecord(self.num_bytes, self._algorithm, self._sum.hexdigest())

    def write(self, data: Any) -> int:
        """Append bytes, or anything that lies in memory as bytes; how many."""
        num_bytes = memoryview(data).nbytes
        self._sum.update(data)
        self.num_bytes += num_bytes
        with self._named():
            self._stream.write(data)
        return num_bytes

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        with self._named():
            self._stream.flush()
            sync_handle(self._stream.fileno())

    def close(self) -> None:
        """Wait for the disk and close the file, once."""
        if not self._stream.closed:
            try:
                self.sync()
            finally:
                with contextlib.suppress(OSError):  # a second time, of what it has just refused
                    self._stream.close()

    def close_and_compare(self) -> FileRecord:
        """Close the file, read it back, and return its record. OSError when it does not hold what was written."""
        self.close()
        check_read_back(self.path, self.record)
        return self.record

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)
            self._refused = error
            raise

    def _sum_what_is_kept(self) -> None:
        if self.path.stat().st_size > self.num_bytes:
            self._stream.truncate(self.num_bytes)
        while block := self._stream.read(_BLOCK_BYTES):
            self._sum.update(block)
        if self._stream.tell() != self.num_bytes:
            raise OSError(f"{self.path} has {self._stream.tell()} bytes, not the {self.num_bytes} that were written")


def write_durably(path: Path, data: bytes, algorithm: str) -> FileRecord:
    """Write a small file at once; its record. The disk has it when this returns."""
    with SummedFile(path, algorithm) as file:
        file.write(data)
    return file.record


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries: new names in it can be lost before."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def sync_handle(handle: int) -> None:
    """Wait until the disk has what was written to an open file, or the entries of an open folder."""
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems order their writes themselves and refuse to be asked.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def aside(path: Path, suffix: str = PARTIAL) -> Path:
    """The hidden neighbour in which what will be `path` is written: no reader takes it for the real thing."""
    return path.with_name(f".{path.name}{suffix}")


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A hidden neighbour to write. It takes the place of `path` at the end of the block, or is removed if that fails.

    Whoever looks at `path` finds what was there before, or all of the new file.

    durable: whether to wait for the disk. What can be drawn again from other files does not need to, and a wait could
        take as long as everything else that is on its way to the disk.
    """
    partial = aside(path)
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    if durable:
        sync(path.parent)


def replace_durably(path: Path, data: bytes) -> None:
    """Replace a small file, or make it: `replacing` for data that is at hand."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A hidden folder to fill, whose files are synced and which is renamed to `final` at the end of the block.

    It is removed if the block fails. What a killed process left of it is removed first. ValueError when `final` exists,
    when it cannot be written, or when another process is filling it.
    """
    if final.exists():
        raise ValueError(f"{final} exists already: remove it, or name another folder")
    partial = aside(final)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{final} cannot be written: {in_words(error)}") from None
    with locked(partial, f"{final} is being written by another process"):
        try:
            for path in partial.iterdir():
                path.unlink()
            yield partial
            for path in [*partial.iterdir(), partial]:
                sync(path)
            os.rename(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"{final} was not written: {in_words(error)}") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(final.absolute().parent)


@contextlib.contextmanager
def locked(path: Path, in_use: str, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made if need be. It dies with the process that holds it.

    Args:
        in_use: the sentence that is said when another one holds it.
        wait: what is given that sentence before this process waits for its turn; None refuses instead.

    Raises ValueError when another one holds the lock and nobody waits, and when the file system knows no locks.
    """
    try:
        # Network file systems lock files only for those who may write them.
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"{path} cannot be locked: {error.strerror}") from None
    try:
        _lock(handle, path, in_use, wait)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, in_use: str, wait: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait is None:
            raise ValueError(in_use) from None
        wait(in_use)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        raise ValueError(f"{path} cannot be locked: {error.strerror}") from None
