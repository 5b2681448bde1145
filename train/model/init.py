"""Initial values: each a function of (seed, global name, global shape), whatever else a process holds."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from train.model.router import BiasedRouter
from train.model.transformer import Transformer
from train.precision.grads import wide_dtype


def _draw(std: float, shape: torch.Size, *identity: object) -> Tensor:
    """Normal float32 values on CPU, from a generator seeded by what is drawn."""
    text = "/".join(map(str, identity))
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


class InitialValues:
    """The first values of one model, in float32: each parameter a flat global tensor, of which one asks for ranges."""

    def __init__(self, model: Transformer, seed: int) -> None:
        self._model, self._std, self._seed = model, model.config.initializer_range, seed

    @torch.no_grad()
    def copy_to(self, flat: Tensor, name: str, offset: int) -> None:
        """Fill 1-D `flat` with the elements of a parameter from `offset` on. What is drawn is whole: a matrix, or one
        expert's."""
        shape = self._model.global_shape(name)
        if len(shape) == 1:
            flat.fill_(1.0)
            return
        is_expert = self._model.is_expert(name)
        drawn = shape[1:] if is_expert else shape
        size, end = math.prod(drawn), offset + flat.numel()
        for number in range(offset // size, -(-end // size)):
            expert = (number,) if is_expert else ()
            values = _draw(self._std, drawn, self._seed, name, tuple(shape), *expert).view(-1)
            first, last = max(offset, number * size), min(end, (number + 1) * size)
            flat[first - offset : last - offset].copy_(values[first - number * size : last - number * size])


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
def init_weights(model: Transformer, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Materialise a model built on the meta device and give every parameter its first value.

    Matrices are normal with std `initializer_range`, norms are one, router biases zero (float32, or float64 beside
    float64). Values are drawn in float32 on CPU, then cast: the same on every device and in every precision. An
    expert's weights are drawn by its global index, so any layout of experts over ranks holds the same model.
    """
    materialise(model, dtype, device)
    values = InitialValues(model, seed)
    for name, parameter in model.named_parameters():
        own = parameter.numel() // len(parameter) * model.first_expert if model.is_expert(name) else 0
        values.copy_to(parameter.view(-1), name, own)
    for router in model.routers().values():
        if isinstance(router, BiasedRouter):
            bias = router.e_score_correction_bias
            router.e_score_correction_bias = torch.zeros_like(bias, dtype=wide_dtype(dtype))
