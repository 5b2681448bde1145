"""`python -m launch plan calibrate`: measures this machine and writes what it found as the cluster `here`."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.plan.cluster import DTYPES, Cluster, here_path, load
from launch.plan.figures import (
    Attention,
    AttentionRate,
    Compute,
    Contention,
    DeviceMemory,
    Exchange,
    ExchangeRate,
    FarTime,
    Host,
    Level,
    MessageTime,
    Passes,
    PassRate,
    ProductRate,
    Products,
)
from launch.plan.here import found_by
from launch.plan.own_code import PieceTime, call_times, step_us
from launch.plan.unmeasured import CONTEXT_GB, memory_gb
from train.settings import read

RANK = "launch.plan.measure"
# A tile of a processor's libraries: what its registers hold of a result.
TILE_ROWS, TILE_COLUMNS = 16, 64
# Operations whose rates stand for all that were not measured, and what none of their caches holds.
USUAL, LARGE_PASS_BYTES = ("mul", "add", "copy_", "sum"), 32 << 20


@dataclass(frozen=True)
class CalibrateSettings:
    """`plan calibrate`: where the figures of this machine go.

    Attributes:
        out: file to write; null: the file of this user and machine that `cluster=here` reads.
        max_ranks: most ranks whose messages are measured; 1: none.
    """

    out: Path | None = None
    max_ranks: int = 4

    def check(self) -> None:
        """ValueError for no rank, or a file that is no YAML by its name."""
        if self.max_ranks < 1:
            raise ValueError(f"max_ranks={self.max_ranks} must be at least 1")
        if self.out is not None and self.out.suffix not in (".yaml", ".yml"):
            raise ValueError(f"out={self.out}: a file of settings ends in .yaml or .yml")


def calibrate(words: Sequence[str]) -> int:
    """Measure products, memory, attention and gloo on this machine, write them and say what was seen.

    ValueError for a bad setting, and OSError where nothing can be written, before anything is measured.
    """
    settings = read(CalibrateSettings, words, "plan calibrate")
    out = settings.out or here_path()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=out.parent, prefix=f".{out.stem}.", suffix=".yaml") as aside:
        started = time.monotonic()
        print(f"measuring {platform.processor() or platform.machine()}, {os.cpu_count()} cores; about a minute")
        found = [measured(num_ranks) for num_ranks in ranks_to_measure(settings.max_ranks)]
        cluster = cluster_of(found)
        aside.write(text(cluster))
        aside.flush()
        load(aside.name)  # as it will be read
        os.replace(aside.name, out)
        Path(aside.name).touch()  # which its context takes away
    print(f"{summary(cluster, found)}\nin {time.monotonic() - started:.0f} s: {out}")
    return 0


def ranks_to_measure(most: int) -> list[int]:
    """1, then powers of two up to `most`, but at most twice the cores."""
    limit = min(most, 2 * (os.cpu_count() or 1))
    return [1, *(2**i for i in range(1, 16) if 2**i <= limit)]


def measured(num_ranks: int) -> dict[str, Any]:
    """What `num_ranks` ranks found, started as those of a job. ValueError with the reason if they failed."""
    print(f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'}", flush=True)
    try:
        return {"num_ranks": num_ranks, **found_by(RANK, [], num_ranks)}
    except ValueError as error:
        raise ValueError(f"this machine could not be measured with {num_ranks} ranks: {error}") from None


def cluster_of(found: Sequence[dict[str, Any]]) -> Cluster:
    """The findings of one rank, and of several, as a cluster whose devices are this machine's processes."""
    alone, groups = found[0], found[1:]
    products = [ProductRate(**row) for row in alone["products"]]
    passes = [PassRate(**row) for row in alone["passes"]]
    messages = [MessageTime(**row) for group in groups for row in group["messages"]]
    how = f"measured here ({platform.processor() or platform.machine()}, {os.cpu_count()} cores) by plan calibrate"
    spreads = {kind: share for each in found for kind, share in each["spreads"].items()}
    fastest = max(row.gb_per_s for row in passes)
    out_of_cache = [row.gb_per_s for row in passes if row.num_bytes >= LARGE_PASS_BYTES]
    said = {kind: f"{how}; a figure's blocks lay {share:.0%} apart" for kind, share in spreads.items()}
    level = level_of(messages, f"{how}: gloo between processes, by number of ranks and size")
    cores = os.cpu_count() or 1
    made = Cluster(
        title=f"this machine: {platform.node()}",
        devices_per_node=max(cores, 2),
        memory=DeviceMemory(
            said["passes"], memory_gb(), CONTEXT_GB, 0.0, 0.0, fastest, statistics.median(out_of_cache) / fastest
        ),
        compute=Compute(said["products"], **_peaks(products), num_units=cores),
        products=Products(said["products"], TILE_ROWS, TILE_COLUMNS, products, _far(alone["far_products"])),
        attention=Attention(said["attention"], [AttentionRate(**row) for row in alone["attention"]]),
        passes=Passes(said["passes"], alone["least_us"], [*passes, *usual(passes)], _far(alone["far_passes"])),
        host=Host(said["overheads"], 0.0, is_device=True),
        node=level,
        network=level,
        exchange=Exchange(level.source, 0, [ExchangeRate(2, level.gb_per_s, level.gb_per_s)]),
        contention=[Contention(each["num_ranks"], **each["contention"]) for each in groups],
    )
    pieces = [PieceTime(**piece) for piece in alone["code"]]
    calls = call_times(pieces, made.on(1))
    launch_us = statistics.median(row.call_us for row in calls)
    return replace(made, host=replace(made.host, launch_us=launch_us, step_us=step_us(pieces), calls=calls))


