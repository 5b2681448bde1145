"""Calibration: what is measured fits a cluster that reads back, figures by threads, and messages by ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks._allocated import most_bytes
from launch.plan import calibrate as calibration
from launch.plan import cluster as clusters
from launch.plan import measure
from launch.plan.calibrate import calibrate, cluster_of, level_of, ranks_to_measure, text
from launch.plan.events import Enter, Launch
from launch.plan.exchange import exchange_seconds
from launch.plan.figures import FarTime, MessageTime
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN, PUBLISHED, Rates
from launch.plan.measure import Found, least_s
from launch.plan.own_code import measured_code
from launch.plan.stopwatch import Stopwatch
from tests.plan.jobs import job
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
        patch.setattr(measure, "FAR_BYTES", 1 << 20)
        far_products, far_passes = measure.measured_far(watch, 1)
        kinds = {
            "products": list(measure.measured_products(watch, 1)),
            "passes": list(measure.measured_passes(watch, 1)),
            "attention": list(measure.measured_attention(watch, 1)),
            "far_products": far_products,
            "far_passes": far_passes,
        }
    rows = {
        kind: [dataclasses.asdict(row) | {"num_threads": count} for count in (1, 2) for row in measured]
        for kind, measured in kinds.items()
    }
    least = 1e6 * least_s(watch)
    spreads = dict.fromkeys(("products", "passes", "attention", "overheads"), 0.1)
    found = Found(
        **rows,
        code=[dataclasses.asdict(piece) for piece in measured_code(["fp32"], num_steps=1)],
        messages=[],
        contention={},
        least_us=least,
        spreads=spreads,
    )
    return {"num_ranks": 1, **json.loads(json.dumps(dataclasses.asdict(found)))}


CROWDED = {"product": 1.5, "passes": 2.0, "calls": 1.25}


def grouped(num_ranks: int) -> dict[str, Any]:
    """What ranks would find of gloo that takes 50 us and sends 1 GB/s."""
    rows = [
        MessageTime(name, num_ranks, num_bytes, 50.0 * num_ranks + num_bytes / 1e3)
        for name in ("exchange", "reduce_scatter", "all_gather", "send")
        for num_bytes in (64, 10**4, 10**6)
    ]
    messages = [dataclasses.asdict(row) for row in rows]
    return {"num_ranks": num_ranks, "messages": messages, "contention": dict(CROWDED), "spreads": {}}


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


def test_ranks_that_share_cores_take_turns(found: dict[str, Any]) -> None:
    """Between what was measured, where some ranks wait; above it in proportion; a rank alone is as it is."""
    cluster = cluster_of([found, grouped(2), grouped(4)])
    assert cluster.slowdown(1) == {}
    assert cluster.slowdown(2) == {"product": 1.5, "attention": 1.5, "move": 2.0, "calls": 1.25}
    assert 1 < cluster.slowdown(1.5)["move"] < 2
    assert cluster.slowdown(8)["product"] == pytest.approx(2 * cluster.slowdown(4)["product"])


def test_pieces_of_our_own_code_are_priced_by_their_names(found: dict[str, Any]) -> None:
    host = cluster_of([found]).host
    row = next(row for row in host.calls if (row.layer, row.node, row.kind) == ("moe", "experts", "F"))
    assert host.call_us("fp32", "moe", "experts", "F") == row.call_us
    assert host.call_us("fp8", "moe", "experts", "F") == row.call_us, "of another precision, where there is none"
    rows = [each.call_us for each in host.calls if each.kind == "F"]
    assert host.call_us("fp32", "unheard", "of", "F") == pytest.approx(sum(rows) / len(rows))
    assert host.call_us("fp32", "unheard", "of", "X") == host.launch_us
    kinds = {(row.layer, row.kind) for row in host.calls}
    assert kinds >= {(layer, kind) for layer in ("dense", "moe", "mtp") for kind in "FBW"} | {
        ("head", "F"),
        ("head", "B"),
    }
    assert ("optimizer", "U") in kinds and host.step_us > 0


def test_a_calibration_of_an_older_version_is_refused(found: dict[str, Any], tmp_path: Path) -> None:
    cluster = cluster_of([found])
    old = dataclasses.replace(cluster, host=dataclasses.replace(cluster.host, calls=[]))
    path = tmp_path / "old.yaml"
    path.write_text(text(old))
    with pytest.raises(ValueError, match=r"cluster\.host\.calls.* python -m launch plan calibrate measures it again"):
        clusters.load(str(path))


def test_figures_of_another_version_say_how_to_measure_again(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clusters.here_path().parent.mkdir()
    clusters.here_path().write_text(text(cluster_of([found])).replace("tile_rows:", "tile_lines:"))
    with pytest.raises(ValueError, match=r"plan calibrate measures this machine again: .*tile_rows is missing"):
        clusters.load("here")


def test_far_operands_take_longer(found: dict[str, Any]) -> None:
    rates = Rates(cluster_of([found]).on(1))
    rows = [FarTime(10**4, 0.1), FarTime(10**6, 0.05)]
    assert rates.far_seconds(rows, 10**6, 10**6) == pytest.approx(5e-5)
    assert rates.far_seconds(rows, 10**6, 0) == 0 == rates.far_seconds([], 10**6, 10**6)
    near = rest(10**5)
    assert rates.seconds(dataclasses.replace(near, far_bytes=10**5)) >= rates.seconds(near)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_holds_what_is_planned(found: dict[str, Any], precision: str) -> None:
    """Tensors of a real step, followed by other means than the trace's, as `benchmarks.plan` does it."""
    config = job(f"precision={precision}", "train.global_batch_size=4", "parallel.dispatch=local")
    (rank,) = Plan(config, cluster_of([found])).ranks
    assert rank.total - rank.reserve == pytest.approx(most_bytes(config), rel=0.05)


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
