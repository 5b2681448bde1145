"""The module of each kind of attention.

Each takes x [B, S, hidden] with the places of its positions to the same shape (`forward`), and goes on behind a cache
that it makes (`new_cache`, `decode`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from train.model.attention.grouped import GroupedAttention
from train.model.attention.kinds import AttentionSizes, GroupedSizes, LatentSizes
from train.model.attention.latent import LatentAttention
from train.model.layers import Backend

Attention = LatentAttention | GroupedAttention
MODULES: dict[type[AttentionSizes], Callable[[Any, Backend], Attention]] = {
    LatentSizes: LatentAttention,
    GroupedSizes: GroupedAttention,
}


def build_attention(sizes: AttentionSizes, backend: Backend) -> Attention:
    """The attention of one layer."""
    return MODULES[type(sizes)](sizes, backend)
