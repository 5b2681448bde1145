"""How layers are dealt out over the ranks of a pipeline: held against all ways to do it, where those can be tried."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest

from parallel.pipeline.placement import Placement, bidirectional, loop, vee
from tests.train.model_cases import random_config, random_dense_config
from train.compose import compose
from train.split import Held, balanced, device_costs, even, split

PLACEMENTS = [loop(1), loop(3), loop(2, 2), vee(2), bidirectional(4), bidirectional(2)]


def work_of_ranks(counts: list[int], layers: list[float], start: float, end: float, held: Held) -> list[float]:
    borders = [sum(counts[:index]) for index in range(len(counts) + 1)]
    slices = [sum(layers[first:stop]) for first, stop in pairwise(borders)]
    slices[0] += start
    slices[-1] += end
    return [sum(slices[index] for index in each) for each in held]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda each: f"{each.num_ranks} ranks, {each.num_slices} slices")
@pytest.mark.parametrize("seed", range(6))
def test_no_other_split_has_less_on_its_slowest_rank(placement: Placement, seed: int) -> None:
    """By more than a layer, that is: single layers are moved, and two might have to change places."""
    dice, held = random.Random(seed), placement.slices_of_ranks
    num_layers = dice.randrange(0, 9)
    layers = [dice.choice([1.0, 1.0, 0.6])] * dice.randrange(0, 3)
    layers = (layers + [dice.uniform(0.5, 2.0)] * num_layers)[:num_layers]
    start, end = dice.uniform(0, 1), dice.uniform(0, 4)
    counts = list(even(tuple(layers), start, end, held))
    assert sum(counts) == num_layers and min(counts) >= 0
    found = max(work_of_ranks(counts, layers, start, end, held))
    others = []
    for borders in combinations_with_replacement(range(num_layers + 1), placement.num_slices - 1):
        tried = [stop - first for first, stop in pairwise([0, *borders, num_layers])]
        others.append(max(work_of_ranks(tried, layers, start, end, held)))
    assert min(others) <= found <= min(others) + 0.5 * max(layers, default=0.0) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_slices_are_the_model(seed: int) -> None:
    """Every layer once and in order, embedding first, head and prediction depths last, whatever the model."""
    config = (random_config if seed % 2 else random_dense_config)(seed, num_nextn_predict_layers=seed % 3)
    for placement in PLACEMENTS:
        parts = split(config, placement.slices_of_ranks, 32)
        assert [layer for part in parts for layer in part.layers] == list(range(config.num_hidden_layers))
        assert [part.embedding for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.head for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1].mtp == (config.num_nextn_predict_layers > 0)


def test_ranks_that_hold_both_ends_are_balanced_as_one() -> None:
    """The stage behind the head makes room for it where a rank has no other, and its partner does where it has."""
    config = replace(compose(["model=v3_16b"]).model, num_hidden_layers=24, first_k_dense_replace=0)
    layers, end = device_costs(config, 4096)
    straight = balanced(config, loop(4).slices_of_ranks, 4096)
    assert straight == tuple(sorted(straight, reverse=True))
    folded = balanced(config, vee(2).slices_of_ranks, 4096)
    work = work_of_ranks(list(folded), layers, 0.0, end, vee(2).slices_of_ranks)
    assert abs(work[0] - work[1]) <= layers[0]


def test_a_split_by_hand_that_is_none() -> None:
    config = compose(["model=tiny"]).model
    with pytest.raises(ValueError, match=r"pipeline.layers=\[1, 1\] must give 2 stages their share"):
        split(config, loop(2).slices_of_ranks, 32, [1, 1])
