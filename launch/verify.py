"""`python -m launch verify checkpoint=PATH`: reads checkpoints whole and says whether each is sound.

    python -m launch verify checkpoint=runs/tiny
    python -m launch verify checkpoint=runs/tiny/checkpoints/step-00000300

Unlike a start, which compares what it needs and stops at the first trouble, it finds all that there is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launch.settings import VerifySettings
from train.checkpoint import step_folders
from train.checkpoint.goes_on import read_state
from train.checkpoint.reader import METADATA, RangeReader
from train.files import FileRecord, check_contents, in_words
from train.settings import read

# Numbers of a tensor that are in memory at a time.
BAND_NUMEL = 1 << 24


@dataclass
class Findings:
    """What reading a checkpoint has found; `troubles` are sentences, none for one that is sound."""

    folder: Path
    num_files: int = 0
    num_bytes: int = 0
    num_tensors: int = 0
    num_numbers: int = 0
    seconds: float = 0.0
    troubles: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = self.num_bytes / self.seconds / 1e6 if self.seconds else 0.0
        what = (
            f"{self.num_files} files of {self.num_bytes:,} bytes, {self.num_tensors} tensors of "
            f"{self.num_numbers:,} numbers, read in {self.seconds:.1f} s ({rate:.0f} MB/s)"
        )
        if not self.troubles:
            return f"{self.folder} is sound, and every number of it finite: {what}"
        return "\n  ".join([f"{self.folder} is not sound: {what}", *self.troubles])


def verify_command(settings: Sequence[str]) -> int:
    """Read every checkpoint that is meant; returns 0 if all are sound.

    Raises ValueError where there is none, and, when all were read, with what is wrong with those that are not.
    """
    given = read(VerifySettings, settings, "verify")
    found = [verify(folder) for folder in _meant(given.checkpoint)]
    for each in found:
        if not each.troubles:
            print(each, flush=True)
    if spoilt := [str(each) for each in found if each.troubles]:
        raise ValueError("\n".join(spoilt))
    return 0


def _meant(path: Path) -> list[Path]:
    """A step folder itself; of a run's folder or a folder of checkpoints all, the newest first. Also broken ones."""
    if path.is_dir() and (step_folders.is_step_folder(path) or (path / step_folders.MANIFEST).exists()):
        return [path]
    root = step_folders.checkpoints_of(path)
    complete, broken = step_folders.survey(root) if root.is_dir() else ([], {})
    if not complete and not broken:
        step_folders.find_checkpoint(path, "checkpoint")  # says in which way there is none
    return sorted([*complete, *broken], key=step_folders.step_of, reverse=True)


def verify(folder: Path) -> Findings:
    """Read a checkpoint: the files against their manifest, every range of every tensor, every number."""
    found, begin_s = Findings(folder), time.perf_counter()
    try:
        manifest = step_folders.read_manifest(folder)
    except ValueError as error:
        found.troubles.append(str(error))
        return found
    found.num_files, found.num_bytes = len(manifest), sum(each.num_bytes for each in manifest.values())
    found.troubles += _files(folder, manifest)
    try:
        read_state(folder)
    except (ValueError, KeyError, TypeError) as error:
        if not any(step_folders.STATE_FILE in each or step_folders.CONFIG_FILE in each for each in found.troubles):
            found.troubles.append(f"{folder / step_folders.STATE_FILE} cannot be read: {error}")
    if any(str(folder / METADATA) in each for each in found.troubles):
        found.troubles.append("none of its tensors was read, as the index of them is damaged")
    else:
        found.troubles += _numbers(folder, found)
    found.seconds = time.perf_counter() - begin_s
    return found


def _files(folder: Path, manifest: dict[str, FileRecord]) -> Iterator[str]:
    """What is wrong with the files: each one that is missing, damaged, or not in the manifest."""
    for name in sorted(manifest):
        try:
            check_contents(folder, manifest, [name])
        except ValueError as error:
            yield str(error)
        except OSError as error:
            yield f"{folder / name} cannot be read: {in_words(error)}"
    for path in sorted(folder.iterdir()):
        if path.name not in manifest and path.name != step_folders.MANIFEST:
            yield f"{path} is not in the manifest"


def _numbers(folder: Path, found: Findings) -> Iterator[str]:
    """What is wrong with the tensors: ranges that are missing or cannot be read, numbers that are not finite."""
    with RangeReader(folder) as reader:
        try:
            tensors = sorted(reader.tensors.items())
        except Exception as error:  # whatever comes of an index that was spoilt before it was summed up
            yield f"its tensors cannot be read: {error}"
            return
        for name, saved in tensors:
            found.num_tensors += 1
            found.num_numbers += saved.numel
            try:
                yield from _not_finite(reader, name, saved.numel)
            except Exception as error:  # whatever comes of a file that is not what its index says
                yield f"{name} cannot be read: {error}"


def _not_finite(reader: RangeReader, name: str, numel: int) -> Iterator[str]:
    """A sentence where numbers of a tensor are not finite: how many, and which is the first."""
    count, first = 0, -1
    for offset in range(0, numel, BAND_NUMEL):
        values = reader.read(name, offset, min(BAND_NUMEL, numel - offset))
        bad = ~torch.isfinite(values)
        if num_bad := int(bad.sum()):
            first = offset + int(bad.nonzero()[0, 0]) if first < 0 else first
            count += num_bad
    if count:
        yield f"{name} has {count:,} numbers of {numel:,} that are not finite, the first at {first:,}"
