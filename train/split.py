"""Which part of the model each stage of a pipeline holds: given by hand, or balanced by the time of its ranks.

What a token costs a device is taken from the model's sizes alone, so that a run needs no plan and any machine cuts a
model alike. A few ratios weigh the kinds of work against each other; they are those that `launch plan` finds with
DeepSeek's kernels on H800 (docs/planner.md, Stages). A step's numbers do not depend on the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, pairwise

from train.flops import forward_costs
from train.model.config import ModelConfig
from train.model.parts import Parts

# A multiply-add of FP8 products and one of attention's core, in multiply-adds of products in wider types.
FP8_PRODUCT, CORE = 0.73, 1.6
# A layer's time over that of its products and its core: norms, rotary embedding and activations besides, of FP8 casts,
# of experts their rows brought into order.
DENSE, FP8_DENSE, EXPERTS = 1.05, 1.25, 1.35

# The slices of the model that each rank of a pipeline holds.
Held = Sequence[Sequence[int]]


def split(
    config: ModelConfig,
    held: Held,
    seq_len: int,
    layers: Sequence[int] | None = None,
    fp8_layers: bool = False,
    fp8_head: bool = False,
) -> list[Parts]:
    """The parts of all slices of the model.

    held: slices of each rank, whose work together is balanced, with the head and multi-token prediction on the last
    slice. layers: number of layers of each slice instead. A slice may hold no layer. fp8_layers, fp8_head: what
    multiplies in FP8. Raises ValueError when `layers` is not a split of the model.
    """
    num_slices = 1 + max(max(each) for each in held)
    counts = balanced(config, held, seq_len, fp8_layers, fp8_head) if layers is None else layers
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


def balanced(
    config: ModelConfig, held: Held, seq_len: int, fp8_layers: bool = False, fp8_head: bool = False
) -> tuple[int, ...]:
    """Layers of each slice, by what they cost a device in these arithmetics."""
    layers, end = device_costs(config, seq_len, fp8_layers, fp8_head)
    return even(tuple(layers), 0.0, end, tuple(map(tuple, held)))


def device_costs(
    config: ModelConfig, seq_len: int, fp8_layers: bool = False, fp8_head: bool = False
) -> tuple[list[float], float]:
    """What each main layer costs a device per token, and what follows the last one: the head with its loss, and every
    prediction depth with the head again. In multiply-adds of a product that is not in FP8; looking up embeddings is
    nothing beside them."""
    costs, end = forward_costs(config, seq_len)
    # A multiply-add is two operations, and a causal mask leaves half of them.
    core, depths = config.attention_sizes.core_flops(seq_len) / 4, config.num_nextn_predict_layers
    product, dense = (FP8_PRODUCT, FP8_DENSE) if fp8_layers else (1.0, DENSE)
    passes = [EXPERTS if index >= config.first_k_dense_replace else dense for index in range(len(costs))]
    last = EXPERTS if config.n_routed_experts else dense

    def time(cost: float, core: float, passes: float) -> float:
        return passes * (product * (cost - core) + CORE * core)

    heads = (1.0 + depths) * config.hidden_size * config.vocab_size
    rest = time(end - heads, depths * core, last)
    layers = [time(cost, core, each) for cost, each in zip(costs, passes, strict=True)]
    return layers, (FP8_PRODUCT if fp8_head else 1.0) * heads + rest


@lru_cache(maxsize=256)
def even(layers: tuple[float, ...], start: float, end: float, held: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Layers of each slice such that the rank with the most work has little of it, among those that evenest ranks, and
    among those evenest slices.

    layers: the work of each; start, end: what the first and the last slice have besides. Found from slices as even as
    they can be by moving single layers, as long as that helps.
    """
    num_slices = 1 + max(max(each) for each in held)
    before = [0.0, *accumulate(layers)]

    def unevenness(counts: Sequence[int]) -> tuple[float, float, float]:
        slices = [before[stop] - before[first] for first, stop in pairwise([0, *accumulate(counts)])]
        slices[0] += start
        slices[-1] += end
        ranks = [sum(slices[index] for index in each) for each in held]
        # Of sums in another order, the last bits must not decide.
        return tuple(float(f"{each:.9g}") for each in (max(ranks), _squares(ranks), _squares(slices)))  # type: ignore[return-value]

    counts = _even_slices(layers, start, end, num_slices)
    while True:
        tries = [_moved(counts, i, j) for i in range(num_slices) if counts[i] for j in range(num_slices) if i != j]
        better = min(tries, key=unevenness, default=counts)
        if unevenness(better) >= unevenness(counts):
            return counts
        counts = better


def _squares(work: Sequence[float]) -> float:
    return sum(each**2 for each in work)


def _moved(counts: Sequence[int], source: int, target: int) -> tuple[int, ...]:
    moved = list(counts)
    moved[source] -= 1
    moved[target] += 1
    return tuple(moved)


def _even_slices(layers: Sequence[float], start: float, end: float, num_slices: int) -> tuple[int, ...]:
    """Layers of each slice with the smallest largest work, and among those the most even."""
    before = [0.0, *accumulate(layers)]
    num_layers = len(layers)

    @cache
    def best(first: int, slices: int) -> tuple[float, float, tuple[int, ...]]:
        """(largest work, sum of squares, layers per slice) of the layers from `first` on over the last slices."""
        extra = start if slices == num_slices else 0.0
        if slices == 1:
            cost = before[num_layers] - before[first] + end + extra
            return cost, cost**2, (num_layers - first,)
        found = []
        for count in range(num_layers - first + 1):
            cost = before[first + count] - before[first] + extra
            largest, squares, counts = best(first + count, slices - 1)
            found.append((max(cost, largest), cost**2 + squares, (count, *counts)))
        return min(found, key=lambda option: option[:2])

    return best(0, num_slices)[2]
