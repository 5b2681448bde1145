"""The mixture of experts as nodes: route | dispatch | compute | combine | aggregate. With or without shared experts.

How tokens reach the ranks of their experts is not known here: a `Dispatch` is handed in. Letters: T tokens of this
rank, K experts per token, R rows that this rank's experts received.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig, given
from train.model.layers import Backend, FeedForward
from train.model.router import build_router
from train.model.tape import Steps
from train.precision.engine import Mlp


class Dispatch(Protocol):
    """Moves tokens to the experts and back. Plain tensors, no autograd.

    Every method is a generator that yields while rows are on their way, and yields the name of the slot that they are
    in; it returns its result. So a pipeline can interleave two of them.
    """

    num_local_experts: int
    first_expert: int

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Generator[str, None, tuple[Tensor, Tensor, Any]]:
        """x [T, d], weights and indices [T, K] -> rows [R, d] sorted by local expert, their weights [R], a plan.

        The plan is frozen and has `rows_per_expert`: rows of each local expert, in order.
        """
        ...

    def combine(self, rows: Tensor, plan: Any) -> Generator[str, None, Tensor]:
        """rows [R, d] -> the plain sum of each token's rows [T, d]."""
        ...

    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, plan: Any
    ) -> Generator[str, None, tuple[Tensor, Tensor]]:
        """Gradients of rows [R, d] and of their weights [R] -> of x [T, d] and of weights [T, K]."""
        ...

    def combine_backward(self, dy: Tensor, plan: Any) -> Generator[str, None, Tensor]:
        """Gradient of the combined tokens [T, d] -> of the rows [R, d]."""
        ...


class Journey:
    """One micro-batch's way through one layer's experts: the trip to them and the trip home, over one plan."""

    def __init__(self, exchange: Dispatch, indices: Tensor) -> None:
        self.exchange, self.indices = exchange, indices
        self.plan: Any = None

    # Made when asked for: kept here they would be a cycle, and plans would wait for the garbage collector.
    @property
    def out(self) -> _Out:
        return _Out(self)

    @property
    def home(self) -> _Home:
        return _Home(self)

    @property
    def rows_per_expert(self) -> list[int]:
        """Rows of each local expert; known once the way out is done."""
        return self.plan.rows_per_expert


@dataclass(frozen=True)
class _Out:
    """x [T, d], weights [T, K] -> rows [R, d], row_weights [R]."""

    journey: Journey

    def there(self, x: Tensor, weights: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        journey = self.journey
        rows, row_weights, journey.plan = yield from journey.exchange.dispatch(x, weights, journey.indices)
        return rows, row_weights

    def back(self, d_rows: Tensor, d_row_weights: Tensor) -> Steps[tuple[Tensor, Tensor]]:
        return (yield from self.journey.exchange.dispatch_backward(d_rows, d_row_weights, self.journey.plan))


@dataclass(frozen=True)
class _Home:
    """rows [R, d] -> the sum of each token's rows [T, d]."""

    journey: Journey

    def there(self, rows: Tensor) -> Steps[tuple[Tensor]]:
        return ((yield from self.journey.exchange.combine(rows, self.journey.plan)),)

    def back(self, dy: Tensor) -> Steps[tuple[Tensor]]:
        return ((yield from self.journey.exchange.combine_backward(dy, self.journey.plan)),)


class Experts(nn.Module):
    """The routed experts that live on this rank, as stacked weights."""

    def __init__(self, num_local: int, hidden: int, inter: int, backend: Backend) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_local, 2 * inter, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_local, hidden, inter))
        self.engines = [backend.engines[f"experts.{name}"] for name in ("gate_up_proj", "down_proj")]
        self.kernels, self.sink = backend.kernels, backend.sink
        self.offer_hidden = backend.recompute.offer_hidden()

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_expert: list[int]) -> Tensor:
        """rows [R, d] sorted by expert, row_weights [R] -> weighted outputs [R, d].

        The weight is applied before the down projection, so that combining is a plain sum on any route.
        """
        up, down = (engine.grouped(rows_per_expert) for engine in self.engines)
        how = self.kernels, self.sink
        mlp = Mlp(self.gate_up_proj, self.down_proj, up, down, *how, offer_hidden=self.offer_hidden)
        return mlp(rows, row_weights)


class MoE(nn.Module):
    """Routed experts alone: Eq. 12 without its first sum."""

    def __init__(self, config: ModelConfig, dispatch: Dispatch, backend: Backend) -> None:
        super().__init__()
        hidden, inter = config.hidden_size, given(config.moe_intermediate_size)
        self.exchange = dispatch
        self.gate = build_router(config, backend)
        self.experts = Experts(dispatch.num_local_experts, hidden, inter, backend)

    def seen_by_shared_experts(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `compute` takes as `own` of this rank's tokens x [T, d]: nothing."""
        return ()

    def compute(
        self, rows: Tensor, row_weights: Tensor, *own: Tensor, rows_per_expert: list[int]
    ) -> tuple[Tensor, ...]:
        """The routed experts' outputs for the received rows [R, d], alone."""
        return (self.experts(rows, row_weights, rows_per_expert),)


class SharedMoE(MoE):
    """Routed experts beside shared experts that see every token (Eq. 12)."""

    def __init__(self, config: ModelConfig, dispatch: Dispatch, backend: Backend) -> None:
        super().__init__(config, dispatch, backend)
        self.shared_experts = FeedForward(config.hidden_size, config.shared_intermediate_size, backend)

    def seen_by_shared_experts(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `compute` takes as `own` of this rank's tokens x [T, d]: all of them."""
        return (x,)

    def compute(
        self, rows: Tensor, row_weights: Tensor, *own: Tensor, rows_per_expert: list[int]
    ) -> tuple[Tensor, ...]:
        """The routed experts' outputs for the received rows [R, d], and the shared experts' for own tokens [T, d]."""
        (x,) = own
        return self.experts(rows, row_weights, rows_per_expert), self.shared_experts(x)


def build_moe(config: ModelConfig, dispatch: Dispatch, backend: Backend) -> MoE:
    """The experts of one layer as the config describes them."""
    return (SharedMoE if config.shared_intermediate_size else MoE)(config, dispatch, backend)
