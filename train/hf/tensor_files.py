"""The one door to `safetensors`: shards written range by range, folders of shards read range by range.

The library reads. It writes whole tensors only, which need not fit into memory here, so files are written by hand: the
length of the header, the header (JSON: type, shape and place of each tensor) and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.files import CRC32, FileRecord, SummedFile, write_durably

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
# What is read of a file counts as the process's memory until the library closes it; so many bytes at most.
_MAX_MAPPED_BYTES = 1 << 22


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
    with SummedFile(path, CRC32) as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for values in ranges:
            file.write(memoryview(cast(Any, values.contiguous().flatten().view(torch.uint8).numpy())))
            written += values.nbytes
    assert written == end, f"{path.name}: {written} bytes came, {end} were announced"
    return file.record


def write_index(path: Path, files: Mapping[str, Sequence[Spec]]) -> FileRecord:
    """Write the index of a folder: which file holds which tensor, and the bytes of all."""
    body = {
        "metadata": {"total_size": sum(spec.num_bytes for specs in files.values() for spec in specs)},
        "weight_map": dict(sorted((spec.name, file) for file, specs in files.items() for spec in specs)),
    }
    return write_durably(path, json.dumps(body, indent=2).encode() + b"\n", CRC32)


def read_specs(path: Path) -> dict[str, Spec]:
    """Name to tensor, in the file's order. ValueError for a file that is damaged, cut or of other types."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            found = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for name, (dtype, _) in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {dtype}, not one of {', '.join(DTYPES)}")
    return {name: Spec(name, DTYPES[dtype], shape) for name, (dtype, shape) in found.items()}


class TensorFolder:
    """The tensors of a folder of shards, or of its single file; `with TensorFolder(path) as folder`.

    Raises ValueError, naming the file, when there is none or one is damaged, cut, or not what the index says.
    """

    def __init__(self, path: Path) -> None:
        self.specs: dict[str, Spec] = {}
        self._paths: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._mapped_bytes = 0
        for file, promised in _files(path).items():
            specs = read_specs(file)
            if lacking := sorted(promised - set(specs)):
                raise ValueError(f"{file} lacks {some(lacking)}, which {INDEX} promises in it")
            for name, spec in specs.items():
                if name in self.specs:
                    raise ValueError(f"{name} lies in {self._paths[name].name} and again in {file.name}")
                self.specs[name], self._paths[name] = spec, file

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or consecutive rows of it, in its type on disk: a view of the file, which is read on use."""
        values = self._file(self._paths[name]).get_slice(name)[rows or slice(None)]
        self._mapped_bytes += values.nbytes
        return values

    def _file(self, path: Path) -> Any:
        """The file opened by the library, which maps it into memory; anew when too much of it may have been touched."""
        if self._open is None or self._open[0] != path or self._mapped_bytes > _MAX_MAPPED_BYTES:
            self._close()
            self._open = path, safe_open(path, framework="pt").__enter__()
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
        self._open, self._mapped_bytes = None, 0


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


def all_finite(values: Tensor) -> bool:
    """Whether no element is infinite or NaN, found without another tensor of their size."""
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
