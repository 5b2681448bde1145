"""Seconds of what ranks send each other, in the three sets of `kernels.py`.

as written  NCCL: an all-to-all at what a device reaches on its links, a collective at the bandwidth of a ring
published   DeepEP's tables by number of ranks for tokens' all-to-all, less what the trace lost beside compute;
            collectives as NCCL does them
bound       every byte at the links' own bandwidth, and one message's way
"""

from __future__ import annotations

import math

from launch.plan.cluster import Cluster
from launch.plan.events import Launch
from launch.plan.figures import ExchangeRate, Level, interpolated
from launch.plan.kernels import BOUND, KERNELS, PUBLISHED
from launch.plan.published import KernelSet

EXCHANGE = "exchange"
# Groups of which no two ranks share a machine, where the job has more than one.
APART = {"rail", "expert", "link"}
# Tokens on their way to experts, and back: in a backward pass the one's gradient travels as the other.
DISPATCH, COMBINE = "dispatch", "combine"


def exchange_seconds(
    launch: Launch,
    cluster: Cluster,
    kernels: str,
    kernel_set: KernelSet | None = None,
    way: str = DISPATCH,
    num_together: int | None = None,
) -> float:
    """A communication's time, from when it has all that it needs.

    kernels: one of `KERNELS`.
    kernel_set: whose exchanges run beside compute; None: nothing computes meanwhile. Matters to published alone.
    way: of an exchange in the published set, `dispatch` or `combine`: which of DeepEP's kernels does it.
    num_together: ranks of the group that share a machine; None: as many as a machine holds, of a `rail`, an `expert`
        group and a `link` one.

    ValueError for another word of `kernels` or `way`.
    """
    if kernels not in KERNELS or way not in (DISPATCH, COMBINE):
        raise ValueError(f"kernels={kernels}, way={way}: one of {', '.join(KERNELS)}, and {DISPATCH} or {COMBINE}")
    together = num_together or _together(launch, cluster)
    payload = max(launch.sent_bytes, launch.received_bytes)
    peers = max(launch.num_peers - 1, 1)
    level = cluster.node if together >= launch.num_peers else cluster.network
    if kernels != BOUND and (times := _measured(level, launch)):
        return interpolated(times, payload) * max(1.0, payload / times[-1][0]) * 1e-6
    if launch.name == EXCHANGE or launch.group == "link":
        inside = payload * (together - 1) / peers if together < launch.num_peers else payload
        outside = payload - inside
        if kernels == PUBLISHED and launch.name == EXCHANGE:
            return _deep_ep(
                launch, cluster, kernel_set, way, outside if together < launch.num_peers else payload, together
            )
        levels = [(cluster.node, inside, together - 1), (cluster.network, outside, peers - together + 1)]
        return max(_seconds(level, sent, num, kernels) for level, sent, num in levels if sent or num)
    return _ring_seconds(launch, cluster, kernels, together, payload)


def _measured(level: Level, launch: Launch) -> list[tuple[float, float]]:
    """(bytes, 1e-6 s) of a communication, of the nearest number of ranks that it was measured with."""
    name = {"receive": "send", "all_reduce": "all_gather"}.get(launch.name, launch.name)
    rows = [row for row in level.measured if row.name == name]
    if not rows:
        return []
    near = min({row.num_ranks for row in rows}, key=lambda num: abs(math.log(num / max(launch.num_peers, 1))))
    return sorted((max(row.num_bytes, 1), row.us) for row in rows if row.num_ranks == near)


def _together(launch: Launch, cluster: Cluster) -> int:
    if launch.group in APART:
        return 1
    return min(launch.num_peers, cluster.devices_per_node)


def _seconds(level: Level, sent: float, num_peers: int, kernels: str) -> float:
    if kernels == BOUND:
        return level.latency_us * 1e-6 + sent / (level.peak_gb_per_s * 1e9)
    return (level.latency_us + level.per_rank_us * num_peers) * 1e-6 + sent / (level.gb_per_s * 1e9)


def _ring_seconds(launch: Launch, cluster: Cluster, kernels: str, together: int, payload: float) -> float:
    """A collective. All devices of a machine send through their own network card at once, so a ring over whole
    machines is as fast as all these cards, or as the links inside where those are slower."""
    level = cluster.node if together >= launch.num_peers else cluster.network
    one = level.peak_gb_per_s if kernels == BOUND else level.collective_gb_per_s
    rate = one
    if level is cluster.network and together > 1:
        inside = cluster.node.peak_gb_per_s if kernels == BOUND else cluster.node.collective_gb_per_s
        rate = min(inside, together * one)
    steps = math.ceil(math.log2(max(launch.num_peers, 2)))
    return level.latency_us * 1e-6 * steps + payload / (rate * 1e9)


def _deep_ep(
    launch: Launch, cluster: Cluster, kernel_set: KernelSet | None, way: str, sent: float, together: int
) -> float:
    """DeepEP's kernels: their bandwidth counts what stays on a rank's own node as if it were sent."""
    crosses = together < launch.num_peers
    num_ranks = launch.num_peers * (cluster.devices_per_node if launch.group == "rail" else 1)
    nodes = num_ranks / cluster.devices_per_node if crosses else num_ranks
    rate = _rate(cluster.exchange.measured, num_ranks, way) * 1e9 * (1 - 1 / max(nodes, 2))
    level = cluster.network if crosses else cluster.node
    rate = min(rate, level.peak_gb_per_s * 1e9)
    if kernel_set is not None:
        rate *= kernel_set.dispatch_share if way == DISPATCH else kernel_set.combine_share
    return level.latency_us * 1e-6 + sent / rate


def _rate(rows: list[ExchangeRate], num_ranks: int, way: str) -> float:
    """1e9 bytes/s, between measured numbers of ranks by the logarithm of the number, beyond them as at the ends."""
    points = sorted((row.num_ranks, row.dispatch_gb_per_s if way == DISPATCH else row.combine_gb_per_s) for row in rows)
    return interpolated(points, num_ranks)
