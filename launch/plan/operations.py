"""What one operation of torch's asks of a device: floating-point operations, bytes of memory, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kernels.operation import NAMESPACE, launch_of
from launch.plan.events import Kernel
from launch.plan.fp8 import LIBRARY, library_sizes
from parallel.torch_names import OpOverload

# Operations that give out memory or name it anew; those that only make views say so themselves.
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach"),
    *("_unsafe_view", "_reshape_alias", "resize_", "set_", "is_set_to", "is_same_size", "device"),
}
# Operations that overwrite their first operand without reading it.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}
# Operations that read only the rows named by an index, which are as many as they give out.
_TAKING = {"index_select", "embedding", "gather", "index", "take"}
# Operations that write only the places named by an index, which are as many as they are given.
_PUTTING = {"index_copy_", "index_add_", "index_put_", "scatter_", "scatter_add_", "scatter_reduce_"}
# Of a product: where its two factors stand among the operands.
_FACTORS = {
    **dict.fromkeys(("mm", "bmm", "_grouped_mm", "mv", "dot", "vdot"), (0, 1)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"), (1, 2)),
}


def kernel_of(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Kernel | None:
    """The device's work in `func(*args, **kwargs)`, which returned `out`; None where there is none.

    Every byte of an operand is read once and every byte of a result written once, whatever a cache might spare. An
    operand that is spread over a dim by a stride of zero counts once. In an index operation only the rows count that it
    touches. FLOPs are those of torch's own counter where it has a formula, of causal attention half.
    """
    name = func._schema.name.split("::")[1]
    if name in _FREE or func.is_view:
        return None
    operands = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    results = list(tensors_of(out))
    found = [*tensors_of(list(operands.values())), *results]
    if not found or any(tensor.device.type == "meta" for tensor in found):
        return None
    if func.namespace == NAMESPACE:
        read, written = _kernels_traffic(name, args, kwargs, results)
    else:
        read, written = _traffic(func, name, operands, results)
    common: dict[str, Any] = {"dtype": _dtype(operands, results), "read_bytes": read, "written_bytes": written}
    if func.namespace == LIBRARY and name in ("multiply", "multiply_add"):
        sizes = library_sizes(name, operands)
        flops = 2 * math.prod(sizes[1:])
        return Kernel(name=f"fp8_{name}", work="product", sizes=sizes, flops=flops, **common)
    if "scaled_dot_product" in name:
        return _attention(name, operands, common)
    if name in _FACTORS:
        first, second = (args[place] for place in _FACTORS[name])
        sizes = _product_sizes(first, second, groups=name == "_grouped_mm")
        factors = {**common, "dtype": str(first.dtype).removeprefix("torch.")}
        flops = _flops(func, args, kwargs, out, 2 * math.prod(sizes) // (sizes[0] if name == "_grouped_mm" else 1))
        # With a vector it is a pass over the matrix.
        work = "product" if min(sizes[1:3]) > 1 else "move"
        return Kernel(name=name, work=work, sizes=sizes if work == "product" else (), flops=flops, **factors)
    return Kernel(name=name, work="move", sizes=(), flops=0, **common)


def _flops(func: Any, args: Any, kwargs: Any, out: Any, otherwise: int) -> int:
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return otherwise
    # The type of the result is no size.
    sizes = {key: value for key, value in kwargs.items() if key != "out_dtype"}
    return int(formula(*(arg for arg in args if not isinstance(arg, torch.dtype)), **sizes, out_val=out))


def _product_sizes(first: Tensor, second: Tensor, groups: bool) -> tuple[int, int, int, int]:
    """(groups, m, n, k) of [.., m, k] times [.., k, n]; m of all groups together where rows are grouped."""
    if groups:
        return second.shape[0], first.shape[0], second.shape[-1], first.shape[-1]
    if first.dim() == 1:
        return 1, 1, 1, first.shape[0]
    count = first.shape[0] if first.dim() == 3 else 1
    return count, first.shape[-2], second.shape[-1] if second.dim() > 1 else 1, first.shape[-1]


def _attention(name: str, operands: Mapping[str, Any], common: dict[str, Any]) -> Kernel:
    q, k, v = (operands[each] for each in ("query", "key", "value"))
    (batch, heads, queries, qk_width), keys, v_width = q.shape, k.shape[2], v.shape[3]
    backward = "backward" in name
    # A head of keys may serve several heads of queries: the work is that of the queries.
    shapes = q.shape, (batch, heads, keys, qk_width), (batch, heads, keys, v_width)
    if backward:
        flops = sdpa_backward_flop_count((batch, heads, queries, v_width), *shapes)
    else:
        flops = sdpa_flop_count(*shapes)
    if operands.get("is_causal"):
        flops //= 2
    sizes = (batch, heads, queries, keys, qk_width, v_width)
    # Where it is not said which device computes, the name of the kernel is that of all devices.
    plain = name.removesuffix("_backward").removesuffix("_for_cpu") + ("_backward" if backward else "")
    return Kernel(name=plain, work="attention", sizes=sizes, flops=int(flops), backward=backward, **common)


def _traffic(func: Any, name: str, operands: Mapping[str, Any], results: list[Tensor]) -> tuple[int, int]:
    """(bytes read, bytes written)."""
    arguments = func._schema.arguments
    mutated = {arg.name for arg in arguments if arg.alias_info is not None and arg.alias_info.is_write}
    overwritten = {arg.name for arg in arguments if arg.is_out}
    if name in _OVERWRITING:
        overwritten.add(arguments[0].name)
    first = operands.get(arguments[0].name) if arguments else None
    made = sum(map(span_bytes, results)) if not mutated else 0
    if name in _TAKING:
        others = _bytes_of(value for key, value in operands.items() if key != arguments[0].name)
        return others + made, made
    if name.startswith("_embedding_bag"):
        rows = operands["indices"].numel() * first.shape[1] * first.element_size() if first is not None else 0
        return rows + _bytes_of(value for key, value in operands.items() if key != arguments[0].name), made
    if name in _PUTTING and isinstance(first, Tensor):
        others = _bytes_of(value for key, value in operands.items() if key != arguments[0].name)
        index = next(value for key, value in operands.items() if key in ("index", "indices"))
        touched = _touched(first, index, operands)
        return others + (touched if name in ("index_add_", "scatter_add_", "scatter_reduce_") else 0), touched
    read = _bytes_of(value for key, value in operands.items() if key not in overwritten)
    written = _bytes_of(value for key, value in operands.items() if key in mutated and not _only_read(name, key))
    return read, written + made


def _kernels_traffic(name: str, args: Any, kwargs: Any, results: list[Tensor]) -> tuple[int, int]:
    """(bytes read, bytes written) by a kernel of our own."""
    launch = launch_of(name, args, kwargs)
    given = {id(tensor) for tensor in results}
    read = _bytes_of(tensor for tensor in tensors_of([*args, *kwargs.values()]) if id(tensor) not in given)
    written = _bytes_of(results)
    return (
        read if launch.read_bytes is None else launch.read_bytes,
        written if launch.written_bytes is None else launch.written_bytes,
    )


def _only_read(name: str, key: str) -> bool:
    """Whether an operand that may be written is only read: torch's fused optimizers scale gradients if asked to."""
    return name.startswith("_fused_") and key == "grads"


def _touched(target: Tensor, index: Any, operands: Mapping[str, Any]) -> int:
    """Bytes of `target` that an index operation reaches."""
    given = next((operands[key] for key in ("source", "src", "values") if isinstance(operands.get(key), Tensor)), None)
    count = given.numel() if given is not None and given.numel() > 1 else sum(i.numel() for i in tensors_of(index))
    return min(count, target.numel()) * target.element_size()


def _bytes_of(values: Any) -> int:
    return sum(span_bytes(tensor) for tensor in tensors_of(list(values)))


def span_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that lie in memory: a dim of stride zero repeats one."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return count * tensor.element_size()


def _dtype(operands: Mapping[str, Any], results: list[Tensor]) -> str:
    """That of the operands: the first that is of floats, else the first of all."""
    tensors = [*tensors_of(list(operands.values())), *results]
    chosen = next((tensor for tensor in tensors if tensor.is_floating_point()), tensors[0])
    return str(chosen.dtype).removeprefix("torch.")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)
