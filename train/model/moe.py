"""The mixture of experts as nodes: route | dispatch | compute | combine | aggregate.

How tokens reach the ranks of their experts is not known here: a `Dispatch` is handed in. Letters: T tokens of this
rank, K experts per token, R rows that this rank's experts received.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.layers import Backend, FeedForward, swiglu_mlp
from train.model.router import Router

Result = TypeVar("Result")


class Plan(Protocol):
    """What a dispatch remembers for combine and for the backward; frozen."""

    @property
    def tokens_per_expert(self) -> list[int]:
        """Rows of each local expert, in order."""
        ...


class Dispatch(Protocol):
    """Moves tokens to the experts and back. Plain tensors, no autograd.

    Every method is a generator that yields once after each communication it has launched and returns its result, so
    that a pipeline can interleave two of them; `drive` runs one to its end.
    """

    num_local_experts: int
    first_expert: int

    def dispatch(
        self, x: Tensor, weights: Tensor, indices: Tensor
    ) -> Generator[None, None, tuple[Tensor, Tensor, Any]]:
        """x [T, d], weights and indices [T, K] -> rows [R, d] sorted by local expert, their weights [R], a `Plan`."""
        ...

    def combine(self, rows: Tensor, plan: Any) -> Generator[None, None, Tensor]:
        """rows [R, d] -> the plain sum of each token's rows [T, d]."""
        ...

    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, plan: Any
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """Gradients of rows [R, d] and of their weights [R] -> of x [T, d] and of weights [T, K]."""
        ...

    def combine_backward(self, dy: Tensor, plan: Any) -> Generator[None, None, Tensor]:
        """Gradient of the combined tokens [T, d] -> of the rows [R, d]."""
        ...


def drive(steps: Generator[None, None, Result]) -> Result:
    """Run a communicating generator to its end, waiting at every step."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class _DispatchFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, indices: Tensor, dispatch: Dispatch) -> Any:
        rows, row_weights, ctx.plan = drive(dispatch.dispatch(x, weights, indices))
        ctx.dispatch = dispatch
        return rows, row_weights, ctx.plan

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_row_weights: Tensor, _: None) -> Any:
        dx, d_weights = drive(ctx.dispatch.dispatch_backward(d_rows, d_row_weights, ctx.plan))
        return dx, d_weights, None, None


class _CombineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Any, dispatch: Dispatch) -> Tensor:
        ctx.plan, ctx.dispatch = plan, dispatch
        return drive(dispatch.combine(rows, plan))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return drive(ctx.dispatch.combine_backward(dy, ctx.plan)), None, None


class Experts(nn.Module):
    """The routed experts that live on this rank, as stacked weights."""

    def __init__(self, num_local: int, hidden: int, inter: int, backend: Backend) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * inter, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, inter))
        self.backend = backend

    def forward(self, rows: Tensor, row_weights: Tensor, tokens_per_expert: list[int]) -> Tensor:
        """rows [R, d] sorted by expert, row_weights [R] -> weighted outputs [R, d].

        The weight is applied before the down projection, so that combining is a plain sum on any route.
        """
        gemm = self.backend.engine.grouped(tokens_per_expert)
        return swiglu_mlp(rows, row_weights, self.gate_up_proj, self.down_proj, gemm, self.backend)


class MoE(nn.Module):
    """Routed experts beside shared experts that see every token (Eq. 12)."""

    def __init__(self, config: ModelConfig, dispatch: Dispatch, backend: Backend) -> None:
        super().__init__()
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        self.exchange = dispatch
        self.gate = Router(config, backend)
        self.experts = Experts(dispatch.num_local_experts, hidden, inter, backend)
        self.shared_experts = FeedForward(hidden, config.n_shared_experts * inter, backend)

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Differentiable `Dispatch.dispatch`."""
        return _DispatchFunction.apply(x, weights, indices, self.exchange)

    def compute(self, rows: Tensor, row_weights: Tensor, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
        """Routed experts on the received rows [R, d], shared experts on this rank's own tokens x [T, d]."""
        return self.experts(rows, row_weights, plan.tokens_per_expert), self.shared_experts(x)

    def combine(self, rows: Tensor, plan: Plan) -> Tensor:
        """Differentiable `Dispatch.combine`."""
        return _CombineFunction.apply(rows, plan, self.exchange)
