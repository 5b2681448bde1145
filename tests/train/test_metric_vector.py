"""Metrics by their declarations: added up over micro-batches, carried between ranks, absent where nobody measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.track.metrics import EACH, MAX, MEAN, METRICS, SUM, Metric
from train.track.vector import Metrics

DECLARED = (
    Metric("loss", "nats", SUM, per="targets", is_loss=True),
    Metric("largest", "logits", MAX),
    Metric("wait_s", "seconds", MEAN),
    Metric("time_s", "seconds", EACH, is_reported=False),
    Metric("share", "tokens", SUM, per="tokens"),
    Metric("tokens", "tokens", SUM, is_whole=True),
    Metric("lr", "per step"),
)


def plain_sum(column: list[float]) -> float:
    """One after the other, as `sum` does not do it in every Python."""
    total = column[0]
    for number in column[1:]:
        total += number
    return total


PLAIN: dict[str, Any] = {
    "loss": plain_sum,
    "largest": max,
    "wait_s": lambda column: plain_sum(column) / len(column),
    "tokens": plain_sum,
}
numbers = st.floats(-1e6, 1e6, allow_nan=False)


def put(tensor: Tensor) -> Tensor:
    return tensor


def scalars(measured: Mapping[str, float]) -> dict[str, Tensor]:
    """Numbers as a device has them: float64 tensors without dimensions."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in measured.items()}


def together(metrics: Metrics, ranks: list[Mapping[str, Any]], **counts: int) -> dict[str, float]:
    return metrics.unpack([metrics.pack(measured, put).tolist() for measured in ranks], counts)


@pytest.mark.parametrize("where", [dict, scalars], ids=["host", "device"])
@settings(deadline=None)
@given(
    ranks=st.lists(st.dictionaries(st.sampled_from([*PLAIN]), numbers), min_size=1, max_size=5),
    num_targets=st.integers(0, 7),
)
def test_ranks_are_put_together_as_a_plain_loop_does_it(
    where: Any, ranks: list[dict[str, float]], num_targets: int
) -> None:
    """Those that did not measure have no part in it."""
    expected = {}
    for name, plain in PLAIN.items():
        if column := [own[name] for own in ranks if name in own]:
            expected[name] = plain(column)
    if "loss" in expected:
        expected["loss"] /= num_targets or 1
    if "tokens" in expected:
        expected["tokens"] = int(expected["tokens"])
    assert together(Metrics(DECLARED), [where(own) for own in ranks], targets=num_targets) == expected


def test_sums_are_those_of_the_rank_order() -> None:
    ranks = [0.1, 0.2, 0.3, 1e16, -1e16]
    found = together(Metrics(DECLARED), [{"loss": number} for number in ranks], targets=1)
    assert found["loss"] == (((0.1 + 0.2) + 0.3) + 1e16) - 1e16


def test_a_metric_may_be_divided_by_another() -> None:
    metrics = Metrics(DECLARED)
    assert together(metrics, [{"share": 3, "tokens": 2}, {"share": 4, "tokens": 2}]) == {"share": 7 / 4, "tokens": 4}
    assert together(metrics, [{"share": 0, "tokens": 0}])["share"] == 0, "nothing of nothing"


def test_what_is_kept_apart_is_a_column() -> None:
    metrics = Metrics(DECLARED)
    rows = [metrics.pack(own, put).tolist() for own in ({"time_s": 2.0}, {"loss": 1.0}, {"time_s": 0.0})]
    assert metrics.column(rows, "time_s") == [2.0, 0.0]
    assert "time_s" not in metrics.unpack(rows, {"targets": 1})


def test_what_is_not_a_number_is_seen() -> None:
    metrics = Metrics(DECLARED)
    for number in (math.nan, math.inf):
        values = together(metrics, [{"loss": 1.0}, {"loss": number}, {"loss": 1.0}], targets=3)
        assert not metrics.finite(values) and not math.isfinite(values["loss"])
    for column in ([1.0, math.nan], [math.nan, 1.0]):
        assert math.isnan(together(metrics, [{"largest": number} for number in column])["largest"])
    assert metrics.finite(together(metrics, [{"loss": 1.0, "largest": math.inf}], targets=1)), "that is no loss"
    assert metrics.finite({}), "a step without losses has none that is bad"


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["loss", "largest", "wait_s"]), numbers), max_size=5))
def test_micro_batches_add_up_by_declaration(micro_batches: list[dict[str, float]]) -> None:
    metrics, total = Metrics(DECLARED), {}
    for each in micro_batches:
        metrics.add(total, scalars(each))
    for name, plain in {"loss": plain_sum, "largest": max, "wait_s": plain_sum}.items():
        column = [each[name] for each in micro_batches if name in each]
        assert (float(total[name]) if name in total else None) == (plain(column) if column else None)


def test_names_may_be_made_when_a_run_is_put_together() -> None:
    made = [Metric(f"valid/{source}/loss", "nats per token", SUM, per="targets") for source in ("wiki", "code")]
    made += [Metric(f"attention/largest_logit/layer_{layer}", "logit", MAX) for layer in range(3)]
    metrics = Metrics((*METRICS, *made))
    values = together(
        metrics,
        [
            {"valid/wiki/loss": 6.0, "attention/largest_logit/layer_1": torch.tensor(7.0)},
            {"valid/wiki/loss": 2.0, "attention/largest_logit/layer_1": torch.tensor(9.0)},
        ],
        targets=4,
    )
    assert values == {"valid/wiki/loss": 2.0, "attention/largest_logit/layer_1": 9.0}
    assert dict(metrics.report({"step": 3, **values}).values) == {"step": 3, **values}


def test_only_what_is_declared_is_carried_and_reported() -> None:
    metrics = Metrics(DECLARED)
    for name in ("los", "lr"):  # a slip, and one that does not travel
        with pytest.raises(KeyError, match=f"no metric that travels: {name}"):
            metrics.pack({name: 1.0}, put)
    with pytest.raises(KeyError, match="no declared metric: los"):
        metrics.report({"los": 1.0})
    assert list(metrics.report({"lr": 1.0, "time_s": 2.0, "loss": 3.0}).values) == ["loss", "lr"]
    with pytest.raises(ValueError, match="loss is declared twice"):
        Metrics([*DECLARED, DECLARED[0]])


def test_every_divisor_is_there() -> None:
    """A count of the step, or a metric that travels."""
    travelling = {metric.name for metric in METRICS if metric.over is not None}
    counts = {"targets", "targets of all depths", "sequences", "targets of <source>"}
    assert {metric.per for metric in METRICS} - {None} <= travelling | counts
