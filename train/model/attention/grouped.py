"""Grouped-query attention (arXiv 2305.13245): several heads of queries share a head of keys and values.

With as many heads of keys as of queries it is multi-head attention. All of a query or key head is rotated, halves
against each other as in the weights of every Llama: pair j is (x[j], x[j + d/2]), so weights are read and written as
they are, without permuting rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from train.model.attention.cache import Cache, GroupedCache
from train.model.attention.kinds import GroupedSizes
from train.model.layers import Backend
from train.model.packing import Places
from train.precision.linear import project


class GroupedAttention(nn.Module):
    """Causal self-attention of one layer: x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, sizes: GroupedSizes, backend: Backend) -> None:
        super().__init__()
        hidden, self.head_dim = sizes.hidden_size, sizes.head_dim
        query_width, key_width = sizes.num_attention_heads * self.head_dim, sizes.num_key_value_heads * self.head_dim
        self.softmax_scale, self.kernels = sizes.softmax_scale, backend.kernels
        self.q_proj = backend.linear("q_proj", hidden, query_width)
        self.k_proj = backend.linear("k_proj", hidden, key_width)
        self.v_proj = backend.linear("v_proj", hidden, key_width)
        self.o_proj = backend.linear("o_proj", query_width, hidden)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """`places`: of the S positions of x."""
        per_head = (-1, self.head_dim)
        q, k, v = (each.unflatten(-1, per_head) for each in project(x, self.q_proj, self.k_proj, self.v_proj))
        # Keys and values stay as few as they are: the kernel reads a head once for its whole group.
        out = places.attend(*self.kernels.rotate_heads(q, k, places.table), v, self.softmax_scale)
        return self.o_proj(out.flatten(2))

    def new_cache(self, capacity: int) -> GroupedCache:
        """What `decode` keeps of up to `capacity` tokens."""
        weight = self.k_proj.weight
        return GroupedCache(capacity, len(weight) // self.head_dim, self.head_dim, like=weight)

    def decode(self, x: Tensor, table: Tensor, cache: Cache) -> Tensor:
        """`forward` for the tokens behind those of `cache`, which takes them in: x [1, N, hidden] -> the same shape.

        `table` is the rotation table of their positions.
        """
        assert isinstance(cache, GroupedCache)
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)) for each in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.kernels.rotate_heads(q, k, table)
        cache.append(k[0], v[0])
        mixed = cache.attend(q[0].transpose(0, 1), self.softmax_scale)
        return self.o_proj(mixed.transpose(0, 1).flatten(1)[None])
