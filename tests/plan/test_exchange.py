"""Communication in three sets: which level it crosses, and that no set undercuts the links."""

from __future__ import annotations

import itertools

import pytest

from launch.plan import cluster as clusters
from launch.plan import published
from launch.plan.events import Launch
from launch.plan.exchange import COMBINE, DISPATCH, exchange_seconds
from launch.plan.kernels import AS_WRITTEN, BOUND, KERNELS, PUBLISHED

H800 = clusters.load("h800")
MB = 10**6


def launch(name: str, group: str, num_peers: int, num_bytes: int) -> Launch:
    return Launch(0, name, group, num_peers, num_bytes, num_bytes)


def test_nothing_is_faster_than_the_links() -> None:
    names = {"exchange": ("rail", "node", "ep"), "reduce_scatter": ("dense", "expert", "world"), "send": ("link",)}
    for name, groups in names.items():
        for group, peers, num_bytes, way in itertools.product(
            groups, (2, 8, 64), (0, MB, 100 * MB), (DISPATCH, COMBINE)
        ):
            one = launch(name, group, peers, num_bytes)
            bound = exchange_seconds(one, H800, BOUND, way=way)
            for kernels in (AS_WRITTEN, PUBLISHED):
                assert bound <= exchange_seconds(one, H800, kernels, way=way) * 1.0001, (one, kernels)


def test_a_hop_crosses_its_own_level() -> None:
    rail = exchange_seconds(launch("exchange", "rail", 8, 100 * MB), H800, AS_WRITTEN)
    node = exchange_seconds(launch("exchange", "node", 8, 100 * MB), H800, AS_WRITTEN)
    assert rail == pytest.approx(100e6 / 40e9, rel=0.01)
    assert node == pytest.approx(100e6 / 160e9, rel=0.02)


def test_a_flat_exchange_is_as_slow_as_its_part_of_the_network() -> None:
    inside = exchange_seconds(launch("exchange", "ep", 8, 100 * MB), H800, AS_WRITTEN)
    across = exchange_seconds(launch("exchange", "ep", 64, 100 * MB), H800, AS_WRITTEN)
    assert inside == pytest.approx(100e6 / 160e9, rel=0.02)
    assert across == pytest.approx(100e6 * 56 / 63 / 40e9, rel=0.03)


def test_deep_ep_moves_a_batch_of_tokens_as_its_table_says() -> None:
    """4096 tokens to 8 nodes of which one is their own, as the table counts: all 8 over its bandwidth."""
    one = launch("exchange", "rail", 8, 100 * MB)
    assert exchange_seconds(one, H800, PUBLISHED) == pytest.approx(100e6 * 8 / 7 / 51e9, rel=0.01)
    assert exchange_seconds(one, H800, PUBLISHED, way=COMBINE) == pytest.approx(100e6 * 8 / 7 / 50e9, rel=0.01)


def test_the_traces_payload_follows_beside_compute() -> None:
    """DeepSeek's trace: 3.88 ms a dispatch and 6.18 ms a combine in the mean, in FP8 with a scale for 128 values."""
    tokens = 4096 * 3.96 * 7 / 8
    kernels = published.load()
    dispatch = launch("exchange", "rail", 8, round(tokens * 7168 * (1 + 4 / 128)))
    combine = launch("exchange", "rail", 8, round(tokens * 7168 * 2))
    assert exchange_seconds(dispatch, H800, PUBLISHED, kernels, DISPATCH) == pytest.approx(3.88e-3, rel=0.05)
    assert exchange_seconds(combine, H800, PUBLISHED, kernels, COMBINE) == pytest.approx(6.18e-3, rel=0.05)


def test_a_ring_over_whole_machines_uses_all_their_network_cards() -> None:
    whole = exchange_seconds(launch("reduce_scatter", "dense", 128, 1000 * MB), H800, AS_WRITTEN)
    single = exchange_seconds(launch("reduce_scatter", "expert", 2, 1000 * MB), H800, AS_WRITTEN)
    assert single == pytest.approx(1 / 40, rel=0.01)
    assert whole == pytest.approx(1 / 160, rel=0.01)
    assert exchange_seconds(
        launch("reduce_scatter", "dense", 128, 1000 * MB), H800, AS_WRITTEN, num_together=1
    ) == pytest.approx(1 / 40, rel=0.01)


def test_a_small_message_costs_its_way() -> None:
    for kernels in KERNELS:
        assert exchange_seconds(launch("send", "link", 2, 8), H800, kernels) >= 3.3e-6


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="way=there"):
        exchange_seconds(launch("exchange", "rail", 8, 1), H800, PUBLISHED, way="there")
