"""A whole state under the names on disk and back, in memory: what export and import do band by band."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from train.hf import names
from train.hf.layout import shapes
from train.model.config import ModelConfig


def part(entry: names.Entry, tensor: Tensor) -> Tensor:
    """What the disk tensor of this entry holds of our tensor, as a view."""
    chosen = tensor if entry.expert is None else tensor[entry.expert]
    return chosen if entry.rows is None else chosen[entry.rows]


def to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our whole state (all experts) -> disk tensors, copies beside prediction depths included. Tensors are views."""
    return {
        entry.theirs: part(entry, state[entry.ours])
        for entries in (names.table, names.copies)
        for entry in entries(config)
    }


def from_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Disk tensors -> our whole state."""
    known, ours = shapes(config), dict[str, Tensor]()
    for entry in names.table(config):
        tensor = state[entry.theirs]
        whole = ours.setdefault(entry.ours, tensor.new_empty(known[entry.ours]))
        part(entry, whole).copy_(tensor)
    return ours
