"""Checkpoints larger than memory: ranges of global tensors read and written one at a time, in DCP's own files.

Reading through torch.distributed.checkpoint loads every saved range whole that a request touches, and writing keeps a
tensor of every name; here a reader takes just the bytes asked for, and a writer has one range in memory.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from train.checkpoint.flat import METADATA, FlatReader, checksummed, tensors
from train.checkpoint.step_folders import FileRecord

_FILE = "__0_0.distcp"
# Of a member of a zip archive: its local header before the name, and where the lengths of name and extra field stand.
_ZIP_HEADER_BYTES, _ZIP_LENGTHS = 30, slice(26, 30)


def read_exactly(file: IO[bytes], offset: int, target: Tensor) -> None:
    """Fill a contiguous CPU tensor with the file's bytes from `offset`. ValueError when the file ends before."""
    view = memoryview(cast(Any, target.view(torch.uint8).numpy()))
    while len(view):
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise ValueError(f"{file.name} ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count


@dataclass(frozen=True)
class _Saved:
    """The saved ranges of one tensor in order: flat offset of each, and where in which file its elements start."""

    numel: int
    dtype: torch.dtype
    offsets: list[int]
    places: list[_StorageInfo]


class RangeReader:
    """Reads flat ranges of a checkpoint's tensors; `with RangeReader(folder) as reader`.

    Raises ValueError for a checkpoint that is not what a save wrote. Compare the files with their checksums first.
    """

    def __init__(self, folder: Path) -> None:
        metadata = FlatReader(folder).read_metadata()
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._saved = {}
        for name, entry in tensors(metadata).items():
            offsets = sorted(chunk.offsets[0] for chunk in entry.chunks)
            places = [metadata.storage_data[MetadataIndex(name, [offset])] for offset in offsets]
            self._saved[name] = _Saved(entry.size[0], entry.properties.dtype, offsets, places)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    @property
    def numels(self) -> dict[str, int]:
        """Elements of every tensor."""
        return {name: saved.numel for name, saved in self._saved.items()}

    def read(self, name: str, offset: int, numel: int) -> Tensor:
        """Elements [offset, offset + numel) of a tensor, 1-D, in the type it was saved in."""
        saved = self._saved[name]
        out = torch.empty(numel, dtype=saved.dtype)
        index, done = bisect_right(saved.offsets, offset) - 1, 0
        while done < numel:
            first, ends = saved.offsets[index], [*saved.offsets[index + 1 : index + 2], saved.numel]
            start = offset + done - first
            count = min(numel - done, ends[0] - first - start)
            self._copy(saved, index, start, out[done : done + count])
            index, done = index + 1, done + count
        return out

    def _copy(self, saved: _Saved, index: int, start: int, target: Tensor) -> None:
        place = saved.places[index]
        if place.relative_path not in self._files:
            self._files[place.relative_path] = (self._folder / place.relative_path).open("rb")
        file = self._files[place.relative_path]
        key = place.relative_path, place.offset
        if key not in self._starts:
            end = saved.offsets[index + 1] if index + 1 < len(saved.offsets) else saved.numel
            num_bytes = (end - saved.offsets[index]) * saved.dtype.itemsize
            self._starts[key] = place.offset + _data_offset(file, place, num_bytes)
        read_exactly(file, self._starts[key] + start * saved.dtype.itemsize, target)


class _Slice:
    """A part of a file as a file of its own, as `zipfile` reads one."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self._at = to + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        left = self._length - self._at
        data = os.pread(self._file.fileno(), left if count < 0 else min(count, left), self._offset + self._at)
        self._at += len(data)
        return data


def _data_offset(file: IO[bytes], place: _StorageInfo, num_bytes: int) -> int:
    """Where the elements of a saved range start, from the start of what `torch.save` wrote of it: a zip archive that
    stores them uncompressed. ValueError when it is not so."""
    part = _Slice(file, place.offset, place.length)
    try:
        with zipfile.ZipFile(cast(IO[bytes], part)) as archive:
            (member,) = (each for each in archive.infolist() if each.filename.endswith("/data/0"))
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read at {place.offset}: {error}") from None
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != num_bytes:
        raise ValueError(f"{file.name} holds {member.file_size} bytes at {place.offset}, not {num_bytes}")
    part.seek(member.header_offset)
    lengths = part.read(_ZIP_HEADER_BYTES)[_ZIP_LENGTHS]
    return (
        member.header_offset
        + _ZIP_HEADER_BYTES
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )


def write_ranges(
    folder: Path, sizes: Mapping[str, int], ranges: Iterable[tuple[str, int, Tensor]]
) -> dict[str, FileRecord]:
    """Write float32 tensors, given range by range in any order, as a checkpoint's tensor files.

    Args:
        sizes: name to the number of elements of the whole tensor.
        ranges: (name, flat offset, 1-D values); together they must cover every tensor exactly once.

    Returns what was meant to be written, by file. ValueError when the ranges do not cover the tensors.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in sizes}
    storage: dict[MetadataIndex, Any] = {}
    with checksummed(folder / _FILE) as stream:
        for name, offset, values in ranges:
            assert values.dtype == torch.float32 and values.dim() == 1, name
            start = stream.tell()
            whole = values.untyped_storage().nbytes() == values.nbytes
            torch.save(values if whole else values.clone(), cast(IO[bytes], stream))
            chunks[name].append(ChunkStorageMetadata(torch.Size([offset]), torch.Size([values.numel()])))
            storage[MetadataIndex(name, [offset])] = _StorageInfo(_FILE, start, stream.tell() - start)
    metadata = Metadata(
        {
            name: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([sizes[name]]), parts)
            for name, parts in chunks.items()
        },
        storage_data=storage,
        storage_meta=StorageMeta(),
    )
    tensors(metadata)
    with checksummed(folder / METADATA) as index:
        index.write(pickle.dumps(metadata))
    return {_FILE: stream.entry, METADATA: index.entry}
