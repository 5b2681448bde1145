"""The small layers that every block is made of, and the bundle of tools they are built with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.model.kernels import Kernels
from train.model.recompute import Recompute
from train.precision.grads import Sink, main_grad, run_now
from train.precision.linear import Engines, Linear, Maps


@dataclass(frozen=True)
class Backend:
    """How a model computes: the engines of its matrix products, its elementwise kernels, where weight gradients go, and
    what its backward pass computes again."""

    engines: Engines
    kernels: Kernels = field(default_factory=Kernels)
    sink: Sink = run_now
    recompute: Recompute = field(default_factory=Recompute)

    def linear(self, name: str, num_inputs: int, num_outputs: int) -> Linear:
        """`name` is the module's own, by which its engine is found."""
        return Linear(num_inputs, num_outputs, self.engines.of(name), self.sink)


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


@dataclass(frozen=True)
class Gemms:
    """What multiplies in an MLP: with gate_up, then with down."""

    up: Maps
    down: Maps


def swiglu_mlp(
    x: Tensor, row_weights: Tensor | None, gate_up: Tensor, down: Tensor, gemms: Gemms, backend: Backend
) -> Tensor:
    """(row_weights silu(x gateᵀ) (x upᵀ)) downᵀ as one autograd node; dense or grouped by what the gemms are.

    x [R, d], row_weights [R] or None, gate_up [(E,) 2f, d], down [(E,) d, f] -> [R, d]. Keeps x and the product with
    gate_up as the gemms keep their inputs; the activation is recomputed in backward (technical report, 3.3.3).
    """
    return gemms.up.mlp(gemms.down, x, row_weights, gate_up, down, backend.kernels, backend.sink)


class FeedForward(nn.Module):
    """The SwiGLU MLP of dense layers and shared experts: x [T, d] -> [T, d]."""

    def __init__(self, hidden: int, inter: int, backend: Backend) -> None:
        super().__init__()
        self.gate_up_proj = backend.linear("gate_up_proj", hidden, 2 * inter)
        self.down_proj = backend.linear("down_proj", inter, hidden)
        self.gemms = Gemms(self.gate_up_proj.engine, self.down_proj.engine)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate_up_proj.weight, self.down_proj.weight
        return swiglu_mlp(x, None, *weights, self.gemms, self.backend)
