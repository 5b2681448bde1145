"""What a core's cache still holds of an operation's operands."""

from __future__ import annotations

import torch

from launch.plan.nearness import NEAR_BYTES, Nearness


def test_what_was_just_touched_is_near_and_what_much_has_passed_is_far() -> None:
    near, x, other = Nearness(), torch.empty(1000), torch.empty(NEAR_BYTES // 4)
    assert near.far_bytes([x]) == 4000, "nobody has touched it"
    assert near.far_bytes([x, x]) == 0
    assert near.far_bytes([other]) == NEAR_BYTES
    assert near.far_bytes([x]) == 0, "just as much as stays has passed"
    near.far_bytes([other, torch.empty(1)])
    assert near.far_bytes([x]) == 4000


def test_views_of_one_storage_are_one() -> None:
    near, x = Nearness(), torch.empty(10, 100)
    near.far_bytes([x])
    assert near.far_bytes([x[3], x.t()]) == 0


def test_memory_given_out_again_is_as_near_as_when_it_was_given_back() -> None:
    near, x = Nearness(), torch.empty(1000)
    near.far_bytes([x])
    near.died(x.untyped_storage()._cdata, 4096)
    y = torch.empty(1000)
    near.born(y.untyped_storage()._cdata, 4096)
    assert near.far_bytes([y]) == 0
    z = torch.empty(1000)
    near.born(z.untyped_storage()._cdata, 4096)
    assert near.far_bytes([z]) == 4000, "there is no other block to give out"
