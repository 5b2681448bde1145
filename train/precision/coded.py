"""Rows that lie in memory as they were quantised, and never as floats.

Rows that travel in E4M3 are the operand of the experts' products already. `CodedRows` is such rows as autograd sees
them: a tensor of their shape and type, so that their gradient has a place in the graph, with nothing in its own memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.torch_names import without_memory

aten = torch.ops.aten


class CodedRows(Tensor):
    """Rows [R, d] of a floating type, held as `parts`, which the engine that takes them can read.

    It can be handed on, asked for its shape, and given a gradient. NotImplementedError from every other operation:
    whoever computes with rows takes their parts.
    """

    parts: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, parts: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype) -> CodedRows:
        rows: CodedRows = without_memory(cls, shape, dtype, parts[0].device)
        rows.parts = parts
        return rows

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CodedRows({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        (rows, *others), kwargs = args, kwargs or {}
        if func is aten.detach.default or (func is aten.view.default and tuple(others[0]) == tuple(rows.shape)):
            return cls(rows.parts, rows.shape, rows.dtype)
        if func is aten.empty_like.default and kwargs.get("device") == torch.device("meta"):
            return torch.empty(rows.shape, dtype=rows.dtype, device="meta")
        raise NotImplementedError(f"{func} of rows that lie in memory as they were quantised")


def parts_of(rows: Tensor) -> tuple[Tensor, ...] | None:
    """What coded rows lie in memory as; None for rows that are floats."""
    return rows.parts if isinstance(rows, CodedRows) else None
