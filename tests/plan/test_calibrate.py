"""Calibration: what is measured fits a cluster that reads back, figures by threads, and messages by ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from launch.plan import calibrate as calibration
from launch.plan import cluster as clusters
from launch.plan import measure
from launch.plan.calibrate import calibrate, cluster_of, level_of, ranks_to_measure, text
from launch.plan.events import Enter, Launch
from launch.plan.exchange import exchange_seconds
from launch.plan.figures import MessageTime
from launch.plan.kernels import AS_WRITTEN, PUBLISHED, Rates
from launch.plan.measure import Found, Stopwatch, first_call_us, overheads_us
from tests.plan.v3_layer import product, rest


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a rank finds, in a shorter time than it should take: the figures are worth nothing, their form is all."""
    watch = Stopwatch(figure_s=1e-4)
    names = ("mul", "add", "copy_", "sum", "topk", "_to_copy", "index_add_", "cat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "PRODUCTS", measure.PRODUCTS[:4])
        patch.setattr(measure, "PASSES", {name: measure.PASSES[name] for name in names})
        patch.setattr(measure, "PASS_BYTES", measure.PASS_BYTES[:1])
        patch.setattr(measure, "LENGTHS", (64, 128))
        kinds = {
            "products": list(measure.measured_products(watch, 1)),
            "passes": list(measure.measured_passes(watch, 1)),
            "attention": list(measure.measured_attention(watch, 1)),
        }
    rows = {
        kind: [dataclasses.asdict(row) | {"num_threads": count} for count in (1, 2) for row in measured]
        for kind, measured in kinds.items()
    }
    least, launch = overheads_us(watch)
    spreads = dict.fromkeys(("products", "passes", "attention", "overheads"), 0.1)
    found = Found(
        **rows,
        messages=[],
        contention={},
        least_us=least,
        launch_us=launch,
        first_call_us=first_call_us(),
        spreads=spreads,
    )
    return {"num_ranks": 1, **json.loads(json.dumps(dataclasses.asdict(found)))}


def grouped(num_ranks: int) -> dict[str, Any]:
    """What ranks would find of gloo that takes 50 us and sends 1 GB/s."""
    rows = [
        MessageTime(name, num_ranks, num_bytes, 50.0 * num_ranks + num_bytes / 1e3)
        for name in ("exchange", "reduce_scatter", "all_gather", "send")
        for num_bytes in (64, 10**4, 10**6)
    ]
    messages = [dataclasses.asdict(row) for row in rows]
    return {"num_ranks": num_ranks, "messages": messages, "contention": {"product": 1.5, "passes": 2.0}, "spreads": {}}


def test_what_was_measured_is_a_cluster_that_reads_back(found: dict[str, Any], tmp_path: Path) -> None:
    cluster = cluster_of([found, grouped(2), grouped(4)])
    path = tmp_path / "mine.yaml"
    path.write_text(text(cluster))
    read = clusters.load(str(path))
    assert len(read.products.measured) == len(cluster.products.measured)
    assert [row.num_ranks for row in read.contention] == [2, 4]
    assert read.host.is_device and read.node == read.network
    for threads in (1, 2):
        on = read.on(threads)
        assert {row.num_threads for row in on.products.measured} == {threads}
        assert on.compute.num_units == min(threads, read.compute.num_units)
        rates = Rates(on)
        for dtype in ("float64", "float32", "bfloat16"):
            small, large = (
                rates.seconds(dataclasses.replace(product(size, size, size), dtype=dtype)) for size in (64, 2048)
            )
            assert 0 < small < large
        assert rates.seconds(rest(10**8)) > rates.seconds(rest(10**4)) >= rates.least_s
        assert rates.node_seconds([product(64, 64, 64), rest(100)], Enter("moe", "experts", "F"), PUBLISHED) > 0


def test_a_measured_operation_is_known_by_its_name_and_type(found: dict[str, Any]) -> None:
    rates = Rates(cluster_of([found]).on(1))
    row = next(row for row in found["passes"] if row["name"] == "topk" and row["dtype"] == "bfloat16")
    expected = row["num_bytes"] / (row["gb_per_s"] * 1e9)
    assert rates.pass_seconds("topk", "bfloat16", row["num_bytes"]) == pytest.approx(max(expected, rates.least_s))
    assert rates.pass_seconds("unheard_of", "bfloat16", 10**6) > 0


def test_messages_take_what_was_measured_with_as_many_ranks(found: dict[str, Any]) -> None:
    cluster = cluster_of([found, grouped(2), grouped(4)])
    for name, ranks, num_bytes in (("exchange", 2, 10**6), ("all_gather", 4, 10**4), ("reduce_scatter", 4, 64)):
        launch = Launch(0, name, "dense", ranks, num_bytes, num_bytes)
        seconds = exchange_seconds(launch, cluster, AS_WRITTEN)
        assert seconds == pytest.approx((50.0 * ranks + num_bytes / 1e3) * 1e-6)
    larger = Launch(0, "exchange", "ep", 2, 10**8, 10**8)
    assert exchange_seconds(larger, cluster, AS_WRITTEN) == pytest.approx(0.1, rel=0.15)


def test_one_rank_alone_has_no_network() -> None:
    assert level_of([], "nothing").measured == []


def test_ranks_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert [ranks_to_measure(most) for most in (1, 2, 4, 64)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4]]
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert ranks_to_measure(16) == [1, 2, 4, 8, 16]


def test_a_calibration_is_written_whole_or_not_at_all(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = {1: found, 2: grouped(2), 4: grouped(4)}
    monkeypatch.setattr(calibration, "measured", lambda num_ranks: answers[num_ranks])
    assert calibrate([]) == 0
    assert "gloo: 100 us a message" in capsys.readouterr().out
    before = clusters.here_path().read_text()
    assert clusters.load("here").title.startswith("this machine")

    def fails(num_ranks: int) -> dict[str, Any]:
        raise ValueError("no rank would start")

    monkeypatch.setattr(calibration, "measured", fails)
    with pytest.raises(ValueError, match="no rank would start"):
        calibrate([])
    assert clusters.here_path().read_text() == before
    assert [path.name for path in clusters.here_path().parent.iterdir()] == [clusters.here_path().name]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("max_ranks=0", "max_ranks=0 must be at least 1"),
        ("out=here.txt", "out=here.txt: a file of settings ends in .yaml or .yml"),
        ("speed=3", "speed is not a key of plan calibrate"),
    ],
)
def test_bad_words_are_refused_before_anything_is_measured(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        calibrate([word])


@pytest.mark.slow
def test_a_calibration_of_this_machine(tmp_path: Path) -> None:
    """The whole of it, ranks and all. That its figures are right is not asserted: it would take an idle machine."""
    out = tmp_path / "here.yaml"
    assert calibrate([f"out={out}", "max_ranks=2"]) == 0
    cluster = clusters.load(str(out))
    assert {row.num_ranks for row in cluster.node.measured} == {2}
