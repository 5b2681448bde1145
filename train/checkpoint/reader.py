"""Reads the tensors of a checkpoint: any ranges of them, whatever ranges were saved, and just the bytes asked for.

The files are those of torch.distributed.checkpoint (DCP). Its own reader loads every saved range whole that a request
touches; here the bytes go from the file to where they are wanted. No code from a checkpoint is run.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from parallel.torch_names import StorageInfo
from train.checkpoint.ranges import Pieces, check_ranges

METADATA = ".metadata"
# A checkpoint of thousands of ranks has as many files, and a process may not have that many open.
_MAX_OPEN_FILES = 64
# Elements that are in memory at a time where they are converted, or copied to another device.
_BAND_NUMEL = 1 << 22
# Of a member of a zip archive: its local header before the name, and where the lengths of name and extra field stand.
_ZIP_HEADER_BYTES, _ZIP_LENGTHS = 30, slice(26, 30)

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


def read_metadata(folder: Path) -> Metadata:
    """DCP's index of a checkpoint; ValueError when it cannot be what a save wrote."""
    path = folder / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} does not hold a checkpoint's metadata")
    return metadata


@dataclass(frozen=True)
class SavedTensor:
    """A global tensor in a checkpoint: `numel` elements, saved as ranges that start at `offsets`, in order."""

    name: str
    numel: int
    dtype: torch.dtype
    offsets: tuple[int, ...]

    def end(self, index: int) -> int:
        """Where the range ends that starts at `offsets[index]`."""
        return self.offsets[index + 1] if index + 1 < len(self.offsets) else self.numel


def saved_tensors(metadata: Metadata) -> dict[str, SavedTensor]:
    """Every tensor by its name. ValueError when the saved ranges of one do not tile it exactly."""
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor in this checkpoint")
        ranges = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in entry.chunks)
        end = 0
        for offset, numel in ranges:
            if offset != end:
                raise ValueError(f"{name}: elements {min(offset, end)} to {max(offset, end) - 1} are not saved once")
            end += numel
        if end != entry.size[0]:
            raise ValueError(f"{name}: elements {end} to {entry.size[0] - 1} are not saved")
        found[name] = SavedTensor(name, end, entry.properties.dtype, tuple(offset for offset, _ in ranges))
    return found


class RangeReader:
    """Reads ranges of a checkpoint's tensors; `with RangeReader(folder) as reader`.

    Every method raises ValueError for a checkpoint that is not what a save wrote. Compare the files with their
    checksums first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._starts: dict[tuple[str, int], int] = {}

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    @cached_property
    def _metadata(self) -> Metadata:
        return read_metadata(self._folder)

    @cached_property
    def tensors(self) -> Mapping[str, SavedTensor]:
        """Every tensor by its name."""
        return saved_tensors(self._metadata)

    def check(self, pieces: Pieces, sizes: Mapping[str, int]) -> None:
        """ValueError, in a sentence, for a name that was not saved or was saved with another size or kind of numbers.

        Floating-point types convert into each other on loading; floating point never becomes integer, or the reverse.

        sizes: name to the number of elements of the whole tensor here.
        """
        check_ranges(pieces, sizes)
        for name, parts in pieces.items():
            if sizes[name] == 0:
                continue
            if name not in self.tensors:
                raise ValueError(f"{name} is not in the checkpoint")
            saved = self.tensors[name]
            if saved.numel != sizes[name]:
                raise ValueError(f"{name} has {sizes[name]} elements here and {saved.numel} in the checkpoint")
            for part in parts:
                if part.tensor.dtype.is_floating_point != saved.dtype.is_floating_point:
                    raise ValueError(f"{name} is {part.tensor.dtype} here and {saved.dtype} in the checkpoint")

    def fill(self, pieces: Pieces) -> None:
        """Copy the checkpoint's values into `pieces`, in place; `check` them before."""
        for name, parts in pieces.items():
            for part in parts:
                if part.tensor.numel() > 0:
                    self._copy(self.tensors[name], part.offset, part.tensor.detach())

    def read(self, name: str, offset: int, numel: int) -> Tensor:
        """Elements [offset, offset + numel) of a tensor, 1-D, in the type it was saved in."""
        saved = self.tensors[name]
        values = torch.empty(numel, dtype=saved.dtype)
        self._read(saved, offset, values)
        return values

    def _copy(self, saved: SavedTensor, offset: int, target: Tensor) -> None:
        """Fill `target`, which may be of another type or on another device, with the elements from `offset` on."""
        if target.dtype == saved.dtype and target.device.type == "cpu" and target.stride(0) == 1:
            self._read(saved, offset, target)
            return
        band = torch.empty(min(target.numel(), _BAND_NUMEL), dtype=saved.dtype)
        for start in range(0, target.numel(), _BAND_NUMEL):
            part = target[start : start + _BAND_NUMEL]
            self._read(saved, offset + start, band[: len(part)])
            part.copy_(band[: len(part)])

    def _read(self, saved: SavedTensor, offset: int, target: Tensor) -> None:
        """Fill a contiguous CPU tensor of the saved type with the elements from `offset` on."""
        index, done = bisect_right(saved.offsets, offset) - 1, 0
        while done < len(target):
            start = offset + done - saved.offsets[index]
            count = min(len(target) - done, saved.end(index) - offset - done)
            file, first_byte = self._place(saved, index)
            read_exactly(file, first_byte + start * saved.dtype.itemsize, target[done : done + count])
            index, done = index + 1, done + count

    def _place(self, saved: SavedTensor, index: int) -> tuple[IO[bytes], int]:
        """The file that holds a saved range, and where its elements start there."""
        place = self._metadata.storage_data[MetadataIndex(saved.name, [saved.offsets[index]])]
        file, key = self._open(place.relative_path), (place.relative_path, place.offset)
        if key not in self._starts:
            num_bytes = (saved.end(index) - saved.offsets[index]) * saved.dtype.itemsize
            self._starts[key] = place.offset + _data_offset(file, place, num_bytes)
        return file, self._starts[key]

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[name] = (self._folder / name).open("rb")
        return self._files[name]


def read_exactly(file: IO[bytes], offset: int, target: Tensor) -> None:
    """Fill a contiguous CPU tensor with the file's bytes from `offset`. ValueError when the file ends before."""
    view = memoryview(cast(Any, target.view(torch.uint8).numpy()))
    while len(view):
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise ValueError(f"{file.name} ends {len(view)} bytes too early")
        view, offset = view[count:], offset + count


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


def _data_offset(file: IO[bytes], place: StorageInfo, num_bytes: int) -> int:
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
