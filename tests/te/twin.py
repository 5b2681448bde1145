"""Transformer Engine's own Python on a CPU: a twin of its compiled extension, and the patches that let it be imported.

Real is all of `transformer_engine` that is Python: modules, autograd, recipes, quantiser and tensor classes. Not real
are the five kernels below, written from the library's own account of its layouts, and a GPU that is claimed to be
there. What runs here is a contract with the library's Python; of its kernels' numerics it says nothing.

`install` changes torch for good: only a process of its own calls it.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

CAPABILITY = (9, 0)
TILE = 128
# What the library's Python asks of the extension as it is imported: values as the extension has them.
ENUMS: dict[str, dict[str, int]] = {
    "DType": dict(
        zip(
            ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"),
            (0, 2, 4, 5, 6, 7, 8, 10),
            strict=True,
        )
    ),
    "FP8FwdTensors": {
        f"GEMM{gemm}_{name}": 3 * (gemm - 1) + place
        for gemm in (1, 2, 3)
        for place, name in enumerate(("INPUT", "WEIGHT", "OUTPUT"))
    },
    "FP8BwdTensors": {
        f"GRAD_{name}{gemm}": 2 * (gemm - 1) + place
        for gemm in (1, 2, 3)
        for place, name in enumerate(("OUTPUT", "INPUT"))
    },
    "CommOverlapType": {"RS": 0, "AG": 1},
    "CommOverlapAlgo": {
        "BULK_OVERLAP_AG": 0,
        "BULK_OVERLAP_RS": 1,
        "SPLIT_PIPELINED_AG_P2P": 2,
        "SPLIT_PIPELINED_RS": 3,
        "SPLIT_PIPELINED_RS_P2P": 4,
        "ATOMIC_GEMM_RS": 5,
        "ATOMIC_GEMM_AG_P2P": 6,
        "ATOMIC_GEMM_RS_P2P": 7,
        "EXTERNAL_BULK_OVERLAP_AG": 8,
    },
    "Float8BlockScaleTensorFormat": {"GEMM_READY": 0, "COMPACT": 1, "INVALID": 2},
    "NVTE_Fused_Attn_Backend": {"NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2, "NVTE_No_Backend": -1},
    "NVTEQBHistogramMode": {"TWO_KERNEL": 0, "FUSED_ATOMIC": 1},
    "NVTERoutingMapFormat": {"BYTEMAP": 0, "BITMAP_U8": 1},
}
DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16, 7: torch.float8_e4m3fn, 8: torch.float8_e5m2}


class Absent:
    """Anything of the extension that has no twin: it may be named, not called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the twin of the extension has no {self.name}")

    def __int__(self) -> int:
        return 0

    __index__ = __int__

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and other.name == self.name


