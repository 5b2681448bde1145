"""The one door to `safetensors`: shards written range by range, folders of shards read range by range.

A file is the length of its header, the header (JSON: type, shape and place of each tensor) and the tensors' bytes
without gaps. The library reads and judges headers; the bytes are moved here, because it wants whole tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint.flat import checksummed
from train.checkpoint.ranges import read_exactly
from train.checkpoint.step_folders import FileRecord

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Spec:
    """A tensor on disk. dtype: a value of `DTYPES`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(path: Path, specs: Sequence[Spec], ranges: Iterable[Tensor]) -> FileRecord:
    """Write one file whose tensors come as consecutive ranges, in the order of `specs`; what was meant to be written.

    The file is synced to disk. Only the range at hand is in memory.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        place = [end, end := end + spec.num_bytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    written = 0
    with checksummed(path) as stream:
        stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for values in ranges:
            stream.write(memoryview(cast(Any, values.contiguous().flatten().view(torch.uint8).numpy())))
            written += values.nbytes
    assert written == end, f"{path.name}: {written} bytes came, {end} were announced"
    return stream.entry


def write_index(path: Path, files: Mapping[str, Sequence[Spec]]) -> FileRecord:
    """Write the index of a folder: which file holds which tensor, and the bytes of all."""
    body = {
        "metadata": {"total_size": sum(spec.num_bytes for specs in files.values() for spec in specs)},
        "weight_map": dict(sorted((spec.name, file) for file, specs in files.items() for spec in specs)),
    }
    with checksummed(path) as stream:
        stream.write(json.dumps(body, indent=2).encode() + b"\n")
    return stream.entry


def read_specs(path: Path) -> dict[str, tuple[Spec, int]]:
    """Name to tensor, and where in the file it starts. ValueError for a file that is damaged, cut or of other types."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            found = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        with path.open("rb") as raw:
            offset = _LENGTH_BYTES + int.from_bytes(raw.read(_LENGTH_BYTES), "little")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    specs = {}
    for name, (dtype, shape) in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {dtype}, not one of {', '.join(DTYPES)}")
        specs[name] = Spec(name, DTYPES[dtype], shape), offset
        offset += specs[name][0].num_bytes
    return specs


class TensorFolder:
    """The tensors of a folder of shards, or of its single file; `with TensorFolder(path) as folder`.

    Raises ValueError, naming the file, when there is none or one is damaged, cut, or not what the index says.
    """

    def __init__(self, path: Path) -> None:
        self._open: dict[Path, IO[bytes]] = {}
        self._places: dict[str, tuple[Path, Spec, int]] = {}
        for file, promised in _files(path).items():
            specs = read_specs(file)
            if lacking := sorted(promised - set(specs)):
                raise ValueError(f"{file} lacks {some(lacking)}, which {INDEX} promises in it")
            for name, (spec, offset) in specs.items():
                if name in self._places:
                    raise ValueError(f"{name} lies in {self._places[name][0].name} and again in {file.name}")
                self._places[name] = file, spec, offset

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: spec for name, (_, spec, _) in self._places.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or consecutive rows of it, in its type on disk."""
        path, spec, offset = self._places[name]
        shape = spec.shape
        if rows is not None:
            offset += rows.start * math.prod(shape[1:]) * spec.dtype.itemsize
            shape = (rows.stop - rows.start, *shape[1:])
        if path not in self._open:
            self._open[path] = path.open("rb")
        values = torch.empty(shape, dtype=spec.dtype)
        read_exactly(self._open[path], offset, values.flatten())
        return values


def _files(folder: Path) -> dict[Path, set[str]]:
    """Every file of tensors, and the names that the index promises in it."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ValueError(f"{folder} holds neither {INDEX} nor {SINGLE}: there are no weights to import")
        return {folder / SINGLE: set()}
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        found: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            found.setdefault(folder / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read: {type(error).__name__}: {error}") from None
    if outside := sorted(str(file) for file in found if file.parent != folder):
        raise ValueError(f"{index} names {outside[0]}, which is not a file of its folder")
    return dict(sorted(found.items()))


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
