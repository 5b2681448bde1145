"""How the tensors on disk lie in ours: places, shapes, and bands of rows that are moved one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from train.hf import names
from train.hf.names import Entry
from train.model.attention.kinds import LatentSizes
from train.model.config import ModelConfig
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine

# Published weights are scaled in blocks of so many rows, so bands are multiples of them.
BLOCK_ROWS = 128
BAND_NUMEL = 1 << 20
# The modules of latent attention that make what is rotated: queries, with and without a latent, and the shared key.
_ROTATED = ("q_proj", "q_b_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class _AllExperts:
    """As much of a `Dispatch` as a model needs to be laid out."""

    num_local_experts: int
    first_expert: int = 0


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and router bias of the whole model with its shape; needs no memory."""
    with torch.device("meta"):
        model = Transformer(config, cast(Any, _AllExperts(config.n_routed_experts)), everywhere(TorchEngine()))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class DiskTensor:
    """A tensor on disk: its shape, and where in ours it starts (elements). It is one contiguous range of ours."""

    entry: Entry
    offset: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.entry.theirs

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_bias(self) -> bool:
        """Whether it is a router's selection bias, which is no weight: it is stored by its own name, in float32."""
        return self.name.endswith("e_score_correction_bias")

    @property
    def is_linear(self) -> bool:
        """Whether published FP8 checkpoints quantise it: every projection but that of multi-token prediction."""
        module = self.name.split(".")[-2]
        return "_proj" in module and module != "eh_proj"

    @property
    def scale_name(self) -> str:
        """Name of the scales beside it, where it is quantised."""
        return f"{self.name}_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return tuple(-(-size // BLOCK_ROWS) for size in self.shape)

    def bands(self, max_numel: int = BAND_NUMEL) -> Iterator[tuple[slice, int, int]]:
        """(rows, flat offset in ours, number of elements) of consecutive parts of at most about `max_numel` elements.

        Rows are multiples of `BLOCK_ROWS`, but for the last.
        """
        width = math.prod(self.shape[1:])
        num_rows = max(1, max_numel // (width * BLOCK_ROWS)) * BLOCK_ROWS
        for first in range(0, self.shape[0], num_rows):
            rows = slice(first, min(first + num_rows, self.shape[0]))
            yield rows, self.offset + first * width, (rows.stop - rows.start) * width


def disk_tensors(config: ModelConfig, copies: bool = False) -> list[DiskTensor]:
    """All disk tensors of a model; with `copies` those of embedding and head beside prediction depths instead."""
    known = shapes(config)
    return [_place(entry, known[entry.ours]) for entry in (names.copies if copies else names.table)(config)]


def _place(entry: Entry, shape: tuple[int, ...]) -> DiskTensor:
    offset = 0
    if entry.expert is not None:
        shape = shape[1:]
        offset += entry.expert * math.prod(shape)
    if entry.rows is not None:
        offset += entry.rows.start * math.prod(shape[1:])
        shape = (entry.rows.stop - entry.rows.start, *shape[1:])
    return DiskTensor(entry, offset, shape)


def rows_of_halves(config: ModelConfig, disk: DiskTensor) -> Tensor | None:
    """For each of our rows its row on disk, int64, where a file rotates halves: `Published.halves`.

    None for a tensor in which nothing is rotated. Queries and keys are permuted alike, so their products stay.
    """
    module = disk.name.split(".")[-2]
    rotated, attention = config.attention_sizes.rope_dim, config.attention_sizes
    if not isinstance(attention, LatentSizes) or module not in _ROTATED:
        return None
    before = attention.kv_lora_rank if module == "kv_a_proj_with_mqa" else attention.qk_nope_head_dim
    rows = torch.arange(disk.shape[0]).view(-1, before + rotated)
    pairs = rows[:, before:].view(-1, 2, rotated // 2).transpose(1, 2)
    return torch.cat([rows[:, :before], pairs.flatten(1)], 1).flatten()