class _AbsentClass(type):
    def __getattr__(cls, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{cls.__name__}.{name}")


class Extension(types.ModuleType):
    """The module `transformer_engine_torch`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ENUMS:
            found: Any = enum.IntEnum(name, ENUMS[name])  # type: ignore[misc]
        elif name[0].isupper():
            found = _AbsentClass(name, (), {})
        else:
            return Absent(name)
        setattr(self, name, found)
        return found


class _Inert(types.ModuleType):
    """A module that decorates, subscripts and is inherited from without doing anything."""

    __path__: ClassVar[list[str]] = []
    __version__ = "3.8.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()


class _InertTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Triton, which the library imports and a CPU does not have."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: Any) -> Any:
        return _Inert(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


class Log:
    """What the kernels were asked for: (rows, columns, blocks or tiles, "rowwise", "columnwise" or both)."""

    def __init__(self) -> None:
        self.quantised: list[tuple[int, int, str, str]] = []

    def take(self) -> list[tuple[int, int, str, str]]:
        """Everything since the last call."""
        found, self.quantised = self.quantised, []
        return found

    @property
    def num_weights(self) -> int:
        """Weights among them: only they come in blocks."""
        return sum(kind == "blocks" for *_, kind, _ in self.quantised)


LOG = Log()


def scales(amax: Tensor, largest: float, dtype: torch.dtype, power_of_two: bool, epsilon: float) -> Tensor:
    """What a tile is multiplied by, as the library's sources compute it (common/recipe/recipe_common.cuh): the division
    rounded to nearest, the largest number of the tile's own type for what float32 cannot hold, then, for a power of
    two, every bit of the mantissa dropped; 1 for a tile of zeros or with an infinity."""
    amax = amax.clamp(min=epsilon)
    scale = torch.full_like(amax, largest) / amax
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    scale = torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
    return (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32) if power_of_two else scale


def cast(x: Tensor, height: int, width: int, quantizer: Any) -> tuple[Tensor, Tensor]:
    """x [m, n] -> (uint8 [m, n], what tiles are multiplied by to get them back [ceil(m / height), ceil(n / width)])."""
    kind = DTYPES[int(quantizer.dtype)]
    largest = torch.finfo(kind).max
    m, n = x.shape
    padded = F.pad(x.float(), (0, -n % width, 0, -m % height))
    tiles = padded.view(-(-m // height), height, -(-n // width), width)
    if tiles.numel():
        amax = tiles.abs().nan_to_num(0, torch.inf).amax((1, 3))  # a GPU's maximum passes over what is not a number
    else:
        amax = tiles.new_ones(tiles.shape[0], tiles.shape[2])
    factors = scales(amax, largest, x.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    values = (tiles * factors[:, None, :, None]).clamp(-largest, largest).to(kind)
    return values.view(padded.shape)[:m, :n].contiguous().view(torch.uint8), 1 / factors


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """The library's quantise kernel: rows, and columns stored transposed, of one tensor."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import (
        Float8BlockwiseQTensor,
        Float8BlockwiseQTensorStorage,
    )

    assert noop is None
    x = tensor.detach().reshape(-1, tensor.shape[-1])
    blocks = quantizer.block_scaling_dim == 2
    data: dict[str, Tensor | None] = {}
    for side, source, wanted in (
        ("rowwise", x, quantizer.rowwise_usage),
        ("columnwise", x.t(), quantizer.columnwise_usage),
    ):
        values, inverse = cast(source, TILE if blocks else 1, TILE, quantizer) if wanted else (None, None)
        if inverse is not None:
            # Tiles' scales lie transposed; all are padded to multiples of 4 for the product.
            inverse = inverse if blocks else inverse.t()
            inverse = F.pad(inverse, (0, -inverse.shape[1] % 4)).contiguous()
        data[f"{side}_data"], data[f"{side}_scale_inv"] = values, inverse
    sides = "+".join(side for side in ("rowwise", "columnwise") if data[f"{side}_data"] is not None)
    LOG.quantised.append((*x.shape, "blocks" if blocks else "tiles", sides))
    if out is not None:
        for name, value in data.items():
            if value is not None:
                getattr(out, f"_{name}").copy_(value.view(getattr(out, f"_{name}").shape))
        return out
    if data["rowwise_data"] is not None:
        data["rowwise_data"] = data["rowwise_data"].view(tensor.shape)
    common = {**data, "fp8_dtype": quantizer.dtype, "quantizer": quantizer, "is_2D_scaled": blocks}
    if quantizer.internal:
        return Float8BlockwiseQTensorStorage(fake_dtype=tensor.dtype, **common)
    return Float8BlockwiseQTensor(
        shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, device=tensor.device, **common
    )


def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """data, uint8 [m, n] -> [n, m]."""
    assert data.dtype == torch.uint8 and data.ndim == 2 and out is None
    return data.t().contiguous()


def split_quantize(
    tensor: Tensor, splits: Sequence[int], quantizers: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """One tensor for each expert."""
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(list(splits)), quantizers, strict=True)]


