"""Which part of the model each stage of a pipeline holds: given by hand, or balanced by the work of a token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from train.flops import forward_costs
from train.model.config import ModelConfig
from train.model.parts import Parts


def split(config: ModelConfig, num_slices: int, seq_len: int, layers: Sequence[int] | None = None) -> list[Parts]:
    """The parts of slices 0..num_slices-1 of the model.

    layers: number of layers of each slice; None balances the work of a token, with the head and multi-token prediction
    on the last slice. A slice may hold no layer. Raises ValueError when `layers` is not a split of the model.
    """
    counts = balanced(config, num_slices, seq_len) if layers is None else layers
    if len(counts) != num_slices or sum(counts) != config.num_hidden_layers or min(counts) < 0:
        raise ValueError(
            f"pipeline.layers={list(counts)} must give {num_slices} stages their share of "
            f"model.num_hidden_layers={config.num_hidden_layers}"
        )
    borders = [0, *accumulate(counts)]
    last = num_slices - 1
    return [
        Parts(
            embedding=index == 0,
            layers=tuple(range(start, stop)),
            head=index == last,
            mtp=index == last and config.num_nextn_predict_layers > 0,
        )
        for index, (start, stop) in enumerate(pairwise(borders))
    ]


def balanced(config: ModelConfig, num_slices: int, seq_len: int) -> tuple[int, ...]:
    """Layers per slice with the smallest largest cost, and among those the most even."""
    layer_costs, end_cost = forward_costs(config, seq_len)
    before = [0.0, *accumulate(layer_costs)]
    num_layers = len(layer_costs)

    @cache
    def best(first: int, slices: int) -> tuple[float, float, tuple[int, ...]]:
        """(largest cost, sum of squares, layers per slice) of the layers from `first` on over the last slices."""
        if slices == 1:
            cost = before[num_layers] - before[first] + end_cost
            return cost, cost**2, (num_layers - first,)
        found = []
        for count in range(num_layers - first + 1):
            cost = before[first + count] - before[first]
            largest, squares, counts = best(first + count, slices - 1)
            found.append((max(cost, largest), cost**2 + squares, (count, *counts)))
        return min(found, key=lambda option: option[:2])

    return best(0, num_slices)[2]
