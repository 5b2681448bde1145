"""Writes the tensors of a checkpoint, in the files of torch.distributed.checkpoint (DCP), with checksums.

Ranks write together through DCP (`FlatSavePlanner`, `FlatWriter`). A single process can write tensors that it could not
hold into files of the same form, range by range (`write_ranges`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import StackSummary
from typing import IO, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from parallel.torch_names import StorageInfo
from train.checkpoint.agreement import Ranks
from train.checkpoint.ranges import Pieces
from train.checkpoint.reader import METADATA, saved_tensors
from train.files import CRC32, FileRecord, SummedFile, check_read_back

T = TypeVar("T")
# The file that DCP would name so for a single rank.
_TENSORS = "__0_0.distcp"


class FlatSavePlanner(DefaultSavePlanner):
    """Plans the writes of this rank's pieces. Ranges that several ranks hold are written by one of them.

    DCP plans boxes of global tensors of any rank; here every tensor is 1-D, so pieces become its items directly.
    """

    def __init__(self, pieces: Pieces, sizes: Mapping[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._sizes = sizes
        self._tensors = {
            (name, part.offset): part.tensor
            for name, parts in pieces.items()
            for part in parts
            if part.tensor.numel() > 0
        }

    def create_local_plan(self) -> SavePlan:
        items = []
        for (name, offset), tensor in self._tensors.items():
            data = TensorWriteData(
                chunk=_chunk(offset, tensor),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size([self._sizes[name]]),
            )
            items.append(WriteItem(MetadataIndex(name, [offset]), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._tensors[index.fqn, index.offset[0]]


def _chunk(offset: int, tensor: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([offset]), torch.Size([tensor.numel()]))


class _SummedFiles(FileSystem):
    """DCP's file system, which keeps a record of every file written through it and waits for the disk to have it."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        assert mode == "wb", mode
        with SummedFile(Path(path), CRC32) as stream:
            yield stream
        self.written[stream.path.name] = stream.record

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class FlatWriter(FileSystemWriter):
    """One file per rank, one thread, synced to disk; knows the size and checksum of all that it meant to write."""

    def __init__(self, folder: Path) -> None:
        # Its own syncing leaves out what is still in the buffer of the file.
        super().__init__(folder, single_file_per_rank=True, sync_files=False, thread_count=1, per_thread_copy_ahead=0)
        self.fs = self._files = _SummedFiles()
        self._folder = folder

    def storage_meta(self) -> StorageMeta:
        # The default would record the path of the folder aside, which is gone after the rename.
        return StorageMeta(save_id=self.save_id)

    def read_back(self) -> dict[str, FileRecord]:
        """Records of the files this rank wrote, compared with what the disk has. OSError when they differ."""
        for name, meant in self._files.written.items():
            check_read_back(self._folder / name, meant)
        return self._files.written


def write_together(ranks: Ranks, planner: FlatSavePlanner, writer: FlatWriter) -> None:
    """What DCP's `save` does, through ranks that talk to few others each: its own collectives want one group in which
    all are connected. Raises CheckpointException, the same on all ranks, with what each rank failed of.
    """

    def attempt(step: str, work: Callable[[], T]) -> list[T]:
        """The work of every rank; on rank 0 all results."""
        done: tuple[Exception | None, list[T]] = (None, [])
        try:
            done = None, [work()]
        except Exception as error:
            done = _sendable(error), []
        everyone = ranks.to_first(done)
        failures = {rank: (error, StackSummary()) for rank, (error, _) in enumerate(everyone) if error is not None}
        failures = ranks.from_first(failures)
        if failures:
            raise CheckpointException(step, failures)
        return [result for _, results in everyone for result in results] if is_first else []

    def plan() -> SavePlan:
        planner.set_up_planner({}, writer.storage_meta(), is_first)
        writer.set_up_storage_writer(is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_all() -> tuple[list[SavePlan], Metadata]:
        planned, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(planned), metadata

    def write() -> list[WriteResult]:
        writing = writer.write_data(planner.finish_plan(own), planner)
        writing.wait()
        return writing.value()

    is_first = ranks.rank == 0
    writer.reset()
    plans = attempt("plan", plan)
    planned = attempt("plan", lambda: plan_all() if is_first else None)[:1]
    shares, metadata = planned[0] if planned and planned[0] is not None else ([], None)
    own = ranks.deal(shares)
    written = attempt("write", write)
    attempt("write", lambda: writer.finish(metadata, written) if metadata is not None else None)


def _sendable(error: Exception) -> Exception:
    """An error that other ranks can read."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def write_ranges(
    folder: Path, sizes: Mapping[str, int], ranges: Iterable[tuple[str, int, Tensor]]
) -> dict[str, FileRecord]:
    """Write float32 tensors, given range by range in any order, as a checkpoint's tensor files.

    DCP would keep a tensor of every name; here one range at a time is in memory.

    Args:
        sizes: name to the number of elements of the whole tensor.
        ranges: (name, flat offset, 1-D values); together they must cover every tensor exactly once.

    Returns what was meant to be written, by file. ValueError when the ranges do not cover the tensors.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in sizes}
    storage: dict[MetadataIndex, Any] = {}
    with SummedFile(folder / _TENSORS, CRC32) as file:
        for name, offset, values in ranges:
            assert values.dtype == torch.float32 and values.dim() == 1, name
            start = file.num_bytes
            whole = values.untyped_storage().nbytes() == values.nbytes
            torch.save(values if whole else values.clone(), cast(IO[bytes], file))
            chunks[name].append(_chunk(offset, values))
            storage[MetadataIndex(name, [offset])] = StorageInfo(_TENSORS, start, file.num_bytes - start)
            del values  # before the next range is made
    metadata = Metadata(
        {
            name: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([sizes[name]]), parts)
            for name, parts in chunks.items()
        },
        storage_data=storage,
        storage_meta=StorageMeta(),
    )
    saved_tensors(metadata)
    with SummedFile(folder / METADATA, CRC32) as index:
        index.write(pickle.dumps(metadata))
    return {_TENSORS: file.record, METADATA: index.record}
