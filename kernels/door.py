"""The door to Triton, which CUDA builds of torch bring along (torch 2.11 to 2.14: Triton 3.5 to 3.8).

Without it operations can still be traced, as shapes and bytes; they cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

triton: Any = None
tl: Any = None
try:
    import triton as _triton
    import triton.language as _language
except ImportError:
    pass
else:
    triton, tl = _triton, _language


# Parameters whose numbers change from batch to batch. Triton compiles a kernel anew for numbers that are one, or
# multiples of 16, unless it is told not to: a step in the middle of a run would wait for the compiler.
VARYING = {"num_rows", "num_copies", "num_tokens", "num_tiles", "num_blocks"}


def jit(function: Callable[..., Any]) -> Any:
    """Triton's compiler for the function; without Triton the function, which nothing calls."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in VARYING])


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, so that they take tensors of a CPU."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def missing(device: torch.device | str) -> str | None:
    """Why kernels cannot run on this kind of device, in words for people; None if they can."""
    if triton is None:
        return "Triton is not installed: pip install 'halocline[kernels]' (CUDA builds of torch bring it along)"
    if torch.device(device).type != "cuda" and not interprets():
        return "Triton computes on GPUs; on a CPU only in its interpreter (TRITON_INTERPRET=1), for tests"
    return None
