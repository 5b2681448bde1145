"""Multi-head latent attention (technical report, Eq. 1-11).

Queries pass through a latent of `q_lora_rank`, keys and values through one of `kv_lora_rank`; each latent is normed.
Position lives in `qk_rope_head_dim` extra dimensions, of which the key's are one vector shared by all heads.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from train.model.attention.cache import Cache, LatentCache
from train.model.attention.kernels import join_heads, rotate
from train.model.attention.kinds import LatentSizes
from train.model.layers import Backend, RMSNorm
from train.model.packing import Places
from train.precision.linear import project

# The released code norms the latents with this constant; `rms_norm_eps` speaks of the hidden state alone.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Causal self-attention of one layer: x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, sizes: LatentSizes, backend: Backend) -> None:
        super().__init__()
        heads, hidden = sizes.num_attention_heads, sizes.hidden_size
        rank, kv_rank = sizes.q_lora_rank, sizes.kv_lora_rank
        self.num_heads = heads
        self.latent_widths = [kv_rank, sizes.rope_dim]
        self.v_head_dim = sizes.v_head_dim
        self.v_width = backend.core.value_width(sizes.qk_head_dim, sizes.v_head_dim)
        self.softmax_scale = sizes.softmax_scale
        if rank is None:
            self.q_proj = backend.linear("q_proj", hidden, heads * sizes.qk_head_dim)
            self.compress, self.expand_q = self._keep_input, self._from_input
        else:
            self.q_a_proj = backend.linear("q_a_proj", hidden, rank)
            self.q_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS, backend)
            self.q_b_proj = backend.linear("q_b_proj", rank, heads * sizes.qk_head_dim)
            self.compress, self.expand_q = self._to_latents, self._from_latent
        self.kv_a_proj_with_mqa = backend.linear("kv_a_proj_with_mqa", hidden, sum(self.latent_widths))
        self.kv_a_layernorm = RMSNorm(kv_rank, LATENT_NORM_EPS, backend)
        self.kv_b_proj = backend.linear("kv_b_proj", kv_rank, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim))
        self.o_proj = backend.linear("o_proj", heads * sizes.v_head_dim, hidden)
        self.offer = backend.recompute.offer("mla_up_proj")

    def _keep_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.kv_a_proj_with_mqa(x)

    def _from_input(self, x: Tensor) -> Tensor:
        return self.q_proj(x)

    def _to_latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q_latent, kv = project(x, self.q_a_proj, self.kv_a_proj_with_mqa)
        return self.q_a_layernorm(q_latent), kv

    def _from_latent(self, x: Tensor) -> Tensor:
        return self.q_b_proj(x)

    def up_project(
        self, q_latent: Tensor, kv_latent: Tensor, k_rope: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed latents [B, S, rank] and the shared part of the keys -> q, k, v of all heads (see `join_heads`)."""
        per_head = (self.num_heads, -1)
        q, kv = self.expand_q(q_latent).unflatten(-1, per_head), self.kv_b_proj(kv_latent).unflatten(-1, per_head)
        return join_heads(q, kv, k_rope, table, self.v_width)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """`places`: of the S positions of x."""
        q_latent, kv = self.compress(x)
        kv_latent, k_rope = kv.split(self.latent_widths, dim=-1)
        inputs = q_latent, self.kv_a_layernorm(kv_latent), k_rope
        heads = self.up_project(*inputs, places.table)
        self.offer(partial(self.up_project, table=places.table), heads, inputs)
        out = places.attend(*heads, self.softmax_scale)
        return self.o_proj(out[..., : self.v_head_dim].flatten(2))

    def new_cache(self, capacity: int) -> LatentCache:
        """What `decode` keeps of up to `capacity` tokens."""
        rank, rope = self.latent_widths
        return LatentCache(capacity, rank, rope, like=self.kv_b_proj.weight)

    def decode(self, x: Tensor, table: Tensor, cache: Cache) -> Tensor:
        """`forward` for the tokens behind those of `cache`, which takes them in: x [1, N, hidden] -> the same shape.

        `table` is the rotation table of their positions. The up-projections are absorbed (DeepSeek-V2's report,
        section 2.1.2): keys and values are linear in the latent, so q · (W_UK c) = (W_UKᵀ q) · c, and a head's sum of
        values is W_UV times its sum of latents. Keys and values of single heads never exist. The two absorbed products
        are torch's, in the type of the weights, whatever engine `kv_b_proj` has.
        """
        assert isinstance(cache, LatentCache)
        q_latent, kv = self.compress(x)
        kv_latent, k_rope = kv.split(self.latent_widths, dim=-1)
        cache.append(self.kv_a_layernorm(kv_latent)[0], rotate(k_rope, table)[0])
        q = self.expand_q(q_latent)[0].unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        key_width = q.shape[-1] - k_rope.shape[-1]
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(
            [key_width, self.v_head_dim], dim=1
        )
        rotated = rotate(q[..., key_width:], table).to(q.dtype)
        queries = torch.cat([q[..., :key_width] @ up_key, rotated], -1)
        mixed = cache.attend(queries, self.softmax_scale) @ up_value.transpose(1, 2)
        return self.o_proj(mixed.transpose(0, 1).flatten(1)[None])
