"""The quantisers of `tiles` compiled for the CPU of this machine: the same bits, in one pass over memory each.

As operations of torch, rounding is ten passes over a tensor, and most of an FP8 step. `tiles.cpp` is compiled when a
run first needs it, which takes two seconds, and kept in the user's cache, where later runs and other ranks find it.
Where there is no compiler, or where one makes other bits, `tiles` itself rounds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from train.precision import tiles
from train.precision.blockwise import TILE
from train.precision.tiles import Kept

_log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("tiles.cpp")
# Nothing that lets a compiler reorder sums or fuse a product into one: results have the bits of torch's operations.
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fopenmp", "-std=c++17", "-shared", "-fPIC"),
)
_COMPILING_S = 60.0
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "rows": (_POINTER, _FLAG, _SIZE, _SIZE, _SIZE, _FLAG, _POINTER, _POINTER, _POINTER, _FLAG),
    "restore": (_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _FLAG),
    "columns": (_POINTER, _FLAG, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _FLAG, _POINTER, _FLAG),
    "blocks": (_POINTER, _FLAG, _SIZE, _SIZE, _SIZE, _FLAG, _POINTER, _FLAG),
}


def compiled_tiles(environ: Mapping[str, str] = os.environ) -> CompiledTiles | None:
    """The compiled quantisers; None where they cannot be made or do not agree with `tiles`, of which the log tells."""
    command = [*(shlex.split(environ.get("CXX", "")) or ["g++"]), *FLAGS]
    try:
        library = _library(command, _cache(environ))
        found = CompiledTiles(library)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.info("FP8 is rounded by torch's operations, since %s cannot be compiled here: %s", SOURCE.name, error)
        return None
    if not _agrees(found):
        _log.warning(
            "FP8 is rounded by torch's operations: what %s makes of %s has other bits", command[0], SOURCE.name
        )
        return None
    return found


def _cache(environ: Mapping[str, str]) -> Path:
    home = environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "halocline"


def _library(command: Sequence[str], cache: Path) -> ctypes.CDLL:
    """What the command makes of the source, from the cache if another process has left it there.

    A name stands for one source, one compiler and one kind of CPU: a home may be shared by machines that differ.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=_COMPILING_S).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(command).encode(), _cpu().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    path = cache / f"tiles-{digest[:16]}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        pass  # not there yet, or spoilt
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "tiles.so"
        subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, check=True, timeout=_COMPILING_S)
        library = ctypes.CDLL(str(made))
        _keep(made, path)
    return library


def _keep(made: Path, path: Path) -> None:
    """Copy a file into the cache, whole or not at all; without a cache the next process compiles again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as copy:
            copy.write(made.read_bytes())
        os.replace(copy.name, path)
    except OSError as error:
        _log.info("%s is not kept for later runs: %s", path.name, error)


def _cpu() -> str:
    """What tells kinds of CPU apart, as far as compiled code sees them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{sys.platform} {platform.machine()} {features}"


def _agrees(compiled: CompiledTiles) -> bool:
    """Whether the bits are those of `tiles`, over magnitudes that reach every corner of the format."""
    x = torch.linspace(-20, 20, 3 * TILE * 5 // 2).exp2().view(3, -1).mul_(torch.tensor([[1.0], [-1.0], [2.0**-120]]))
    return all(
        torch.equal(getattr(compiled, name)(each, power_of_two), getattr(tiles, name)(each, power_of_two))
        for name in ("round_rows", "round_columns", "round_blocks")
        for each in (x, x.bfloat16())
        for power_of_two in (False, True)
    )


def _read(x: Tensor) -> tuple[Tensor, int]:
    """(x as the library reads it: bfloat16 or float32, elements of a row side by side; whether it is bfloat16)."""
    x = x if x.dtype in (torch.bfloat16, torch.float32) else x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.dtype == torch.bfloat16


def _matrix(x: Tensor) -> Tensor:
    """x [..., k] -> [m, k]; a view of everything contiguous."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


class CompiledTiles:
    """`tiles`, compiled; its functions are told there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """AttributeError for a library that is another one."""
        self._functions = {name: getattr(library, f"halocline_{name}") for name in _ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], None

    def round_rows(self, x: Tensor, power_of_two: bool = False) -> Tensor:
        out = torch.empty(x.shape)
        self._rows(x, power_of_two, out, None)
        return out

    def keep_rows(self, x: Tensor, power_of_two: bool = False) -> Kept:
        kept = _new_kept(x)
        self._rows(x, power_of_two, None, kept)
        return kept

    def enter_rows(self, x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Kept]:
        out, kept = torch.empty(x.shape), _new_kept(x)
        self._rows(x, power_of_two, out, kept)
        return out, kept

    def _rows(self, x: Tensor, power_of_two: bool, out: Tensor | None, kept: Kept | None) -> None:
        rows, is_bf16 = _read(_matrix(x))
        values, scales = kept or (None, None)
        places = (None if each is None else each.data_ptr() for each in (out, values, scales))
        self._functions["rows"](
            rows.data_ptr(), is_bf16, rows.stride(0), *rows.shape, power_of_two, *places, torch.get_num_threads()
        )

    def restore_rows(self, kept: Kept) -> Tensor:
        values, scales = (each.contiguous() for each in kept)
        out = torch.empty(values.shape)
        self._functions["restore"](
            values.data_ptr(), scales.data_ptr(), *_matrix(values).shape, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def round_columns(self, x: Tensor, power_of_two: bool = False) -> Tensor:
        return self.round_group_columns(x, [slice(0, len(x))], power_of_two)[0]

    def round_group_columns(self, x: Tensor, groups: Sequence[slice], power_of_two: bool = False) -> list[Tensor]:
        x, is_bf16 = _read(x)
        lengths = [rows.stop - rows.start for rows in groups]
        out = torch.empty(sum(lengths), x.shape[1])
        numbers = ctypes.c_int64 * len(groups)
        self._functions["columns"](
            *(x.data_ptr(), is_bf16, x.stride(0), x.shape[1]),
            *(numbers(*(rows.start for rows in groups)), numbers(*lengths), len(groups)),
            *(power_of_two, out.data_ptr(), torch.get_num_threads()),
        )
        return list(out.split(lengths))

    def round_blocks(self, weight: Tensor, power_of_two: bool = False, out: Tensor | None = None) -> Tensor:
        out = torch.empty(weight.shape) if out is None else out
        x, is_bf16 = _read(weight.contiguous())
        num, (n, k) = x.shape[:-2].numel(), x.shape[-2:]
        self._functions["blocks"](
            x.data_ptr(), is_bf16, num, n, k, power_of_two, out.data_ptr(), torch.get_num_threads()
        )
        return out


def _new_kept(x: Tensor) -> Kept:
    scales = torch.empty(*x.shape[:-1], -(-x.shape[-1] // TILE))
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn), scales