def dequantise(storage: Any, columns: bool) -> Tensor:
    """float32 [m, n], from the rows or from the columns of a quantised tensor."""
    side = "_columnwise" if columns else "_rowwise"
    values, inverse = getattr(storage, f"{side}_data"), getattr(storage, f"{side}_scale_inv")
    assert values is not None, f"a product asks for {side[1:]} data that was not made"
    values = values.reshape(-1, values.shape[-1]) if not columns else values.reshape(values.shape[0], -1)
    m, n = values.shape
    assert n % 16 == 0, f"a product reads rows of {n} bytes: its kernel takes multiples of 16"
    if storage._is_2D_scaled:
        factors = inverse.repeat_interleave(TILE, 0)[:m].repeat_interleave(TILE, 1)[:, :n]
    else:
        factors = inverse.t()[:m].repeat_interleave(TILE, 1)[:, :n]
    wide = values.view(DTYPES[int(storage._fp8_dtype)]).float() * factors
    return wide.t().contiguous() if columns else wide


def operand(x: Any, columns: bool) -> Tensor:
    if hasattr(x, "_rowwise_data"):
        return dequantise(x, columns)
    return x.detach().reshape(-1, x.shape[-1]).float()


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **kwargs: Any,
) -> tuple[Any, None, None, None]:
    """B Aᵀ, B A or Bᵀ A as the layout says, summed in float32; into `out` if there is one."""
    assert bias is None and quantizer is None and not gelu
    for x in (A, B):
        assert not hasattr(x, "_rowwise_data") or split_accumulator, "block scaling needs split accumulation"
    a, b = operand(A, not transa), operand(B, transb)
    left, right = (b.t(), a) if transb else (b, a.t() if transa else a)
    if accumulate:
        assert out is not None and out.dtype == torch.float32
        return out.addmm_(left, right), None, None, None
    product = torch.mm(left, right)
    if out is not None:
        return out.copy_(product), None, None, None
    shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
    return product.to(DTYPES[int(out_dtype)]).view(shape), None, None, None


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    out: list[Tensor],
    out_dtype: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: Any,
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    num_sms: int,
) -> list[Tensor]:
    """One product for each group. An empty group has no rows to give, and adds nothing to a weight's gradient."""
    outputs = list(out[0].split(list(m_splits))) if single_output else out
    for a, b, o, rows in zip(A, B, outputs, m_splits, strict=True):
        if rows:
            generic_gemm(
                *(a, transa, b, transb, o, None, out_dtype, None, None, False, None, grad, None, 0),
                *(accumulate, split_accumulator),
            )
        elif o.numel() and not accumulate:
            o.zero_()
    return bias


def _workspace(device: Any, ub: bool, grouped_gemm: bool) -> Any:
    return [torch.empty(1)] if grouped_gemm else torch.empty(1)


def install(capability: tuple[int, int] = CAPABILITY) -> Any:
    """Import the library over the twin, and claim that there is a GPU. Returns `transformer_engine.pytorch`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the library does not look for its compiled core
    try:
        import triton  # noqa: F401
    except ImportError:
        sys.meta_path.append(_InertTriton())
    extension = Extension("transformer_engine_torch")
    for kernel in (quantize, fp8_transpose, split_quantize, generic_gemm, te_general_grouped_gemm):
        setattr(extension, kernel.__name__, kernel)
    properties = types.SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132, name="twin", total_memory=2**36
    )
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: sys.modules.__setitem__("transformer_engine_torch", extension)
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.cpp_extensions import gemm

    gemm.get_cublas_workspace, gemm.get_sm_count, gemm._empty_tensor = _workspace, lambda: 132, lambda: torch.empty(0)

    def library_asks(*_: Any) -> bool:
        # Nobody else is told so: torch itself would ask a GPU for pinned memory.
        return sys._getframe(1).f_globals["__name__"].startswith("transformer_engine")

    torch.cuda.is_available = library_asks
    torch.cuda.get_device_capability = lambda *_: capability
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: False
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    torch.version.cuda = "13.0"
    torch.Tensor.is_cuda = property(library_asks)
    return te
