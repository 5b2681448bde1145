"""Names of torch's that are private, or not the same in its versions 2.11 to 2.14: no other file has any.

| here | 2.11, 2.12 | 2.13 | 2.14 |
|---|---|---|---|
| `all_gather_single` | `dist.all_gather_into_tensor` | `dist.all_gather_single`; the older name warns | as 2.13 |
| `reduce_scatter_single` | `dist.reduce_scatter_tensor` | `dist.reduce_scatter_single`; the older warns | as 2.13 |
| `FakeStore` | a class in `torch.testing._internal` | as 2.12 | of C++, and there under the same name |
| all others | private, and the same in all four | | |

Names whose modules take time to load are loaded when they are asked for. Every file may import this one, which imports
nothing of ours.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch._C._distributed_c10d import FakeProcessGroup
    from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
    from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = [
    "FakeStore",
    "FakeTensorMode",
    "OpOverload",
    "StorageInfo",
    "TorchDispatchMode",
    "all_gather_single",
    "cpu_multiplies_bf16",
    "fake_process_group",
    "reduce_scatter_single",
    "softmax_backward",
    "tree_leaves",
    "unset_fake_temporarily",
    "without_memory",
]

_LAZY = {
    "FakeProcessGroup": ("torch._C._distributed_c10d", "FakeProcessGroup"),
    "FakeStore": ("torch.testing._internal.distributed.fake_pg", "FakeStore"),
    "StorageInfo": ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}


def _renamed(name: str, before: str) -> Any:
    return getattr(dist, name) if hasattr(dist, name) else getattr(dist, before)


all_gather_single = _renamed("all_gather_single", "all_gather_into_tensor")
reduce_scatter_single = _renamed("reduce_scatter_single", "reduce_scatter_tensor")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, theirs = _LAZY[name]
    return getattr(importlib.import_module(module), theirs)


def fake_process_group(common: Any, options: Any) -> FakeProcessGroup:
    """A group without peers, as a backend's maker gets its settings (`extended_api`)."""
    # Not in torch's stubs, which torch's own fake backend calls in the same way.
    return __getattr__("FakeProcessGroup")._create_internal(common.group_rank, common.group_size, options)


def softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy, y = softmax(x, -1) -> dx."""
    return torch.ops.aten._softmax_backward_data(dy, y, -1, y.dtype)


def cpu_multiplies_bf16() -> tuple[bool, bool]:
    """Whether this CPU says that it multiplies bfloat16: by AVX-512, by AMX."""
    return torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()


def without_memory(kind: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of a subclass that answers every operation itself, because it has no memory of its own."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device, storage_size=0)
