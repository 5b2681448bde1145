"""Grouped-query attention (arXiv 2305.13245): several heads of queries share a head of keys and values.

With as many heads of keys as of queries it is multi-head attention. All of a query or key head is rotated, halves
against each other as in the weights of every Llama: pair j is (x[j], x[j + d/2]), so weights are read and written as
they are, without permuting rows.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from train.model.config import ModelConfig, given
from train.model.kernels import rotate_heads
from train.model.layers import Backend
from train.precision.linear import project


class GroupedAttention(nn.Module):
    """Causal self-attention of one layer: x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, given(config.head_dim)
        query_width = config.num_attention_heads * self.head_dim
        key_width = given(config.num_key_value_heads) * self.head_dim
        self.softmax_scale = config.softmax_scale
        self.q_proj = backend.linear("q_proj", hidden, query_width)
        self.k_proj = backend.linear("k_proj", hidden, key_width)
        self.v_proj = backend.linear("v_proj", hidden, key_width)
        self.o_proj = backend.linear("o_proj", query_width, hidden)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """`table` is the rotation table of the S positions (rope.rotation_table)."""
        per_head = (-1, self.head_dim)
        q, k, v = (each.unflatten(-1, per_head) for each in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate_heads(q, k, table)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        # Keys and values stay as few as they are: the kernel reads a head once for its whole group.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))
