"""`python -m kernels.compile`: every kernel, compiled for Hopper without a GPU, with its registers and spills.

Each operation has examples here, of the sizes and types of DeepSeek-V3's job. What would be launched for them is
compiled by Triton and by ptxas, which says what a thread holds, and what of that does not fit into registers.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import (  # noqa: F401
    cross_entropy,
    fp8_rows,
    fp8_swiglu,
    fp8_values,
    places,
    rms_norm,
    rotary,
    router,
    routes,
    rows,
    sums,
    swiglu,
)
from kernels.door import VARYING, interprets, missing, triton
from kernels.operation import Launch, launch_of, names

BF16, FP32, BYTE = torch.bfloat16, torch.float32, torch.uint8
INT32, INT64 = torch.int32, torch.int64
ARCHITECTURE = 90
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_TYPES |= {torch.float8_e4m3fn: "fp8e4nv"}


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


_HEADS = _empty(1, 4096, 128, 192)
# A table of angles as pairs, how far apart its batches and tokens are.
_TABLE = (_empty(4096, 32, 2, dtype=FP32), 0, 64)

_WEIGHTS, _IDS, _COUNTS = _empty(4096, 8, dtype=FP32), _empty(4096, 8, dtype=INT64), _empty(8, 8, dtype=INT64)

# Operation -> its arguments at the sizes of V3's job, one tuple for each variant that differs as a kernel.
Examples = Mapping[str, Callable[[], list[tuple[Any, ...]]]]
# The rows of four experts, and where they begin.
_SPLITS, _STARTS = (8192, 8176, 8208, 8192), _empty(5, dtype=torch.int32)
_CODES, _H_CODES = _empty(32768, 7168, dtype=torch.uint8), _empty(32768, 4096, dtype=torch.uint8)
_SCALES, _H_SCALES = _empty(32768 * 56, dtype=FP32), _empty(32768 * 32, dtype=FP32)
_OF_ROWS = _empty(32768, dtype=FP32)
EXAMPLES: Examples = {
    "fp8_columns": lambda: [(_CODES, _SCALES, _STARTS, _SPLITS, True), (_CODES, _SCALES, None, (32768,), False)],
    "fp8_encode": lambda: [(_empty(4096, 7168),)],
    "fp8_quantise": lambda: [
        (_empty(4096, 7168), 4096, both, power) for both in (False, True) for power in (False, True)
    ],
    "fp8_restore": lambda: [(_CODES, _empty(32768, 56, dtype=FP32))],
    "fp8_round": lambda: [
        (_empty(32768, 7168), _STARTS, _SPLITS, blocks, power) for blocks in (False, True) for power in (False, True)
    ],
    "fp8_swiglu_backward": lambda: [
        (_empty(32768, 2048), _H_CODES, _H_SCALES, _OF_ROWS, _STARTS, _SPLITS, power, power) for power in (False, True)
    ],
    "fp8_swiglu_forward": lambda: [(_empty(32768, 4096), _OF_ROWS, _STARTS, _SPLITS, power) for power in (False, True)],
    "fp8_take": lambda: [
        (_empty(30656, 7224, dtype=torch.uint8), _empty(32768, dtype=torch.int64), _STARTS, _SPLITS, 7168)
    ],
    "rms_norm_forward": lambda: [(_empty(4096, d), _empty(d), 1e-6) for d in (7168, 1536, 512)],
    "rms_norm_backward": lambda: [
        (_empty(4096, d), _empty(4096, d), _empty(d), _empty(4096, dtype=FP32), _empty(4096, d) if d > 4096 else None)
        for d in (7168, 1536, 512)
    ],
    "swiglu_forward": lambda: [
        (_empty(32768, 4096), _empty(32768, dtype=FP32)),
        (_empty(4096, 36864), None),
    ],
    "swiglu_backward": lambda: [
        (_empty(32768, 2048), _empty(32768, 4096), _empty(32768, dtype=FP32)),
        (_empty(4096, 18432), _empty(4096, 36864), None),
    ],
    "join_heads": lambda: [(_HEADS, _empty(1, 4096, 128, 256), _empty(1, 4096, 64), *_TABLE, 192)],
    "join_heads_backward": lambda: [(_HEADS, _HEADS, _HEADS, *_TABLE, 128, 128)],
    "rotate_heads": lambda: [(_empty(1, 4096, 32, 128), _empty(1, 4096, 8, 128), *_TABLE, False)],
    "cross_entropy": lambda: [(_empty(4096, 129280), _empty(4096, dtype=INT64))],
    "cross_entropy_": lambda: [(_empty(4096, 129280), _empty(4096, dtype=INT64), 0.5)],
    "route": lambda: [
        (_empty(4096, 256, dtype=FP32), _empty(256, dtype=FP32), 1, 8, 4, 8, True, False, True, 2.5, True),
        (_empty(4096, 160, dtype=FP32), None, 1, 8, 3, 6, False, True, False, 16.0, False),
    ],
    "balance": lambda: [(_empty(1, 776, dtype=FP32), 4096, 256, 8, 4, 8, True)],
    "route_backward": lambda: [
        (_WEIGHTS, *3 * (_empty(dtype=FP32),), _empty(4096, 256, dtype=FP32), _IDS, _empty(1, 272, dtype=FP32), *how)
        for how in ((8, False, True, 2.5), (8, True, False, 16.0))
    ],
    "count_places": lambda: [
        (_IDS, None, 32, 8),
        (_IDS, None, 1, 256),
        (_empty(32768, 8, dtype=INT32), _COUNTS, 1, 4),
    ],
    "count_tree": lambda: [(_IDS, 8, 8, 4)],
    "sum_blocks": lambda: [(_empty(256, 336, dtype=INT32),)],
    "pass_on": lambda: [(_empty(8, 41, dtype=INT64), 8, 4)],
    "number_copies": lambda: [(_IDS, _empty(256, 336, dtype=INT32), _empty(336, dtype=INT64), 32, 8, 14336)],
    "number_ids": lambda: [
        (_IDS, None, _empty(256, 256, dtype=INT32), _empty(256, dtype=INT64), 32768, 1),
        (_IDS, _COUNTS, _empty(64, 4, dtype=INT32), _empty(4, dtype=INT64), 32768, 128),
    ],
    "regroup_rows": lambda: [(_COUNTS, 32768, 32768, multiple) for multiple in (1, 128)],
    "pack_routes": lambda: [(_WEIGHTS, _IDS, _empty(14336, dtype=INT32), _empty(8, dtype=INT64), 32, torch.int16)],
    "unpack_routes": lambda: [(_empty(14336, 24, dtype=torch.int16), FP32, torch.int16)],
    "spread_rows": lambda: [
        (given, _empty(4096, 4, dtype=INT32), 14336)
        for given in (_empty(4096, 7168), _empty(4096, 903, dtype=INT64), _empty(4096, 26, dtype=BYTE))
    ],
    "fold_rows": lambda: [
        (_empty(14336, 7168), _empty(4096, 4, dtype=INT32)),
        (_empty(14336, 8, dtype=FP32), _empty(4096, 4, dtype=INT32)),
    ],
    "pick_values": lambda: [(_empty(32768, dtype=FP32), _empty(4096, 8, dtype=INT32))],
    "sum_rows": lambda: [(_empty(256, 7168, dtype=FP32), BF16)],
}


@dataclass(frozen=True)
class Compiled:
    """What became of an example.

    Attributes:
        name: of the operation.
        shape: of its first operand.
        num_warps: of a program.
        num_registers: of a thread.
        spilled_bytes: of a thread, stores and loads together.
        shared_bytes: of a program.
    """

    name: str
    shape: tuple[int, ...]
    num_warps: int
    num_registers: int
    spilled_bytes: int
    shared_bytes: int


def compiled() -> Iterator[Compiled]:
    """Every example of every operation, compiled. KeyError for an operation without an example."""
    for name in names():
        for args in EXAMPLES[name]():
            launch = launch_of(name, args, {})
            shape = next(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))
            yield Compiled(name, shape, launch.num_warps, *_resources(launch))


def _resources(launch: Launch) -> tuple[int, int, int]:
    """(registers of a thread, bytes that it spills, bytes of shared memory) of a kernel."""
    target = triton.backends.compiler.GPUTarget("cuda", ARCHITECTURE, 32)
    made = triton.compile(_source(launch), target=target, options=launch.options)
    ptxas = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(ARCHITECTURE).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        words = [ptxas, "-v", f"--gpu-name=sm_{ARCHITECTURE}a", file.name, "-o", "/dev/null"]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(found) for found in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    (registers,) = re.findall(r"Used (\d+) registers", said)
    return int(registers), spilled, made.metadata.shared


def _source(launch: Launch) -> Any:
    """A launch as Triton's own launcher would have it compiled: types, and what is known of pointers and numbers."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes = {}
    parameters = launch.kernel.arg_names
    for place, (name, value) in enumerate(zip(parameters, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and (value != 1 or name in VARYING):
            types[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0 and name not in VARYING:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:  # a one, a pointer that is None
            constants[name] = value
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in parameters}
    return triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)


def main() -> int:
    """Print a line for each kernel."""
    if interprets() or (reason := missing("cuda")):
        print("kernels are compiled by Triton, not in its interpreter" if interprets() else reason, file=sys.stderr)
        return 2
    print(f"{'operation':28} {'first operand':20} {'warps':>5} {'registers':>9} {'spilled':>8} {'shared':>8}")
    for each in compiled():
        shape = " x ".join(map(str, each.shape))
        sizes = f"{each.num_warps:5} {each.num_registers:9} {each.spilled_bytes:8} {each.shared_bytes:8}"
        print(f"{each.name:28} {shape:20} {sizes}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