def _far(rows: Sequence[dict[str, Any]]) -> list[FarTime]:
    return [FarTime(**row) for row in rows]


def usual(passes: Sequence[PassRate]) -> list[PassRate]:
    """What stands for operations that were not measured: by type, size and threads the middle one of the usual."""
    kinds: defaultdict[tuple[str, int, int], list[PassRate]] = defaultdict(list)
    for name in USUAL:
        sizes: Counter[tuple[str, int]] = Counter()
        for row in (row for row in passes if row.name == name):  # in order of size, as measured
            kinds[row.dtype, row.num_threads, sizes[row.dtype, row.num_threads]].append(row)
            sizes[row.dtype, row.num_threads] += 1
    return [
        PassRate(
            "any",
            round(statistics.median(row.num_bytes for row in rows)),
            statistics.median(row.gb_per_s for row in rows),
            dtype,
            threads,
        )
        for (dtype, threads, _), rows in kinds.items()
    ]


def level_of(messages: Sequence[MessageTime], source: str) -> Level:
    """Messages between processes as a level of a network. With one rank measured alone there are none: memory's are
    not a network's, so the level is one that nothing crosses."""
    if not messages:
        return Level(f"{source}; none was measured", 1.0, 1.0, 1.0, 0.0)
    rates = [row.num_bytes / row.us / 1e3 for row in messages]
    best = max(rates)
    rings = [rate for row, rate in zip(messages, rates, strict=True) if row.name in ("reduce_scatter", "all_gather")]
    sends = [row for row in messages if row.name == "send"]
    latency = min(row.us for row in sends)
    small = [row for row in messages if row.name == "exchange" and row.num_bytes < 1024]
    by_peer = [max(row.us - latency, 0.0) / (row.num_ranks - 1) for row in small]
    exchanges = [rate for row, rate in zip(messages, rates, strict=True) if row.name == "exchange"]
    return Level(source, best, max(exchanges), max(rings), latency, statistics.median(by_peer), list(messages))


def _peaks(products: Sequence[ProductRate]) -> dict[str, float]:
    """By type the best rate seen; FP8 is computed in float32 here."""
    best = {name: max((row.tflops for row in products if row.dtype == name), default=0.0) for name in DTYPES}
    return {**best, "float8_e4m3fn": best["float32"]}


def text(cluster: Cluster) -> str:
    """The cluster as YAML that `cluster.load` reads."""
    return str(yaml.safe_dump(_rounded(asdict(cluster)), sort_keys=False))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def summary(cluster: Cluster, found: Sequence[dict[str, Any]]) -> str:
    """What was seen, and how sure it is, in a few lines."""
    peaks = ", ".join(f"{name} {getattr(cluster.compute, name):.3g}" for name in DTYPES[:3])
    spreads = {kind: share for each in found for kind, share in each["spreads"].items()}
    lines = [
        f"products, best of 1e12 operations/s: {peaks}",
        f"memory: {cluster.memory.peak_gb_per_s:.1f} GB/s in cache, {cluster.bytes_per_s / 1e9:.1f} out of it",
        f"an operation: at least {cluster.passes.least_us:.1f} us, and {cluster.host.launch_us:.1f} of our own code",
    ]
    if cluster.node.measured:
        lines.append(f"gloo: {cluster.node.latency_us:.0f} us a message, up to {cluster.node.peak_gb_per_s:.2f} GB/s")
    lines += [
        f"{each.num_ranks} ranks at once: products {each.product:.2f}x as long as alone, passes {each.passes:.2f}x, "
        f"calls {each.calls:.2f}x"
        for each in cluster.contention
    ]
    return "\n".join([*lines, "apart: " + ", ".join(f"{kind} {share:.0%}" for kind, share in spreads.items())])
