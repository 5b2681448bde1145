"""Checkpoints: saved in the background, published atomically, loaded under any other layout of ranks.

Every state is a flat 1-D tensor named by its full name, and a rank owns ranges of it. torch.distributed.checkpoint
writes them (train/checkpoint/writer.py), train/checkpoint/reader.py reads any of them, and
train/checkpoint/step_folders.py keeps the folders.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from train.checkpoint import step_folders
from train.checkpoint.agreement import (
    Agreement,
    Alone,
    CheckpointError,
    DiskError,
    Ranks,
    kind_of,
    ranks_in_words,
    reason_of,
)
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.goes_on import read_state, resume_decision
from train.checkpoint.ranges import HostRange, Pieces, check_ranges
from train.checkpoint.reader import RangeReader, read_metadata, saved_tensors
from train.checkpoint.state import TrainState
from train.checkpoint.step_folders import CONFIG_FILE, STATE_FILE
from train.checkpoint.writer import FlatSavePlanner, FlatWriter, write_together
from train.files import (
    CRC32,
    FileRecord,
    aside,
    check_contents,
    check_takes_files,
    in_words,
    is_full,
    refusing,
    write_durably,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

# What torch writes beside the numbers of each tensor.
_BYTES_BESIDE = 2_000


@dataclass(frozen=True)
class Saved:
    """What became of a save.

    Attributes:
        num_bytes: of all files; 0 where it failed.
        stalled_s: how long training stood still for it: until an earlier save had ended, and the state was copied.
        duration_s: from the moment at which it was due until it was whole on the disk, or was given up.
        trouble: why it failed; empty where it did not.
    """

    step: int
    num_bytes: int
    stalled_s: float
    duration_s: float
    trouble: str = ""


class Checkpoints:
    """Saves and loads the checkpoints of one run. Every rank makes one and calls its methods in the same order.

    All methods are collective over `ranks`. What fails on one rank is raised on all ranks, in one sentence that names
    the rank: ValueError for what the user asked or gave, CheckpointError for the rest. The folder must be one that all
    ranks see.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        ranks: Ranks | None = None,
        told: Callable[[Saved], object] = lambda saved: None,
    ) -> None:
        """Make `folder` ready; rank 0 removes what killed saves left there.

        Args:
            ranks: all ranks, over groups that nothing else uses, as saves talk over them in the background; None when
                this process is alone.
            told: called on rank 0, in the thread that writes, with what became of each save.
        """
        config.check()
        self.root = folder
        self._config = config
        self._everyone = ranks or Alone()
        self._told = told
        self._ranks = Agreement(self._everyone)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staged: dict[str, list[HostRange]] = {}
        self._ranks.on_first(self._make_ready)

    def save(self, state: TrainState, pieces: Pieces, sizes: Mapping[str, int]) -> None:
        """Take a checkpoint of `pieces` as they are now; returns when they are copied, before they are written.

        Waits for the previous save first. If a disk refused that one, a warning says so and this one is tried; any
        other error of it is raised, and nothing is saved now. Ranges that several ranks hold are written once.

        Args:
            pieces: state name to this rank's ranges of the global tensor of that name.
            sizes: state name to the number of elements of the global tensor.
        """
        due_s = time.monotonic()
        self.settle()
        failed: Exception | None = None
        try:
            check_ranges(pieces, sizes)
            self._stage(pieces)
        except Exception as error:  # The other ranks are on their way into the save: they must hear of it there.
            failed = error
        stalled_s = time.monotonic() - due_s

        def write() -> None:
            num_bytes, trouble = 0, ""
            try:
                num_bytes = self._write(state, dict(sizes), failed)
            except BaseException as error:
                self._error, trouble = error, str(error)
            if self._ranks.rank == 0:
                in_all_s = time.monotonic() - due_s
                blocked_s = stalled_s if self._config.in_background else in_all_s
                self._told(Saved(state.step, num_bytes, blocked_s, in_all_s, trouble))

        # A daemon: a run that dies of something else does not wait for peers that will never answer.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._config.in_background:
            self._thread.join()

    def poll(self) -> None:
        """Warn, once, of a save that has ended meanwhile because a disk refused it: the run goes on, and saves again
        when the next one is due. Talks to nobody."""
        if self._thread is not None and not self._thread.is_alive() and isinstance(self._error, DiskError):
            log.warning("%s; the run goes on, and tries again when the next one is due", self._error)
            self._error = None

    def settle(self) -> None:
        """Return when no save is in flight; warns as `poll` does, and raises any other error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
        self.poll()
        self.wait()

    def wait(self) -> None:
        """Return when no save is in flight; raises the error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> Path | None:
        """The newest checkpoint that is complete, normally the one that the file `latest` names; None without any."""
        self.wait()
        return self._ranks.on_first(_reading(self.root, lambda: step_folders.find_latest(self.root)))

    def resume(self, now: TrainState) -> tuple[Path, TrainState] | None:
        """`resume_decision` on the disk as rank 0 sees it, for all ranks."""
        self.wait()
        return self._ranks.on_first(_reading(self.root, lambda: resume_decision(self._config, self.root, now)))

    def state_of(self, path: Path) -> TrainState:
        """The small state of the checkpoint at `path` as rank 0 sees it, for all ranks.

        Raises ValueError when there is no complete checkpoint.
        """
        self.wait()

        def read() -> TrainState:
            step_folders.check_complete(path)
            return read_state(path)

        return self._ranks.on_first(read)

    def find(self, path: Path, key: str, check: Callable[[Path, TrainState], None]) -> Path:
        """The checkpoint that `key=path` means, for all ranks, after `check` on it and its state as rank 0 sees it.

        Raises ValueError when there is no complete checkpoint, and what `check` raises.
        """
        self.wait()

        def found() -> Path:
            folder = step_folders.find_checkpoint(path, key)
            check(folder, read_state(folder))
            return folder

        return self._ranks.on_first(_reading(path, found))

    def load(self, path: Path, pieces: Pieces, sizes: Mapping[str, int]) -> None:
        """Copy a checkpoint's values into `pieces`, in place, whatever layout it was saved under.

        Nothing is overwritten on any rank before all files have been compared with their checksums (each by one rank)
        and all names and sizes agree. States of the checkpoint that nobody asks for are left alone.

        Raises ValueError for a missing or damaged file and for a name, size or kind of number that does not agree.
        """
        self.wait()
        self._ranks.on_all(_reading(path, lambda: self._verify_share(path)))
        with RangeReader(path) as reader:
            self._ranks.on_all(_reading(path, lambda: reader.check(pieces, sizes)))
            self._ranks.on_all(_reading(path, lambda: reader.fill(pieces)))

    def _verify_share(self, path: Path) -> None:
        manifest = step_folders.read_manifest(path)
        by_size = sorted(manifest, key=lambda name: (-manifest[name].num_bytes, name))
        check_contents(path, manifest, by_size[self._ranks.rank :: self._ranks.world_size])

    def _make_ready(self) -> None:
        with refusing(f"checkpoint.dir={self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
            check_takes_files(self.root)
            step_folders.tidy(self.root)

    def _stage(self, pieces: Pieces) -> None:
        """Copy the pieces to CPU memory, which is kept and used again by the next save."""
        before = {(name, part.offset): part.tensor for name, parts in self._staged.items() for part in parts}
        staged: dict[str, list[HostRange]] = {}
        for name, parts in pieces.items():
            staged[name] = []
            for part in parts:
                source = part.tensor.detach()
                home = before.get((name, part.offset))
                if home is None or home.shape != source.shape or home.dtype != source.dtype:
                    home = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                home.copy_(source, non_blocking=True)
                staged[name].append(HostRange(part.offset, home))
        if any(part.tensor.is_cuda for parts in pieces.values() for part in parts):
            torch.cuda.synchronize()
        self._staged = staged

    def _write(self, state: TrainState, sizes: dict[str, int], failed: Exception | None) -> int:
        """The background half of a save: every rank runs it, and all end it in the same way; bytes of all files."""
        final = step_folders.step_folder(self.root, state.step)
        partial = aside(final)
        free_bytes: list[int] = []

        def begin() -> int:
            if failed is not None:
                raise failed
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            return shutil.disk_usage(self.root).free

        try:
            free_bytes.append(self._everyone.from_first(self._ranks.on_all(begin)))
            writer = FlatWriter(partial)
            write_together(self._everyone, FlatSavePlanner(self._staged, sizes), writer)
            written = self._ranks.to_first(writer.read_back)
            records = {name: entry for files in written for name, entry in files.items()}
            return self._ranks.on_first(lambda: self._publish(state, records, partial, final))
        except BaseException as error:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._not_written(state.step, error, self._num_bytes(sizes), free_bytes) from error

    def _publish(self, state: TrainState, records: dict[str, FileRecord], partial: Path, final: Path) -> int:
        for name, text in ((STATE_FILE, state.to_json()), (CONFIG_FILE, state.config)):
            records[name] = write_durably(partial / name, text.encode(), CRC32)
        step_folders.write_manifest(partial, records)
        step_folders.check_complete(partial)
        saved_tensors(read_metadata(partial))
        step_folders.publish(partial, final)
        try:
            step_folders.prune(self.root, self._config.keep_latest_k)
        except OSError as error:
            log.warning("%s is saved, but older checkpoints could not be deleted: %s", final.name, error)
        return sum(record.num_bytes for record in records.values())

    def _num_bytes(self, sizes: Mapping[str, int]) -> int:
        """About how many bytes a checkpoint takes: ranks hold different states, but of the same kinds of numbers."""
        widths = [part.tensor.element_size() for parts in self._staged.values() for part in parts]
        return sum(sizes.values()) * max(widths, default=0) + _BYTES_BESIDE * len(sizes)

    def _not_written(self, step: int, error: BaseException, num_bytes: int, free_bytes: list[int]) -> Exception:
        causes: dict[int, BaseException] = {0: error}
        if isinstance(error, CheckpointException):
            causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        several = self._ranks.world_size > 1 and isinstance(error, CheckpointException)
        ranks: dict[str, list[str]] = {}
        for rank, cause in causes.items():
            ranks.setdefault(_why(cause), []).append(str(rank))
        reasons = [f"{why} (on rank {ranks_in_words(where)})" if several else why for why, where in ranks.items()]
        room = ""
        if any(is_full(cause) for cause in causes.values()):
            # A quota, or a limit of files, says nothing of how much it leaves.
            of_disk = any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes.values())
            left = f", {_in_words(free_bytes[0])} were free" if free_bytes and of_disk else ""
            room = f" (needs about {_in_words(num_bytes)}{left})"
        kind = DiskError if all(kind_of(cause) is DiskError for cause in causes.values()) else CheckpointError
        return kind(
            f"checkpoint of step {step} could not be written to {self.root}: {'; '.join(reasons)}{room}; "
            f"{self._newest_whole()}"
        )

    def _newest_whole(self) -> str:
        """For whoever reads that a save has failed: what there is to go on from."""
        try:
            complete = step_folders.survey(self.root)[0]
        except OSError as error:
            return f"older ones cannot be looked at ({in_words(error)})"
        if not complete:
            return "there is no whole one yet"
        return f"step {step_folders.step_of(complete[0])} is the newest whole one"


def _reading(path: Path, work: Callable[[], T]) -> Callable[[], T]:
    """The work, with ValueError for files of a folder of checkpoints that cannot be read."""

    def read() -> T:
        with refusing(str(path), "read"):
            return work()

    return read


def _why(error: BaseException) -> str:
    """`reason_of`; of a full disk without the file in which it ended, which says nothing more."""
    return error.strerror if isinstance(error, OSError) and is_full(error) and error.strerror else reason_of(error)


def _in_words(num_bytes: int) -> str:
    """A size as people read it, in decimal units: 1.2 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def read_pieces(path: Path, pieces: Pieces, sizes: Mapping[str, int]) -> None:
    """What `Checkpoints.load` does, for a process that is alone and only reads: nothing on the disk is touched.

    Raises ValueError for a missing or damaged file and for a name, size or kind of number that does not agree.
    """
    manifest = step_folders.read_manifest(path)
    check_contents(path, manifest)
    with RangeReader(path) as reader:
        reader.check(pieces, sizes)
        reader.fill(pieces)
