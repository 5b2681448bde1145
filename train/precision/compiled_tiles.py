"""The quantisers of `tiles` compiled for the CPU of this machine: the same bits, in one pass over memory each.

As operations of torch, rounding is ten passes over a tensor, and most of an FP8 step. `tiles.cpp` is compiled when a
run first needs it, which takes two seconds, and kept in the user's cache, where later runs and other ranks find it.
Where there is no compiler, or where one makes other bits, `tiles` itself rounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.environment import compiler
from train.precision import tiles
from train.precision.blockwise import TILE
from train.precision.tiles import Kept

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("tiles.cpp")
# Nothing that lets a compiler reorder sums or fuse a product into one: results have the bits of torch's operations.
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-std=c++17", "-shared", "-fPIC"),
)
_X86_FLAGS = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_COMPILING_S = 60.0
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "rows": (_POINTER, _FLAG, _SIZE, _SIZE, _SIZE, _FLAG, _POINTER, _POINTER, _POINTER, _FLAG),
    "restore": (_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _FLAG),
    "columns": (_POINTER, _FLAG, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE, _FLAG, _POINTER, _FLAG),
    "blocks": (_POINTER, _FLAG, _SIZE, _SIZE, _SIZE, _FLAG, _POINTER, _FLAG),
}


def compiled_tiles(environ: Mapping[str, str] = os.environ) -> CompiledTiles | None:
    """The compiled quantisers; None where they cannot be made or have other bits than `tiles`, of which the log tells.

    environ: CXX names the compiler, g++ without it; XDG_CACHE_HOME where the user's cache is, ~/.cache without it.
    """
    try:
        words = compiler(environ)
        cache = Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        found = CompiledTiles(_library(words, cache / "halocline"))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError, AttributeError) as error:
        log.info("FP8 is rounded by torch's operations, as %s cannot be compiled here: %s", SOURCE.name, error)
        return None
    if not _agrees(found):
        log.warning("FP8 is rounded by torch's operations: %s makes other bits of %s", words[0], SOURCE.name)
        return None
    return found


def _library(words: Sequence[str], cache: Path) -> ctypes.CDLL:
    """What the compiler started by `words` makes of the source, from the cache if another process has left it there.

    A name stands for one source, one compiler and one kind of CPU: a home may be shared by machines that differ.
    """
    command = [*words, *_FLAGS, *_X86_FLAGS]
    version = subprocess.run([*words, "--version"], capture_output=True, check=True, timeout=_COMPILING_S).stdout
    parts = (SOURCE.read_bytes(), version, " ".join(command).encode(), _cpu().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    path = cache / f"tiles-{digest[:16]}.so"
    with contextlib.suppress(OSError):  # not there yet, or spoilt
        return ctypes.CDLL(str(path))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=cache)
    except OSError:
        folder = tempfile.TemporaryDirectory()
    with folder as name:
        made = Path(name) / path.name
        subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, check=True, timeout=_COMPILING_S)
        library = ctypes.CDLL(str(made))
        with contextlib.suppress(OSError):  # without a cache the next process compiles again
            made.replace(path)
    return library


def _cpu() -> str:
    """What tells kinds of CPU apart, as far as compiled code sees them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{sys.platform} {platform.machine()} {features}"


def _agrees(compiled: CompiledTiles) -> bool:
    """Whether the bits are those of `tiles`, for tiles that hold normal, subnormal and vanishing values."""
    exponents = torch.arange(3 * 5 * TILE // 2).mul_(89).remainder_(257).mul(40 / 257).sub_(20)
    x = exponents.exp2().view(3, -1) * torch.tensor([[1.0], [-1.0], [2.0**-120]])
    kept = tiles.keep_rows(x)
    return _bits(compiled.restore_rows(kept)) == _bits(tiles.restore_rows(kept)) and all(
        _bits(getattr(compiled, name)(each, power_of_two)) == _bits(getattr(tiles, name)(each, power_of_two))
        for name in ("enter_rows", "round_columns", "round_blocks")
        for each in (x, x.bfloat16())
        for power_of_two in (False, True)
    )


def _bits(found: Any) -> Any:
    """Tensors, one or several, nested as they are, by their bytes."""
    if isinstance(found, Tensor):
        return found.contiguous().view(torch.uint8).tolist()
    return [_bits(each) for each in found]


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
