"""A cluster's figures, each group with its source: `configs/cluster/NAME.yaml`, a file of one's own, or what
`calibrate` measured here."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.plan.figures import (
    DTYPES,
    Attention,
    Compute,
    Contention,
    DeviceMemory,
    Exchange,
    Host,
    Level,
    Passes,
    Products,
    interpolated,
)
from train.own_files import own_file
from train.settings import CONFIGS, hint, read_file

CLUSTERS = CONFIGS / "cluster"
RESULTS = ("float64", "float32", "bfloat16")
# Fields that may be 0. All other numbers are above it.
MAY_BE_ZERO = {"latency_us", "num_units_taken", "communicator_gb", "context_gb", "fragmentation_share", "num_threads"}
MAY_BE_ZERO |= {"launch_us", "per_rank_us", "num_bytes", "step_us", "call_us", "ns_per_byte"}
# A rate that was measured may lie this much above the peak of a data sheet: clocks boost.
ABOVE_PEAK = 1.02


@dataclass(frozen=True)
class Cluster:
    """`cluster`: devices, the machines they are in, and the network between those.

    Attributes:
        title: what it is, in a line.
        devices_per_node: that the inner level of the network joins.
        contention: of ranks that share a processor; empty where each has a device of its own.
    """

    title: str
    devices_per_node: int
    memory: DeviceMemory
    compute: Compute
    products: Products
    attention: Attention
    passes: Passes
    host: Host
    node: Level
    network: Level
    exchange: Exchange
    contention: list[Contention] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth that a large pass over memory reaches."""
        return self.memory.peak_gb_per_s * self.memory.reached_share * 1e9

    def check(self) -> None:
        """ValueError for a figure that cannot be, by its key."""
        for key, value in _numbers(self, "cluster"):
            _check_number(key, value)
        for key, text in _texts(self, "cluster"):
            if not text.strip():
                raise ValueError(f"{key} is empty: {_what_is_empty(key)}")
        _check_choices(self)
        _check_rates(self)
        reserve = self.memory.context_gb + self.memory.communicator_gb
        if reserve >= self.memory.device_gb:
            raise ValueError(
                f"cluster.memory.device_gb={self.memory.device_gb} must be above the reserve of "
                f"{reserve:g} (context_gb and one communicator_gb)"
            )
        if self.host.is_device and not (self.host.calls and self.passes.far and self.products.far):
            raise ValueError(
                "cluster.host.calls, cluster.passes.far or cluster.products.far is empty: this machine was measured by "
                "an older version, and python -m launch plan calibrate measures it again"
            )
        for name in ("products", "attention", "exchange"):
            if not getattr(self, name).measured:
                raise ValueError(f"cluster.{name}.measured is empty: a rate is needed to predict others from")

    def slowdown(self, num_ranks: float) -> dict[str, float]:
        """Kind of work -> how much longer it takes when so many ranks work at once, in the mean where some wait:
        between what was measured, and beyond it as many times longer as there are more. Nothing where each rank has a
        device of its own, or is alone."""
        if not self.contention or num_ranks <= 1:
            return {}
        rows = [Contention(1, 1.0, 1.0, 1.0), *sorted(self.contention, key=lambda row: row.num_ranks)]
        beyond = max(1.0, num_ranks / rows[-1].num_ranks)

        def longer(work: str) -> float:
            return beyond * interpolated([(row.num_ranks, getattr(row, work)) for row in rows], num_ranks)

        product = longer("product")
        return {"product": product, "attention": product, "move": longer("passes"), "calls": longer("calls")}

    def on(self, num_threads: int) -> Cluster:
        """The cluster as a program with so many threads meets it: of its figures by threads, those measured with the
        nearest number. The same object where nothing was measured by threads."""

        def nearest(rows: list[Any]) -> list[Any]:
            counts = {row.num_threads for row in rows}
            if not counts:
                return rows
            best = min(counts, key=lambda count: abs(math.log(max(count, 1) / num_threads)))
            return [row for row in rows if row.num_threads == best]

        parts = {name: getattr(self, name) for name in ("products", "attention", "passes")}
        changed = {name: dataclasses.replace(part, measured=nearest(part.measured)) for name, part in parts.items()}
        for name in ("products", "passes"):
            changed[name] = dataclasses.replace(changed[name], far=nearest(changed[name].far))
        if changed == parts:
            return self
        compute = dataclasses.replace(self.compute, num_units=min(num_threads, self.compute.num_units))
        return dataclasses.replace(self, compute=compute, **changed)


