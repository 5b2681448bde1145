"""Rotary position embedding, plain and stretched by YaRN.

Position p rotates pair j by the angle p * frequency[j]: multiplication by exp(i p frequency[j]). Which elements are a
pair is the attention's: neighbours (x[2j], x[2j+1]) in latent attention, (x[j], x[j + d/2]) in grouped-query
attention, as the published weights of either have them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.model.attention.yarn import yarn_mscale
from train.model.config import ModelConfig


def rotation_table(config: ModelConfig, num_positions: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """exp(i p frequency) for positions 0..num_positions-1: complex [num_positions, rope_dim / 2].

    Angles are rounded to float32 as in every released implementation, whatever the model's type: they are constants of
    the trained model. The table is complex128 for a float64 model, complex64 otherwise.
    """
    positions = torch.arange(num_positions, device=device, dtype=torch.float32)
    angles = torch.outer(positions, _frequencies(config, device))
    magnitude = _magnitude(config)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.complex((angles.cos() * magnitude).to(real), (angles.sin() * magnitude).to(real))


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair, float32 [rope_dim / 2]."""
    dim = config.attention_sizes.rope_dim
    wavelengths = config.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
    if config.rope_scaling is None:
        return 1.0 / wavelengths
    stretched = _stretched_share(config, device)
    return 1.0 / (config.rope_scaling["factor"] * wavelengths) * stretched + 1.0 / wavelengths * (1 - stretched)


def _stretched_share(config: ModelConfig, device: torch.device) -> Tensor:
    """YaRN's ramp (arXiv 2309.00071, Eq. 18) over pairs: 0 keeps the frequency, 1 divides it by `factor`.

    A pair keeps its frequency when it turns more than `beta_fast` times within the original context and is stretched
    when it turns less than `beta_slow` times.
    """
    scaling = config.rope_scaling
    assert scaling is not None
    dim, context = config.attention_sizes.rope_dim, scaling["original_max_position_embeddings"]

    def pair_turning(num_turns: float) -> float:
        return dim * math.log(context / (num_turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_turning(scaling.get("beta_slow", 1))), dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(dim // 2, device=device, dtype=torch.float32) - low) / width).clamp(0, 1)


def _magnitude(config: ModelConfig) -> float:
    """Factor on the rotated parts of queries and keys: 1 when `mscale` equals `mscale_all_dim`, as DeepSeek sets them.

    With either missing it is YaRN's own 0.1 ln(factor) + 1, as in Hugging Face.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    factor, mscale, mscale_all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return yarn_mscale(factor, 1.0)
