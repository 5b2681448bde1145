"""Folders of checkpoints on disk: which are complete, publishing one, forgetting old ones, tidying up after a kill.

A checkpoint is written into a hidden folder beside its final place and renamed there when it is whole, so a folder
named `step-XXXXXXXX` is complete from its first moment. `manifest.json` inside it lists every file with its size and
CRC-32; the file `latest` beside the folders names the one to resume from and is replaced last. Nothing here
communicates.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"

_STEP = re.compile(r"step-(\d{8,})")
_BLOCK_BYTES = 1 << 22

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file: its size and the CRC-32 of its content."""

    num_bytes: int
    crc32: int

    def extended(self, data: bytes | memoryview) -> FileRecord:
        """The record after `data` has been appended to the file."""
        return FileRecord(self.num_bytes + memoryview(data).nbytes, zlib.crc32(data, self.crc32))

    def __str__(self) -> str:
        return f"{self.num_bytes} bytes with CRC-32 {self.crc32:08x}"


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint taken after `step` finished steps."""
    return root / f"step-{step:08d}"


def aside(folder: Path, suffix: str) -> Path:
    """A hidden neighbour of `folder`, which no reader takes for a checkpoint."""
    return folder.with_name(f".{folder.name}{suffix}")


def record(path: Path) -> FileRecord:
    """Read a file once and describe it; OSError when it cannot be read."""
    found = FileRecord(0, 0)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            found = found.extended(block)
    return found


def write_durably(path: Path, text: str) -> FileRecord:
    """Write a small text file, through to the disk; returns what the manifest should say of it."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(0, 0).extended(data)


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the done-marker of a folder whose files are all in place."""
    body = {name: [entry.num_bytes, entry.crc32] for name, entry in sorted(files.items())}
    write_durably(folder / MANIFEST, json.dumps({"files": body, "crc32": _body_crc(body)}, indent=1))


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """File name to record. ValueError, naming the file, when the marker is missing or damaged."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        body = content["files"]
        sound = content["crc32"] == _body_crc(body)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: it does not agree with its own checksum")
    return {name: FileRecord(*entry) for name, entry in body.items()}


def verify(folder: Path, manifest: Mapping[str, FileRecord], names: Iterable[str]) -> None:
    """Read these files whole. ValueError, naming the file, when one is not what the manifest recorded."""
    for name in names:
        try:
            found = record(folder / name)
        except FileNotFoundError:
            raise ValueError(f"{folder / name} is missing") from None
        if found != manifest[name]:
            raise ValueError(f"{folder / name} is damaged: it has {found}, was saved with {manifest[name]}")


def check_complete(folder: Path) -> None:
    """The cheap half of `verify`: marker, presence and sizes. ValueError in a sentence that names the file."""
    for name, entry in read_manifest(folder).items():
        try:
            num_bytes = (folder / name).stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{folder / name} is missing") from None
        if num_bytes != entry.num_bytes:
            raise ValueError(f"{folder / name} is damaged: it has {num_bytes} bytes, was saved with {entry.num_bytes}")


def survey(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """All step folders under `root`: the complete ones, newest first, and what is wrong with each other one."""
    complete, broken = [], {}
    for folder in sorted(_step_folders(root), key=_step_of, reverse=True):
        try:
            check_complete(folder)
            complete.append(folder)
        except ValueError as error:
            broken[folder] = str(error)
    return complete, broken


def find_latest(root: Path) -> Path | None:
    """The checkpoint to resume from: the one that `latest` names, else the newest complete one.

    Falling back is said in a warning. None when there is no complete checkpoint.
    """
    named = _named_by_latest(root)
    complete, broken = survey(root)
    if named in complete:
        return named
    if named is None and not complete and not broken:
        return None
    if named is None:
        trouble = f"{root / LATEST} does not name a checkpoint"
    else:
        trouble = f"{root / LATEST} names {named.name}, but {broken.get(named, 'there is no such folder')}"
    choice = complete[0] if complete else None
    log.warning("%s: %s", trouble, f"falling back to {choice.name}" if choice else "and no other one is complete")
    return choice


def publish(partial: Path, final: Path) -> None:
    """Rename a whole folder into place, then let `latest` name it. At every moment a complete checkpoint is named."""
    root = final.parent
    _sync(partial)
    replaced = aside(final, REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _sync(root)
    write_durably(root / f".{LATEST}", f"{final.name}\n")
    os.replace(root / f".{LATEST}", root / LATEST)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Delete all but `keep` checkpoints (0 keeps all): the one `latest` names stays, then the newest before it.

    Those with a higher step than `latest` belong to a future that was abandoned by resuming before it; they go first.
    """
    named = _named_by_latest(root)
    if keep == 0 or named is None:
        return

    def rank(folder: Path) -> tuple[bool, int]:
        return _step_of(folder) <= _step_of(named), _step_of(folder)

    others = sorted((folder for folder in _step_folders(root) if folder != named), key=rank, reverse=True)
    for folder in others[keep - 1 :]:
        doomed = aside(folder, DELETED)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tidy(root: Path) -> None:
    """Remove what a killed save left. A checkpoint that was being replaced returns when its successor never came."""
    for path in root.glob(".step-*"):
        final = path.with_name(path.stem[1:])
        if path.suffix == REPLACED and not final.exists():
            os.rename(path, final)
        elif path.suffix in (PARTIAL, REPLACED, DELETED):
            shutil.rmtree(path, ignore_errors=True)
    (root / f".{LATEST}").unlink(missing_ok=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A hidden folder to fill, which is synced and renamed to `final` at the end of the block; removed if that fails.

    What a killed process left of it is removed first. ValueError when `final` exists, when it cannot be written, or
    when another process is filling it.
    """
    if final.exists():
        raise ValueError(f"{final} exists already: remove it, or name another folder")
    partial = aside(final, PARTIAL)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{final} cannot be written: {error.strerror}") from None
    try:
        _lock(handle, final)
        for path in partial.iterdir():
            path.unlink()
        try:
            yield partial
            for path in [*partial.iterdir(), partial]:
                _sync(path)
            os.rename(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(f"{final} was not written: {error}") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(final.absolute().parent)
    finally:
        os.close(handle)


def _lock(handle: int, final: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{final} is being written by another process") from None


def _step_folders(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]


def _step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def _named_by_latest(root: Path) -> Path | None:
    try:
        name = (root / LATEST).read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return root / name if _STEP.fullmatch(name) else None


def _body_crc(body: Mapping[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems order renames by themselves and refuse fsync of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
