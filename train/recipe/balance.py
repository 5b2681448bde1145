"""Balancing experts without an auxiliary loss (technical report, section 2.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from train.model.router import BiasedRouter
from train.model.transformer import Transformer


@torch.no_grad()
def update_bias(model: Transformer, load: Tensor, rate: float) -> None:
    """Move the selection bias of every router that has one by `rate` towards balance.

    Up below the mean load, down above it, else not.

    load int64 [num_routers, E]: tokens per expert over the whole step, all ranks and micro-batches together.
    """
    # The sign of mean - load, in integers: exact for any count.
    direction = torch.sign(load.sum(-1, keepdim=True) - load * load.shape[-1])
    for number, router in model.routers().items():
        if isinstance(router, BiasedRouter):
            bias = router.e_score_correction_bias
            bias.add_(direction[number].to(bias), alpha=rate)
