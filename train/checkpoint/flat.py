"""Flat ranges of global tensors for torch.distributed.checkpoint (DCP): planners, a checksumming writer, a reader.

DCP plans writes and reads of boxes of global tensors. Here every tensor is 1-D and a rank owns ranges of it, so the
planners turn `name -> pieces` straight into DCP's items. Resharding is DCP's: a range that is asked for is cut from
whatever ranges were saved.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
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
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from train.checkpoint.step_folders import FileRecord, record

METADATA = ".metadata"


class Piece(Protocol):
    """A contiguous range of a global tensor: `tensor` is 1-D and starts at flat `offset` (elements)."""

    @property
    def offset(self) -> int: ...

    @property
    def tensor(self) -> Tensor: ...


Pieces = Mapping[str, Sequence[Piece]]


def check_ranges(pieces: Pieces, sizes: Mapping[str, int]) -> None:
    """ValueError unless every piece is 1-D and lies inside its global tensor of `sizes[name]` elements."""
    for name, parts in pieces.items():
        for part in parts:
            last = part.offset + part.tensor.numel()
            if part.tensor.dim() != 1 or part.offset < 0 or last > sizes[name]:
                raise ValueError(
                    f"{name}: a piece of shape {list(part.tensor.shape)} at {part.offset} is not a range of its "
                    f"{sizes[name]} elements"
                )


def _chunk(part: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([part.offset]), torch.Size([part.tensor.numel()]))


def _by_place(pieces: Pieces) -> dict[tuple[str, int], Tensor]:
    return {(name, part.offset): part.tensor for name, parts in pieces.items() for part in parts if part.tensor.numel()}


class FlatSavePlanner(DefaultSavePlanner):
    """Plans the writes of this rank's pieces. Ranges that several ranks hold are written by one of them."""

    def __init__(self, pieces: Pieces, sizes: Mapping[str, int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = pieces
        self._sizes = sizes
        self._tensors = _by_place(pieces)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, parts in self._pieces.items():
            for part in parts:
                if part.tensor.numel() == 0:
                    continue
                data = TensorWriteData(
                    chunk=_chunk(part),
                    properties=TensorProperties(dtype=part.tensor.dtype),
                    size=torch.Size([self._sizes[name]]),
                )
                index = MetadataIndex(name, [part.offset])
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._tensors[index.fqn, index.offset[0]]


class FlatLoadPlanner(DefaultLoadPlanner):
    """Plans the reads that fill this rank's pieces in place."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = pieces
        self._tensors = _by_place(pieces)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        reads = []
        for name, parts in self._pieces.items():
            chunks = [_chunk(part) for part in parts if part.tensor.numel()]
            if chunks:
                saved = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[name])
                reads += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._tensors[index.fqn, index.offset[0]]


class _ChecksummedStream:
    """The calls that DCP makes on a file it writes, with a running CRC-32 of the bytes it meant to write."""

    def __init__(self, raw: io.IOBase) -> None:
        self._raw = raw
        self.tell, self.flush, self.fileno, self.close = raw.tell, raw.flush, raw.fileno, raw.close
        self.entry = FileRecord(0, 0)

    def write(self, data: Any) -> int:
        self.entry = self.entry.extended(data)
        return cast(io.BufferedWriter, self._raw).write(data)


@contextmanager
def checksummed(path: Path) -> Generator[_ChecksummedStream, None, None]:
    """A new file, synced to disk at the end; its `entry` is the record of what was meant to be written."""
    with path.open("wb") as raw:
        stream = _ChecksummedStream(raw)
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


class _ChecksummedFiles(FileSystem):
    """DCP's file system, keeping a record of every file written through it."""

    def __init__(self) -> None:
        self.written: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as raw:
            stream = _ChecksummedStream(raw)
            yield cast(io.IOBase, stream)
        self.written[Path(path).name] = stream.entry

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class FlatWriter(FileSystemWriter):
    """One file per rank, one thread, synced to disk; knows the size and checksum of all that it meant to write."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.fs = self._files = _ChecksummedFiles()
        self._folder = folder

    def storage_meta(self) -> StorageMeta:
        # The default would record the path of the folder aside, which is gone after the rename.
        return StorageMeta(save_id=self.save_id)

    def read_back(self) -> dict[str, FileRecord]:
        """Records of the files this rank wrote, compared with what the disk has. OSError when they differ."""
        for name, meant in self._files.written.items():
            found = record(self._folder / name)
            if found != meant:
                raise OSError(f"{name} reads back as {found}, {meant} were written")
        return self._files.written


# All that the metadata of a checkpoint of ours consists of: anything else in it is not ours and must not be run.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        harmless = name in _METADATA_CLASSES.get(module, ()) or (
            module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not harmless:
            raise ValueError(f"the checkpoint's metadata names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)


class FlatReader(FileSystemReader):
    """Reads a checkpoint without running code from it: tensors are loaded as weights only, the metadata from a list of
    known classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata; ValueError when it cannot be what a save wrote."""
        path = Path(self.path) / METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} does not hold a checkpoint's metadata")
        return metadata

    def fill(self, pieces: Pieces) -> None:
        """Copy the checkpoint's values into `pieces`, in place. Their names and sizes must have been checked."""
        metadata = self.read_metadata()
        planner = FlatLoadPlanner(pieces)
        planner.set_up_planner({}, metadata, is_coordinator=True)
        self.set_up_storage_reader(metadata, is_coordinator=True)
        plan = planner.finish_plan(self.prepare_local_plan(planner.create_local_plan()))
        self.read_data(plan, planner).wait()


def tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Name to saved tensor. ValueError when the saved ranges of one do not tile it exactly."""
    found = {}
    for name, saved in metadata.state_dict_metadata.items():
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor in this checkpoint")
        ranges = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in saved.chunks)
        end = 0
        for offset, numel in ranges:
            if offset != end:
                raise ValueError(f"{name}: elements {min(offset, end)} to {max(offset, end) - 1} are not saved once")
            end += numel
        if end != saved.size[0]:
            raise ValueError(f"{name}: elements {end} to {saved.size[0] - 1} are not saved")
        found[name] = saved
    return found


def check_loadable(saved: Mapping[str, TensorStorageMetadata], pieces: Pieces, sizes: Mapping[str, int]) -> None:
    """ValueError, in a sentence, for a name that was not saved or was saved with another size or kind of numbers.

    Floating-point types convert into each other on loading; floating point never becomes integer, or the reverse.
    """
    check_ranges(pieces, sizes)
    for name, parts in pieces.items():
        if sizes[name] == 0:
            continue
        if name not in saved:
            raise ValueError(f"{name} is not in the checkpoint")
        numel, dtype = saved[name].size[0], saved[name].properties.dtype
        if numel != sizes[name]:
            raise ValueError(f"{name} has {sizes[name]} elements here and {numel} in the checkpoint")
        for part in parts:
            if part.tensor.dtype.is_floating_point != dtype.is_floating_point:
                raise ValueError(f"{name} is {part.tensor.dtype} here and {dtype} in the checkpoint")
