"""The selection bias moves by the sign of the imbalance, once per call."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.train.model_cases import TINY, build
from train.recipe.balance import update_bias


def test_signs() -> None:
    model = build(TINY)
    before = {number: router.e_score_correction_bias.clone() for number, router in model.routers().items()}
    load = torch.zeros(TINY.num_routers, TINY.n_routed_experts, dtype=torch.int64)
    load[0] = torch.tensor([5, 5, 5, 5, 5, 5, 5, 5])
    load[1] = torch.tensor([0, 10, 5, 5, 4, 6, 5, 5])
    # The mean is not whole: 9/8. Nobody is balanced.
    load[2] = torch.tensor([2, 1, 1, 1, 1, 1, 1, 1])
    update_bias(model, load, 0.001)
    expected = {
        0: [0, 0, 0, 0, 0, 0, 0, 0],
        1: [1, -1, 0, 0, 1, -1, 0, 0],
        2: [-1, 1, 1, 1, 1, 1, 1, 1],
        3: [0, 0, 0, 0, 0, 0, 0, 0],
    }
    assert set(before) == set(expected)
    for number, router in model.routers().items():
        moved = router.e_score_correction_bias - before[number]
        torch.testing.assert_close(moved, 0.001 * torch.tensor(expected[number], dtype=moved.dtype))


def test_a_router_without_a_bias_has_nothing_to_move_or_to_save() -> None:
    model = build(replace(TINY, topk_method="group_limited_greedy", scoring_func="softmax"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update_bias(model, torch.ones(TINY.num_routers, TINY.n_routed_experts, dtype=torch.int64), 0.001)
    assert not list(model.buffers())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_counts_beyond_the_precision_of_floats() -> None:
    model = build(TINY, torch.float32)
    before = model.routers()[0].e_score_correction_bias.clone()
    load = torch.full((TINY.num_routers, TINY.n_routed_experts), 2**40, dtype=torch.int64)
    load[0, 0] += 1
    update_bias(model, load, 1.0)
    moved = model.routers()[0].e_score_correction_bias - before
    assert torch.equal(moved.round(), torch.tensor([-1.0] + 7 * [1.0]))
