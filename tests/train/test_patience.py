"""When a run ends whose validation loss no longer improves: against the plain words of the rule, and exact to go on."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from train.track.patience import Patience

LOSSES = st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=30)


@given(LOSSES, st.integers(1, 5), st.sampled_from([0.0, 0.1, 1.0]))
def test_it_ends_after_so_many_evaluations_without_a_better_one(losses: list[float], limit: int, least: float) -> None:
    patience, ended = Patience(limit, least), None
    for number, loss in enumerate(losses):
        patience.see(loss)
        if patience.is_exhausted and ended is None:
            ended = number
    best, since, expected = float("inf"), 0, None
    for number, loss in enumerate(losses):
        best, since = (loss, 0) if loss < best - least else (best, since + 1)
        if since == limit and expected is None:
            expected = number
    assert ended == expected


@given(LOSSES, st.integers(0, 29))
def test_what_is_kept_of_it_is_enough(losses: list[float], at: int) -> None:
    whole, before = Patience(3, 0.1), Patience(3, 0.1)
    for loss in losses:
        whole.see(loss)
    for loss in losses[:at]:
        before.see(loss)
    kept = json.loads(json.dumps([before.best, before.num_since]))
    after = Patience(3, 0.1, *kept)
    for loss in losses[at:]:
        after.see(loss)
    assert after == whole


def test_without_a_limit_it_never_ends() -> None:
    patience = Patience()
    for _ in range(100):
        patience.see(1.0)
    assert patience.num_since == 99 and not patience.is_exhausted
