"""The native engine: flat weights, masters in shards, any torch optimizer on the shards, all-gather.

Works in every precision. Masters of bf16 weights are fp32 copies of the shard. Weights that are fp32 or fp64 already
are their own masters: the optimizer steps on the shard of the flat weights itself, and nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parallel.collectives import all_gather
from parallel.shards import FlatLayout, lay_out
from parallel.watch import Need, Watch
from parallel.zero.sets import ParamSet, views

# Elements. Operands that start on a cache line (and on the 16 bytes that GPU matrix kernels ask for) in bf16 too.
_ALIGN = 32


class NativeEngine:
    """Owns the flat weights, main gradients, masters and moments of this rank. Satisfies `zero.optimizer.Engine`."""

    def __init__(
        self, sets: list[ParamSet], make_adamw: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], watch: Watch
    ) -> None:
        self._sets, self._watch = sets, watch
        self.layouts = [lay_out(each.numels, each.num_shards, _ALIGN, _ALIGN) for each in sets]
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
        self.optimizer = make_adamw(
            [
                {"params": [master], "weight_decay": each.weight_decay}
                for each, master in zip(sets, self.masters, strict=True)
            ]
        )

    @torch.no_grad()
    def update(self, grads: list[Tensor]) -> None:
        """Step on the reduced gradient shards, then publish the new weights to all replicas."""
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Masters to weights, and every replica's shard to all of them."""
        pending = []
        for each, shard, master, flat in zip(self._sets, self._shards, self.masters, self._weights, strict=True):
            if shard.dtype != master.dtype:
                shard.copy_(master)
            if each.group is not None and each.num_shards > 1:
                weights = Need("optimizer", "the weights from {peers}", each.group)
                pending.append(self._watch.launch(weights, partial(all_gather, shard, each.group, out=flat)))
        for handle in pending:
            handle.wait()


@torch.no_grad()
def _flatten(each: ParamSet, layout: FlatLayout) -> Tensor:
    """Move the parameters into one flat tensor; they become views of it."""
    flat = torch.zeros(layout.numel, dtype=each.dtype, device=each.params[0].device)
    for param, view in zip(each.params, views(flat, layout, each.params), strict=True):
        view.copy_(param)
        param.data = view
    return flat
