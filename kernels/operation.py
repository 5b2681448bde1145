"""Kernels as operations of torch's: one function says what an operation gives out, and how its kernel is launched.

Whoever needs only a part of that takes it from there: a run launches the kernel, a trace without values has the shapes
and the bytes (`launch/plan`), and `kernels.compile` compiles what would be launched. One operation is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "halocline"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_PLANS: dict[str, Plan] = {}


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is launched with.

    Attributes:
        kernel: a function of Triton's, made by `door.jit`.
        grid: how many programs run, in up to three dims.
        arguments: tensors and numbers, in the order of the kernel's parameters.
        constants: parameters that are compiled in.
        num_warps: of a program, 32 threads each.
        read_bytes, written_bytes: of memory, where that is not all of every operand and result once; operations on rows
            that are chosen by an index say it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    read_bytes: int | None = None
    written_bytes: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told beside constants. Its versions differ in what they fuse unless it is said."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the current stream of its tensors' device; nothing to do is no launch."""
        if all(self.grid):
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


# The operation's arguments -> what it returns (a tensor, a tuple of them or None), and the launch that fills it.
Plan = Callable[..., tuple[Any, Launch]]


def operation(schema: str) -> Callable[[Plan], Callable[..., Any]]:
    """Make the decorated plan an operation of torch's: its schema, in torch's words, without the namespace.

    A plan may look at shapes, strides and types, never at values. It allocates what it returns and nothing else.
    """

    def register(plan: Plan) -> Callable[..., Any]:
        name = schema[: schema.index("(")]

        def run(*args: Any, **kwargs: Any) -> Any:
            results, launch = plan(*args, **kwargs)
            launch.run()
            return results

        def shapes(*args: Any, **kwargs: Any) -> Any:
            return plan(*args, **kwargs)[0]

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, run, device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_LIBRARY)
        _PLANS[name] = plan
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def launch_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Launch:
    """What the operation of that name launches for these arguments, which may be tensors without values."""
    return _PLANS[name](*args, **kwargs)[1]


def names() -> list[str]:
    """All operations that are known; a file's become known when it is imported."""
    return sorted(_PLANS)


def as_rows(x: Tensor) -> Tensor:
    """x [..., d], whose last dim is dense, as [rows, d]: a view wherever the rows are equally far apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def power_of_two(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << max(0, number - 1).bit_length()
