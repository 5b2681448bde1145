"""The small layers that every block is made of, and the bundle of tools they are built with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.model.attention.cores import Core, TorchCore
from train.model.kernels import Kernels
from train.model.recompute import Recompute
from train.precision.engine import Engine, Mlp
from train.precision.grads import Sink, main_grad, run_now
from train.precision.linear import Linear


@dataclass(frozen=True)
class Backend:
    """How a model computes.

    Attributes:
        engines: who multiplies, by module: the last part of its name, an expert's with "experts." before it.
        kernels: what is computed element by element.
        sink: where gradients of weights go.
        recompute: what the backward pass computes again.
        core: who computes attention's core.
    """

    engines: Mapping[str, Engine]
    kernels: Kernels = field(default_factory=Kernels)
    sink: Sink = run_now
    recompute: Recompute = field(default_factory=Recompute)
    core: Core = field(default_factory=TorchCore)

    def linear(self, name: str, num_inputs: int, num_outputs: int) -> Linear:
        """A linear layer whose engine is found by its module's `name`. KeyError for a name without one."""
        return Linear(num_inputs, num_outputs, self.engines[name], self.sink, self.recompute.offer_form)


class RMSNorm(nn.Module):
    """x [..., d] -> x / sqrt(mean(x²) + eps) * weight."""

    def __init__(self, width: int, eps: float, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.kernels = eps, backend.kernels
        self.offer = backend.recompute.offer("norm")

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernels.rms_norm(x, self.weight, self.eps)
        self.offer(self._rebuild, (y,), (x,))
        return y

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself, as a residual goes on, and its norm: the gradients of both are one sum, in one pass."""
        residual, y = self.kernels.rms_norm_beside(x, self.weight, self.eps)
        self.offer(self._rebuild, (y,), (x,))
        return residual, y

    def _rebuild(self, x: Tensor) -> tuple[Tensor]:
        return (self.kernels.rms_norm_forward(x, self.weight, self.eps)[0],)


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.sink = weight, sink
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (tokens,), buffer = ctx.saved_tensors, main_grad(ctx.weight)
        rows = dy.reshape(-1, dy.shape[-1]).to(buffer.dtype)
        ctx.sink(partial(buffer.index_add_, 0, tokens.reshape(-1), rows))
        return None, None, None


class Embedding(nn.Module):
    """tokens [...] -> rows of the table [..., hidden]. The gradient touches only the rows looked up."""

    def __init__(self, num_rows: int, width: int, backend: Backend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        self.sink = backend.sink

    def forward(self, tokens: Tensor) -> Tensor:
        return _EmbeddingFunction.apply(tokens, self.weight, self.sink)


class FeedForward(nn.Module):
    """The SwiGLU MLP of dense layers and shared experts: x [T, d] -> [T, d]."""

    def __init__(self, hidden: int, inter: int, backend: Backend) -> None:
        super().__init__()
        self.gate_up_proj = backend.linear("gate_up_proj", hidden, 2 * inter)
        self.down_proj = backend.linear("down_proj", inter, hidden)
        self.kernels, self.sink = backend.kernels, backend.sink

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        return Mlp(up.weight, down.weight, up.engine, down.engine, self.kernels, self.sink, up.offer)(x)
