"""Where gradients arrive: `main_grad`, a wide accumulator beside every parameter.

A weight gradient is a closure handed to a `Sink`. The default runs it at once; a pipeline hands in a sink that keeps
the closures of one micro-batch until the schedule has room for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Sink = Callable[[Callable[[], None]], None]


def run_now(wgrad: Callable[[], None]) -> None:
    """The sink that defers nothing."""
    wgrad()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of accumulators, routers and internal sums: float64 beside float64, float32 beside everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def main_grad(parameter: Tensor) -> Tensor:
    """The parameter's gradient accumulator, of the parameter's shape, in `wide_dtype`."""
    buffer = getattr(parameter, "main_grad", None)
    if buffer is None:
        raise RuntimeError("a parameter has no main_grad: build an optimizer or call attach_main_grads before backward")
    return buffer


def _fold(parameter: Tensor) -> None:
    if parameter.grad is not None:
        main_grad(parameter).add_(parameter.grad)
        parameter.grad = None


def attach_main_grads(model: nn.Module) -> None:
    """Make every gradient of the model arrive in `main_grad`, and only there.

    Matrices add theirs inside their own backward; a vector that autograd accumulates (a norm's weight) gets a hook
    that moves `.grad` over. Parameters that an optimizer has not yet given a buffer get one of zeros.
    """
    for parameter in model.parameters():
        if getattr(parameter, "main_grad", None) is None:
            parameter.main_grad = torch.zeros_like(parameter, dtype=wide_dtype(parameter.dtype))  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(_fold)
