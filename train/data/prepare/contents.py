"""Whether a source still holds what was prepared: the contents decide, whatever sizes and times of change say.

`contents.json` has the SHA-256 of every file, and belongs to the prepared data. `.stamps.json` saves reading them all
again: a file whose size, times and inode are those of the last comparison is the same one, as the system moves the time
of a change of the inode at every write and nobody can set it back. It may be missing, and is not trusted for a file
that was written while, or just before, it was looked at: a clock may not have ticked between two writes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from train.data.read.source import Source
from train.files import SHA256, FileRecord, replacing, write_durably

CONTENTS, STAMPS = "contents.json", ".stamps.json"
# Longer than the steps of any file system's clock.
_TICK_NS = 2_000_000_000


def write_contents(folder: Path, source: Source) -> FileRecord:
    """Read every file once more, and write the digests of all. A file that has changed since has none.

    Whoever asks later is told that it is another one.
    """
    return write_durably(folder / CONTENTS, json.dumps(_digests(source), indent=0).encode(), SHA256)


def write_stamps(folder: Path, source: Source, at_ns: int) -> None:
    """Note which files are known to be those of `contents.json`, as they were at `at_ns`.

    Nothing happens where that cannot be written: the next call reads all files.
    """
    stamps = [_stamp(source, file, at_ns) for file in range(len(source.files))]
    if stamps == _read_stamps(folder, len(stamps)):
        return
    try:
        with replacing(folder / STAMPS, durable=False) as partial:
            partial.write_text(json.dumps(stamps))
    except OSError:
        return


def changed_files(folder: Path, source: Source) -> list[str]:
    """Names of the files whose contents are not those that were prepared; `source` has all of them, in their order."""
    at_ns = time.time_ns()
    meant: list[str] = json.loads((folder / CONTENTS).read_bytes())
    known = _read_stamps(folder, len(meant))
    asked = [file for file in range(len(meant)) if not known[file] or known[file] != _stamp(source, file, at_ns)]
    found = {file: source.digest(file) for file in asked}
    changed = [source.files[file].name for file in asked if found[file] != meant[file] or not meant[file]]
    if asked and not changed:
        write_stamps(folder, source, at_ns)
    return changed


def _digests(source: Source) -> list[str]:
    return [source.digest(file) for file in range(len(source.files))]


def _stamp(source: Source, file: int, at_ns: int) -> tuple[int, ...]:
    """A file's stamp; empty where it says nothing: it is gone, or was written to at about `at_ns`, or later.

    A time of change of the contents may be set to anything; that of the inode, the third, may not.
    """
    stamp = source.stamp(file)
    return stamp if stamp and stamp[2] < at_ns - _TICK_NS else ()


def _read_stamps(folder: Path, count: int) -> list[tuple[int, ...]]:
    try:
        found = [tuple(each) for each in json.loads((folder / STAMPS).read_bytes())]
    except (OSError, ValueError, TypeError):
        found = []
    return found if len(found) == count else [()] * count
