"""One depth of multi-token prediction (technical report, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.model.block import last_block
from train.model.config import ModelConfig
from train.model.layers import Backend, RMSNorm
from train.model.moe import Dispatch


class MTPModule(nn.Module):
    """Joins a hidden state with the embedding of a later token and runs one more layer (Eq. 21-22).

    The projection reads [embedding ; hidden], the order of the released weights. `hidden` is a normed state: the main
    model's after its final norm, or the previous depth's after its own. Embedding table and head are the main model's.
    """

    def __init__(self, config: ModelConfig, dispatch: Dispatch, backend: Backend) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, backend)
        self.hnorm = RMSNorm(hidden, eps, backend)
        self.eh_proj = backend.linear("eh_proj", 2 * hidden, hidden)
        self.layer = last_block(config, dispatch, backend)
        self.norm = RMSNorm(hidden, eps, backend)
        self.offer = backend.recompute.offer("norm")

    def join(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden and embedding [B, N, hidden] -> the layer's input, of that shape."""
        normed = self.enorm(embedding), self.hnorm(hidden)
        joined = torch.cat(normed, dim=-1)
        self.offer(_joined, (joined,), normed)
        return self.eh_proj(joined)


def _joined(*normed: Tensor) -> tuple[Tensor]:
    return (torch.cat(normed, dim=-1),)
