"""What the operations of torch.distributed carry: payload out of a rank and into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from launch.plan.operations import span_bytes

# torch's names of collectives, by what the plan calls them.
_NAMES = {
    "alltoall_base_": "exchange",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allreduce_": "all_reduce",
    "send": "send",
    "recv_": "receive",
}


def message_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, int, int]:
    """(name, bytes that leave this rank, bytes that arrive) of one operation.

    What a rank sends itself counts in neither. A sum over n ranks is a reduce-scatter of n pieces and an all-gather of
    the sums. KeyError for an operation that no job uses in a step.
    """
    operands = {arg.name: value for arg, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    name = _NAMES[func._schema.name.split("::")[1]]
    group = ProcessGroup.unbox(operands["process_group"])
    me, size = group.rank(), group.size()
    if name == "send":
        return name, _bytes(operands["tensors"]), 0
    if name == "receive":
        return name, 0, _bytes(operands["tensors"])
    if name == "exchange":
        return name, *_exchanged(operands, me)
    if name == "all_reduce":
        share = _bytes(operands["tensors"]) * (size - 1) // size
        return name, 2 * share, 2 * share
    whole, own = _gathered(name, operands)
    # To each peer its piece, or the own piece to each peer; and the same back.
    there, back = (whole - own, own * (size - 1)) if name == "reduce_scatter" else (own * (size - 1), whole - own)
    return name, there, back


def _exchanged(operands: Mapping[str, Any], me: int) -> tuple[int, int]:
    out, into = operands["input"], operands["output"]
    sent, received = operands["input_split_sizes"], operands["output_split_sizes"]
    row_out, row_in = (span_bytes(each) // each.shape[0] if each.shape[0] else 0 for each in (out, into))
    return (sum(sent) - sent[me]) * row_out, (sum(received) - received[me]) * row_in


def _gathered(name: str, operands: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the whole and of this rank's piece."""
    given, made = (_bytes(operands[key if key in operands else f"{key}s"]) for key in ("input_tensor", "output_tensor"))
    return (given, made) if name == "reduce_scatter" else (made, given)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return span_bytes(value)
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
