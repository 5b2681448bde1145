"""The native engine: flat weights, masters in shards, inner optimizers on the shards, all-gather.

Works in every precision. Masters of bf16 weights are fp32 copies of the shard. Weights that are fp32 or fp64 already
are their own masters: the optimizer steps on the shard of the flat weights itself, and nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.shards import FlatLayout, lay_out, lay_out_whole
from parallel.watch import Watch
from parallel.zero.arrivals import Arrivals
from parallel.zero.sets import ParamSet, matrices, views

# Elements. Operands that start on a cache line (and on the 16 bytes that GPU matrix kernels ask for) in bf16 too.
_ALIGN = 32


class NativeEngine:
    """Owns the flat weights, main gradients, masters and moments of this rank. Satisfies `zero.optimizer.Engine`."""

    def __init__(self, sets: list[ParamSet], watch: Watch, kernels: str) -> None:
        self._sets, self._kernels = sets, kernels
        self.layouts = [layout_of(each, each.num_shards) for each in sets]
        self._weights = [_flatten(each, layout) for each, layout in zip(sets, self.layouts, strict=True)]
        self._shards = [
            flat[layout.shard_slice(each.shard)]
            for each, layout, flat in zip(sets, self.layouts, self._weights, strict=True)
        ]
        self.main_grads = [
            torch.zeros_like(flat, dtype=each.master_dtype) for each, flat in zip(sets, self._weights, strict=True)
        ]
        # `Tensor.to` hands back the shard itself when its dtype is the master's already.
        self.masters = [
            nn.Parameter(shard.to(each.master_dtype)) for each, shard in zip(sets, self._shards, strict=True)
        ]
        # One optimizer of torch's for each inner one, over the sets that are its own.
        inners = {each.inner.name: each.inner for each in sets}
        self._by_inner = {name: inner.make(self._param_groups(name)) for name, inner in inners.items()}
        self.optimizers = list(self._by_inner.values())
        self.arrivals = Arrivals(sets, self.layouts, self._weights, watch)

    def _param_groups(self, inner: str) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for each, layout, master in zip(self._sets, self.layouts, self.masters, strict=True):
            if each.inner.name == inner:
                whole = {"matrices": [matrices(each, layout)]} if each.inner.whole_matrices else {}
                settings = {"weight_decay": each.weight_decay, "kernels": self._kernels, **whole}
                groups.append({"params": [master], **settings})
        return groups

    def state_of(self, index: int) -> dict[str, Any]:
        """What the inner optimizer keeps of the master of set number `index`."""
        return self._by_inner[self._sets[index].inner.name].state[self.masters[index]]

    @torch.no_grad()
    def update(self, grads: list[Tensor]) -> None:
        """Step on the reduced gradient shards, then send the new weights to all replicas on their way."""
        self.arrivals.settle()
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        for optimizer in self.optimizers:
            optimizer.step()
        for master in self.masters:
            master.grad = None
        self._publish([index for index, each in enumerate(self._sets) if not each.frozen])

    def publish(self) -> None:
        """Masters to weights, and every replica's shard to all of them."""
        self.arrivals.settle()
        self._publish(range(len(self._sets)))
        self.arrivals.settle()

    @torch.no_grad()
    def _publish(self, numbers: Sequence[int]) -> None:
        for index in numbers:
            shard, master = self._shards[index], self.masters[index]
            if shard.dtype != master.dtype:
                shard.copy_(master)
        self.arrivals.send(numbers)


def layout_of(each: ParamSet, num_shards: int) -> FlatLayout:
    """Equal shards; where the inner optimizer looks at whole matrices, shards of those at equal cost."""
    if not each.inner.whole_matrices:
        return lay_out(each.numels, num_shards, _ALIGN, _ALIGN)
    shapes = each.matrix_shapes
    num_matrices = [numel // (rows * columns) for numel, (rows, columns) in zip(each.numels, shapes, strict=True)]
    costs = [each.inner.cost(rows, columns) for rows, columns in shapes]
    return lay_out_whole(each.numels, num_matrices, costs, num_shards, _ALIGN)


@torch.no_grad()
def _flatten(each: ParamSet, layout: FlatLayout) -> Tensor:
    """Move the parameters into one flat tensor; they become views of it."""
    flat = torch.zeros(layout.numel, dtype=each.dtype, device=each.params[0].device)
    for param, view in zip(each.params, views(flat, layout, each.params), strict=True):
        view.copy_(param)
        param.data = view
    return flat