def here_path() -> Path:
    """Where `calibrate` writes what it measured unless it is told, and where `cluster=here` looks: a machine's figures
    belong to the machine, not to a run or a checkout."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "halocline" / "cluster-here.yaml"


def known() -> list[str]:
    """Names that `cluster=` takes."""
    return [*sorted(path.stem for path in CLUSTERS.glob("*.yaml")), "here"]


def load(name: str) -> Cluster:
    """The checked cluster of a name, or of a YAML file's path.

    ValueError, by the figure's key, for an unknown name, a missing file, a missing, unknown or impossible figure.
    """
    path = _path(name)
    try:
        cluster = read_file(Cluster, path, "cluster")
        cluster.check()
    except ValueError as error:
        if path != here_path():
            raise
        again = "python -m launch plan calibrate measures this machine again"
        raise ValueError(f"{path} is not of this version, and {again}: {error}") from None
    return cluster


def _path(name: str) -> Path:
    if own := own_file(f"cluster={name}", ("cluster",)):
        return own[1]
    if name == "here":
        if not here_path().is_file():
            raise ValueError(
                f"cluster=here has not been measured: python -m launch plan calibrate does so, into {here_path()}"
            )
        return here_path()
    if name not in known():
        raise ValueError(f"cluster={name} is not known{hint(name, known())}")
    return CLUSTERS / f"{name}.yaml"


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from _leaves(getattr(value, each.name), f"{key}.{each.name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}[{number}]")
    else:
        yield key, value


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    return ((at, leaf) for at, leaf in _leaves(value, key) if isinstance(leaf, int | float))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    return ((at, leaf) for at, leaf in _leaves(value, key) if isinstance(leaf, str))


def _what_is_empty(key: str) -> str:
    return "every group of figures says where it is from" if key.endswith(".source") else "it needs a word"


def _check_number(key: str, value: float) -> None:
    name = key.rpartition(".")[2]
    if not math.isfinite(value):
        raise ValueError(f"{key}={value} must be a finite number")
    if value < 0 or (value == 0 and name not in MAY_BE_ZERO and not isinstance(value, bool)):
        raise ValueError(f"{key}={value} must be {'at least' if name in MAY_BE_ZERO else 'above'} 0")
    if name.endswith("_share") and value > 1:
        raise ValueError(f"{key}={value} must be at most 1: it is a part of the whole")


def _check_choices(cluster: Cluster) -> None:
    for number, row in enumerate([*cluster.products.measured]):
        key = f"cluster.products.measured[{number}]"
        if row.dtype not in DTYPES:
            raise ValueError(f"{key}.dtype={row.dtype} is not one of {', '.join(DTYPES)}")
        if row.result not in RESULTS:
            raise ValueError(f"{key}.result={row.result} is not one of {', '.join(RESULTS)}")
        if row.m < row.groups:
            raise ValueError(f"{key}.groups={row.groups} must be at most its rows, m={row.m}")
    for number, rate in enumerate(cluster.attention.measured):
        if rate.dtype not in DTYPES:
            raise ValueError(
                f"cluster.attention.measured[{number}].dtype={rate.dtype} is not one of {', '.join(DTYPES)}"
            )


def _check_rates(cluster: Cluster) -> None:
    """ValueError for a rate above what it is a part of."""
    rates = [
        *((f"products.measured[{i}].tflops", row.dtype, row.tflops) for i, row in enumerate(cluster.products.measured)),
        *(
            (f"attention.measured[{i}].{name}", row.dtype, getattr(row, name))
            for i, row in enumerate(cluster.attention.measured)
            for name in ("forward_tflops", "backward_tflops")
        ),
    ]
    for key, dtype, value in rates:
        peak = cluster.compute.peak(dtype) / 1e12
        if value > peak * ABOVE_PEAK:
            raise ValueError(f"cluster.{key}={value} is above the peak, cluster.compute.{dtype}={peak:g}")
    for name in ("node", "network"):
        level = getattr(cluster, name)
        for rate in ("gb_per_s", "collective_gb_per_s"):
            if getattr(level, rate) > level.peak_gb_per_s:
                raise ValueError(
                    f"cluster.{name}.{rate}={getattr(level, rate)} is above "
                    f"cluster.{name}.peak_gb_per_s={level.peak_gb_per_s:g}"
                )
    if cluster.exchange.num_units_taken >= cluster.compute.num_units and not cluster.host.is_device:
        raise ValueError(
            f"cluster.exchange.num_units_taken={cluster.exchange.num_units_taken} leaves none of "
            f"cluster.compute.num_units={cluster.compute.num_units} to compute"
        )
