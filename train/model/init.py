"""Initial values: each a function of (seed, global name, global shape), whatever else a process holds."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.router import BiasedRouter
from train.model.transformer import Transformer
from train.precision.grads import wide_dtype


def _draw(std: float, shape: torch.Size, *identity: object) -> Tensor:
    """Normal float32 values on CPU, from a generator seeded by what is drawn."""
    text = "/".join(map(str, identity))
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def materialise(model: Transformer, dtype: torch.dtype, device: torch.device | str) -> None:
    """Memory for every parameter, and for every buffer in float32 or wider.

    Not `to` and `to_empty`: they cannot replace tensors that are traced.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=device)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, dtype=wide_dtype(dtype), device=device))


@torch.no_grad()
def init_weights(
    model: Transformer, config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Materialise a model built on the meta device and give every parameter its first value.

    Matrices are normal with std `initializer_range`, norms are one, router biases zero (float32, or float64 beside
    float64). Values are drawn in float32 on CPU, then cast: the same on every device and in every precision. An
    expert's weights are drawn by its global index, so any layout of experts over ranks holds the same model.
    """
    materialise(model, dtype, device)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif model.is_expert(name):
            shape = model.global_shape(name)
            for local, weight in enumerate(parameter):
                expert = model.first_expert + local
                weight.copy_(_draw(config.initializer_range, weight.shape, seed, name, tuple(shape), expert))
        else:
            shape = model.global_shape(name)
            parameter.copy_(_draw(config.initializer_range, shape, seed, name, tuple(shape)))
    for router in model.routers().values():
        if isinstance(router, BiasedRouter):
            bias = router.e_score_correction_bias
            router.e_score_correction_bias = torch.zeros_like(bias, dtype=wide_dtype(dtype))
