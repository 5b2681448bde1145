"""What experts get: held against draws, and against what the dispatches ask for."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.plan.layers import layers_of
from launch.plan.routing import Routing, fullest_rank
from parallel.expert.placement import Placement
from tests.plan.jobs import job
from train.track.metrics_file import read_loads

T = 4000


def routing(experts: int, groups: int, kept: int, chosen: int, ep: int, nodes: int, rank: int = 0) -> Routing:
    place = Placement(experts, ep, rank, nodes)
    return Routing(T, place, groups, kept, chosen, "noaux_tc", (1.0,) * experts)


# experts, groups, kept groups, chosen, ep, nodes: V3's; no groups; groups inside ranks; ranks across groups; K = 1.
CASES = [
    (256, 8, 4, 8, 64, 8),
    (64, 1, 1, 6, 16, 4),
    (32, 16, 4, 4, 4, 2),
    (24, 3, 2, 5, 4, 1),
    (16, 4, 1, 1, 8, 4),
    (12, 4, 3, 9, 3, 1),
]


def drawn(case: tuple[int, ...]) -> list[list[int]]:
    """The experts of T tokens, written apart: the groups with the two best scores together, and the best within."""
    experts, groups, kept, chosen, _, _ = case
    size, draw, tokens = experts // groups, random.Random(1), []
    for _ in range(T):
        scores = [draw.random() for _ in range(experts)]
        strength = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        strong = sorted(range(groups), key=lambda g: strength[g])[-kept:]
        allowed = [e for g in strong for e in range(g * size, (g + 1) * size)]
        tokens.append(sorted(allowed, key=lambda e: scores[e])[-chosen:])
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_copies_are_those_of_tokens_drawn(case: tuple[int, ...]) -> None:
    """For ranks and for nodes, in the mean of all: five standard deviations of one place, and of the drawn limit's."""
    experts, _, _, _, ep, nodes = case
    made, tokens = routing(*case), drawn(case)
    for count, places in ((experts // ep, ep), (experts // nodes, nodes)):
        visits = sum(len({e // count for e in token}) for token in tokens) / (T * places)
        chance = made.chance(0, count)
        assert abs(visits - chance) <= 5 * (chance * (1 - chance) / T) ** 0.5 + 1e-9
        assert {made.chance(place * count, count) for place in range(places)} == {chance}


def test_a_token_of_v3_visits_hardly_less_than_its_four_nodes() -> None:
    made = routing(*CASES[0])
    blind = 4 * (1 - math.comb(96, 8) / math.comb(128, 8))
    assert blind < 3.7 < 3.9 < made.nodes_per_token <= 4
    assert sum(made.rows) == T * 8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shown", ["busiest", "mean"])
def test_loads_that_are_uneven(case: tuple[int, ...], shown: str) -> None:
    """All rows arrive somewhere; the rank shown has what the fullest has, or the mean."""
    config = job()
    experts, groups, kept, chosen, ep, nodes = case

    model = replace(config.model, n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=chosen)
    place = Placement(experts, ep, ep - 1, nodes)
    made = Routing.with_max_vio(model, place, T, 0.5, shown)
    own = slice(place.first_expert, place.first_expert + place.num_local_experts)
    assert sum(made.rows) == T * chosen
    expected = T * chosen / ep * (1 + 0.5 * fullest_rank(experts, experts // ep) if shown == "busiest" else 1)
    assert sum(made.rows[own]) == pytest.approx(expected, abs=1)
    even = Routing.balanced(model, place, T)
    span = place.first_expert, place.num_local_experts
    assert (made.copies(*span) > even.copies(*span)) == (shown == "busiest" and even.chance(*span) < 0.9999)
    with pytest.raises(ValueError, match="max_vio"):
        Routing.with_max_vio(model, place, T, ep)
    with pytest.raises(ValueError, match="not one of busiest, mean"):
        Routing.with_max_vio(model, place, T, 0.1, "last")


@pytest.mark.parametrize(("experts", "own"), [(256, 4), (256, 32), (64, 8), (8, 4)])
def test_the_fullest_rank_is_fuller_as_drawn_loads_have_it(experts: int, own: int) -> None:
    """Means of 20,000 draws stray by less than 1 %, and Blom's formula by 4 % for the larger of two."""
    loads = torch.randn(20_000, experts, generator=torch.Generator().manual_seed(3))
    drawn = loads.view(len(loads), -1, own).mean(2).amax(1).mean() / loads.amax(1).mean()
    assert fullest_rank(experts, own) == pytest.approx(float(drawn), rel=0.05)
    assert fullest_rank(experts, 1) == 1 and fullest_rank(experts, experts) == 0


@pytest.mark.parametrize(("ep", "tokens"), [(1, 128), (4, 128), (4, 65_536)])
def test_counts_as_drawn_lie_as_far_apart_as_chance_has_them(ep: int, tokens: int) -> None:
    config = job("parallel.dispatch=local").model
    made = Routing.as_drawn(config, Placement(config.n_routed_experts, ep, 0, 1), tokens)
    total, own = tokens * config.num_experts_per_tok, config.n_routed_experts // ep
    mean = total / config.n_routed_experts
    assert sum(made.rows) == total and min(made.rows) < mean < max(made.rows)
    # Counts of a multinomial draw have nearly their mean as their variance; so few quantiles have a little less.
    variance = sum((count - mean) ** 2 for count in made.rows) / config.n_routed_experts
    assert 0.7 * mean < variance < 1.1 * mean
    ranks = [sum(made.rows[start : start + own]) for start in range(0, config.n_routed_experts, own)]
    assert max(ranks) - min(ranks) <= own, "ranks get alike"


def test_loads_of_a_run(tmp_path: Path) -> None:
    """The fullest rank of each router is put where this rank is, and the routers' mean is taken."""
    config = job()
    place = Placement(16, 4, 2, 2)
    first = [8, 8, 8, 8] + [1] * 12
    second = [2] * 12 + [10] * 4
    path = tmp_path / "loads.jsonl"
    path.write_text(json.dumps({"step": 3, "tokens": 100, "loads": [first, second]}) + "\n")
    (read,) = read_loads(path)

    model = replace(config.model, n_routed_experts=16, n_group=1, topk_group=1, num_experts_per_tok=2)
    busiest = Routing.of_loads(model, place, 1000, read.loads)
    shares = [32 / 44, 40 / 64]
    assert sum(busiest.rows[8:12]) == pytest.approx(2000 * sum(shares) / 2, abs=1)
    mean = Routing.of_loads(model, place, 1000, read.loads, "mean")
    assert sum(mean.rows[8:12]) < sum(busiest.rows[8:12])
    with pytest.raises(ValueError, match="not of 16 experts"):
        Routing.of_loads(model, place, 1000, [[1, 2]])


@pytest.mark.parametrize(("ep", "nodes", "dispatch"), [(2, 1, "flat"), (4, 4, "two_hop"), (8, 2, "two_hop")])
def test_any_placement_answers_what_its_dispatch_asks(ep: int, nodes: int, dispatch: str) -> None:
    """The host refuses answers of other shapes, and an exchange refuses counts that do not add up."""
    places = [f"parallel.dp={ep}", f"parallel.ep={ep}", f"parallel.nodes={nodes}", f"parallel.dispatch={dispatch}"]
    for kernels in itertools.islice(("cuda", "cpu"), 1 if ep != 4 else 2):
        assert layers_of(job(*places), kernels).passes["moe"].forward
