"""Linear layers: a weight, the engine that multiplies by it, and where its gradient goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.precision.engine import Engine, Offer, keep_all
from train.precision.grads import Sink


class Linear(nn.Module):
    """x [..., k] -> x weightᵀ [..., n], no bias. The weight's gradient goes to its `main_grad` through `sink`."""

    def __init__(self, num_inputs: int, num_outputs: int, engine: Engine, sink: Sink, offer: Offer = keep_all) -> None:
        """offer: as `Engine.project` takes it."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.engine, self.sink, self.offer = engine, sink, offer

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self)[0]


def project(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of the layers makes of x [..., k], quantised and kept once. They share engine, sink and offer."""
    first = layers[0]
    assert all(layer.engine is first.engine and layer.sink is first.sink for layer in layers)
    return first.engine.project(x, first.sink, *(layer.weight for layer in layers), offer=first.offer)
