"""Which parts of the model a process holds. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from train.model.config import ModelConfig


@dataclass(frozen=True)
class Parts:
    """The parts of the model that one process holds. Names do not change with the split.

    Attributes:
        embedding: the table by which tokens become the first layer's input.
        layers: indices of the main model's layers.
        head: the last norm and the output head.
        mtp: all depths of multi-token prediction, which share embedding and head.
    """

    embedding: bool
    layers: tuple[int, ...]
    head: bool
    mtp: bool

    @staticmethod
    def all(config: ModelConfig) -> Parts:
        """The whole model."""
        return Parts(True, tuple(range(config.num_hidden_layers)), True, config.num_nextn_predict_layers > 0)
