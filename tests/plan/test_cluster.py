"""Clusters: what the repository's files say, how a file of one's own is read, and which figures are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.plan import cluster as clusters
from launch.plan import published
from launch.plan.cluster import CLUSTERS, Cluster, load
from launch.plan.figures import PassRate, ProductRate
from train.compose import compose
from train.settings import settings_of

SHIPPED = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


@pytest.fixture
def own(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], str]:
    """Writes a cluster file like h800's after a change; returns its path as a word has it."""

    def write(change: Callable[[dict[str, Any]], None]) -> str:
        tree = yaml.safe_load((CLUSTERS / "h800.yaml").read_text())
        change(tree)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    return write


def test_the_clusters_of_the_issue_are_there() -> None:
    assert set(SHIPPED) >= {"h800", "h100", "h200", "b200", "gb200", "gb300"}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cluster_is_whole_and_has_its_sources(name: str) -> None:
    cluster = load(name)
    for group in ("memory", "compute", "products", "attention", "passes", "host", "node", "network", "exchange"):
        assert len(getattr(cluster, group).source) > 20, group
    reserve = cluster.memory.device_gb * 1e9 - cluster.memory.usable_bytes(num_communicators=8)
    assert 0 < reserve < 0.1 * cluster.memory.device_gb * 1e9
    assert cluster.node.gb_per_s <= cluster.node.peak_gb_per_s
    assert cluster.network.gb_per_s <= cluster.network.peak_gb_per_s < cluster.node.peak_gb_per_s


def test_every_figure_has_its_help() -> None:
    for kind in (Cluster, published.KernelSet):
        assert [each.key for each in settings_of(kind) if not each.text] == []


def test_a_file_of_ones_own_is_read_as_a_shipped_one(own: Callable[..., str]) -> None:
    def faster(tree: dict[str, Any]) -> None:
        tree["network"]["peak_gb_per_s"] = 100

    shipped, mine = load("h800"), load(own(faster))
    assert mine == dataclasses.replace(shipped, network=dataclasses.replace(shipped.network, peak_gb_per_s=100))


REFUSED: list[tuple[str, Any, str]] = [
    ("memory.peak_gb_per_s", None, "cluster.memory.peak_gb_per_s is missing: bandwidth by the data sheet"),
    ("memory", None, "cluster.memory.source is missing"),
    ("compute.source", "", "cluster.compute.source is empty: every group of figures says where it is from"),
    ("memory.reached_share", 1.5, "cluster.memory.reached_share=1.5 must be at most 1"),
    ("network.gb_per_s", 0, "cluster.network.gb_per_s=0.0 must be above 0"),
    ("network.gb_per_s", -4, "cluster.network.gb_per_s=-4.0 must be above 0"),
    ("network.latency_us", -1, "cluster.network.latency_us=-1.0 must be at least 0"),
    ("network.gb_per_s", float("inf"), "cluster.network.gb_per_s=inf must be a finite number"),
    ("network.gb_per_s", 51, "cluster.network.gb_per_s=51.0 is above cluster.network.peak_gb_per_s=50"),
    ("memory.context_gb", 90, "cluster.memory.device_gb=84.94 must be above the reserve of 90.2"),
    ("devices_per_node", "eight", "cluster.devices_per_node"),
    ("speed", 3, "cluster.speed is not a key of cluster"),
    ("exchange.num_units_taken", 132, "cluster.exchange.num_units_taken=132 leaves none of cluster.compute.num_units"),
    ("products.measured.0.tflops", 2500, "cluster.products.measured[0].tflops=2500.0 is above the peak"),
    ("products.measured.0.k", None, "cluster.products.measured[0].k is missing: length of the sums"),
    ("products.measured.0.dtype", "fp8", "cluster.products.measured[0].dtype=fp8 is not one of float64"),
    ("products.measured.0.groups", 9999, "cluster.products.measured[0].groups=9999 must be at most its rows"),
    ("products.measured", [], "cluster.products.measured is empty"),
    ("exchange.measured", [], "cluster.exchange.measured is empty"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), REFUSED, ids=[f"{key}={value}" for key, value, _ in REFUSED])
def test_a_figure_that_cannot_be_is_refused_by_its_key(
    own: Callable[..., str], key: str, value: Any, sentence: str
) -> None:
    def change(tree: Any) -> None:
        *above, last = (int(word) if word.isdigit() else word for word in key.split("."))
        for word in above:
            tree = tree[word]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    with pytest.raises(ValueError) as caught:
        load(own(change))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("h8000", "cluster=h8000 is not known; did you mean h800?"),
        ("abacus", "cluster=abacus is not known: it takes b200, gb200, gb300, h100, h200, h800, here"),
        ("nowhere/mine.yaml", "cluster=nowhere/mine.yaml: there is no such file"),
    ],
)
def test_an_unknown_cluster_names_the_known_ones(name: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(name)
    assert str(caught.value).startswith(sentence)


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    for text in ("a: [", "- 1\n", ""):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"mine\.yaml"):
            load(str(path))


def test_here_says_how_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="cluster=here has not been measured: python -m launch plan calibrate does so"):
        load("here")


def test_a_run_has_no_cluster() -> None:
    with pytest.raises(ValueError, match="cluster is not a key"):
        compose(["cluster=h800"])


def test_figures_by_threads_are_those_of_the_nearest_number() -> None:
    cluster = load("h800")
    rows = [ProductRate("float32", 64, 64, 64, 1.0 * n, num_threads=n) for n in (1, 8)]
    passes = dataclasses.replace(
        cluster.passes, measured=[PassRate("any", 100, 1.0 * n, num_threads=n) for n in (1, 8)]
    )
    cluster = dataclasses.replace(cluster, products=dataclasses.replace(cluster.products, measured=rows), passes=passes)
    for num_threads, expected in {1: 1, 2: 1, 4: 8, 8: 8, 64: 8}.items():
        on = cluster.on(num_threads)
        assert {row.num_threads for row in (*on.products.measured, *on.passes.measured)} == {expected}
    assert load("h800").on(4) == load("h800")
    assert clusters.known()[-1] == "here"
