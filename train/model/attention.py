"""Multi-head latent attention (technical report, Eq. 1-11).

Queries pass through a latent of `q_lora_rank`, keys and values through one of `kv_lora_rank`; each latent is normed.
Position lives in `qk_rope_head_dim` extra dimensions, of which the key's are one vector shared by all heads.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from train.model.config import ModelConfig, given
from train.model.kernels import join_heads
from train.model.layers import Backend, RMSNorm
from train.precision.linear import project

# The released code norms the latents with this constant; `rms_norm_eps` speaks of the hidden state alone.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Causal self-attention of one layer: x [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.q_lora_rank
        kv_rank, nope, v_head_dim = given(config.kv_lora_rank), given(config.qk_nope_head_dim), config.value_head_dim
        self.num_heads = heads
        self.latent_widths = [kv_rank, config.rope_dim]
        self.v_head_dim = v_head_dim
        # Flash kernels want values as wide as keys; padding costs less than the kernel that takes any width.
        self.v_width = max(v_head_dim, config.qk_head_dim)
        self.softmax_scale = config.softmax_scale
        if rank is None:
            self.q_proj = backend.linear("q_proj", hidden, heads * config.qk_head_dim)
            self.compress, self.expand_q = self._keep_input, self._from_input
        else:
            self.q_a_proj = backend.linear("q_a_proj", hidden, rank)
            self.q_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS, backend)
            self.q_b_proj = backend.linear("q_b_proj", rank, heads * config.qk_head_dim)
            self.compress, self.expand_q = self._to_latents, self._from_latent
        self.kv_a_proj_with_mqa = backend.linear("kv_a_proj_with_mqa", hidden, sum(self.latent_widths))
        self.kv_a_layernorm = RMSNorm(kv_rank, LATENT_NORM_EPS, backend)
        self.kv_b_proj = backend.linear("kv_b_proj", kv_rank, heads * (nope + v_head_dim))
        self.o_proj = backend.linear("o_proj", heads * v_head_dim, hidden)
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

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """`table` is the rotation table of the S positions (rope.rotation_table)."""
        q_latent, kv = self.compress(x)
        kv_latent, k_rope = kv.split(self.latent_widths, dim=-1)
        inputs = q_latent, self.kv_a_layernorm(kv_latent), k_rope
        heads = self.up_project(*inputs, table)
        self.offer(partial(self.up_project, table=table), heads, inputs)
        q, k, v = (each.transpose(1, 2) for each in heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return self.o_proj(out[..., : self.v_head_dim].transpose(1, 2).flatten(2))
