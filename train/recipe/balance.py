"""Balancing experts without an auxiliary loss (technical report, section 2.1.2)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from train.model.router import BiasedRouter
from train.model.transformer import Transformer


def freeze_routers(model: Transformer, frozen: Collection[str]) -> None:
    """Let the biases of routers stay whose weights do; `frozen`: full names of parameters."""
    for name, module in model.named_modules():
        if isinstance(module, BiasedRouter):
            module.is_frozen = f"{name}.weight" in frozen


@torch.no_grad()
def update_bias(model: Transformer, load: Tensor, rate: float) -> None:
    """Move the selection bias of every router that has one by `rate` towards balance.

    Up below the mean load, down above it, else not. That of a frozen router stays.

    load int64 [num_routers, E]: tokens per expert over the whole step, all ranks and micro-batches together.
    """
    # The sign of mean - load, in integers: exact for any count.
    direction = torch.sign(load.sum(-1, keepdim=True) - load * load.shape[-1])
    for number, router in model.routers().items():
        if isinstance(router, BiasedRouter) and not router.is_frozen:
            bias = router.e_score_correction_bias
            bias.add_(direction[number].to(bias), alpha=rate)
