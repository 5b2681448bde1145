"""`python -m benchmarks.plan [runs=one;two, flat ...]`: steps as they were planned, beside steps as they went.

Each run is started as anybody starts one, on this machine, for ten steps; of the steps after the first three, in
which kernels are made and memory is found, the median counts. The plan is `launch plan cluster=here`, which times the
run's own layers for some seconds just before; nothing of it is fitted to a run. Memory is what the tensors of a rank
take at their fullest (`_allocated.py`), of the rank of which the plan is farthest off.

With `network=200mbit` every rank is a machine of its own on an emulated network (`emulate.py`): its layers are timed
there, and messages between stages are priced by the network's rate.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from benchmarks._allocated import measured_bytes
from benchmarks.emulate import Lab, able, bits_per_s
from benchmarks.start import write_text
from launch.plan import cluster
from launch.plan.cluster import Cluster
from launch.plan.figures import Level
from launch.plan.here import OWN_LAYERS
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.own_layers import Timed
from launch.plan.timed import PLAN_S, timed, timed_of
from train import compose
from train.config import RunConfig
from train.settings import read
from train.track.metrics_file import read_metrics

FIRST, NUM_STEPS = 3, 10
COMMON = [
    "experiment=first_run",
    f"train.max_steps={NUM_STEPS}",
    "evaluate.interval=1000",
    "evaluate.num_sequences=1",
    "track.wandb=disabled",
    "track.plan=false",
    "run.device=cpu",
]
ONE = ["parallel.pp=1", "parallel.dp=1", "parallel.ep=1", "pipeline.schedule=1f1b"]
TWO = ["parallel.pp=1", "parallel.dp=2", "parallel.ep=2", "pipeline.schedule=1f1b"]
WIDE = ["model.hidden_size=512", "model.intermediate_size=1280", "model.moe_intermediate_size=256"]
RUNS = {
    "one": ONE,
    "one, a thread": [*ONE, "run.num_threads=1"],
    "one, bf16": [*ONE, "precision=bf16"],
    "one, fp8": [*ONE, "precision=fp8"],
    "one, fp64": [*ONE, "precision=fp64"],
    "one, wide": [*ONE, *WIDE],
    "one, wide, bf16": [*ONE, *WIDE, "precision=bf16"],
    "one, long rows": [*ONE, "train.seq_len=1024", "train.global_batch_size=4", "train.micro_batch_size=1"],
    "one, recompute": [*ONE, *WIDE, "recompute.nodes=[attention,experts,dense]"],
    "two, flat": TWO,
    "two, wide": [*TWO, *WIDE],
    "two, two hops": [*TWO, "parallel.nodes=2", "parallel.dispatch=two_hop"],
    "two, a pipeline": ["parallel.pp=2", "parallel.dp=1", "parallel.ep=1", "pipeline.schedule=1f1b"],
    "four, dualpipe": ["parallel=four"],
}
# What a message takes to another machine besides its bytes: a rate is emulated, a latency is not.
NETWORK_LATENCY_US = 100.0
# Of a link's rate, what is left for payload by the headers of its packets.
PAYLOAD_SHARE = 0.98


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        runs: some of the runs, by name, with `;` between them; `all`: on an emulated network, those of several ranks.
        network: the rate of an emulated link, as `200mbit`; None: all ranks are on this machine.
        time: plan and measure steps.
        memory: plan and measure what ranks hold.
    """

    runs: str = "all"
    network: str | None = None
    time: bool = True
    memory: bool = True

    def names(self) -> list[str]:
        """ValueError for a run that is not known."""
        every = [name for name in RUNS if self.network is None or not name.startswith("one")]
        names = every if self.runs == "all" else [name.strip() for name in self.runs.split(";")]
        for name in names:
            if name not in every:
                raise ValueError(f"runs={name} is not one of {'; '.join(every)}")
        return names

    def check(self) -> None:
        """As `names`; ValueError for a rate that is none, or a network that cannot be."""
        self.names()
        if self.network is not None:
            bits_per_s(self.network)
            if reason := able():
                raise ValueError(f"network={self.network}: this machine cannot emulate a cluster: {reason}")


class Place(Protocol):
    """Where a run's ranks are."""

    def words(self, words: list[str]) -> list[str]:
        """The settings of a run there."""

    def timed(self, config: RunConfig) -> Timed:
        """The run's own layers there."""

    def train(self, words: list[str], config: RunConfig) -> None:
        """The run itself."""


class Here:
    """All on this machine."""

    def words(self, words: list[str]) -> list[str]:
        return words

    def timed(self, config: RunConfig) -> Timed:
        return timed(config)

    def train(self, words: list[str], config: RunConfig) -> None:
        subprocess.run([sys.executable, "-m", "launch", "local", *words], check=True, stdout=subprocess.DEVNULL)


class Emulated:
    """Each rank on a machine of its own, in a folder that all of them see."""

    def __init__(self, rate: str, folder: Path) -> None:
        self._rate, self._folder = rate, folder

    def words(self, words: list[str]) -> list[str]:
        return [*words, f"parallel.nodes={compose.compose(words).parallel.world_size}"]

    def timed(self, config: RunConfig) -> Timed:
        given, out = self._folder / "run.yaml", self._folder / "times.json"
        given.write_text(compose.text(config))
        program = f"import {OWN_LAYERS} as m; m.program([{str(given)!r}, '{PLAN_S}', {str(out)!r}])"
        self._run(["-c", program], config)
        return timed_of(json.loads(out.read_text()))

    def train(self, words: list[str], config: RunConfig) -> None:
        self._run(["-m", "train", *words], config)

    def _run(self, command: list[str], config: RunConfig) -> None:
        with Lab(config.parallel.world_size, self._rate) as lab:
            result = lab.run([sys.executable, *command])
        if not result.ok:
            raise RuntimeError("\n".join(result.outputs))


def emulated(figures: Cluster, rate: str) -> Cluster:
    """This machine's figures with a network of that rate between its ranks, of which each is a machine."""
    gb_per_s = PAYLOAD_SHARE * bits_per_s(rate) / 8e9
    network = Level(f"an emulated link of {rate}", gb_per_s, gb_per_s, gb_per_s, NETWORK_LATENCY_US)
    return replace(figures, network=network, node=network)


def measured_s(folder: Path) -> float:
    """The median step of a run."""
    rows = read_metrics(folder / "metrics.jsonl")
    return statistics.median(row["perf/step_s"] for row in rows[FIRST:])


def farthest(plan: Plan, words: list[str]) -> tuple[int, int]:
    """(planned, held) bytes of the rank of which the plan is farthest off, the reserve left out."""
    mesh = plan.config.parallel
    held = measured_bytes(words, mesh.world_size)
    planned = [plan.ranks[rank // mesh.dp] for rank in range(mesh.world_size)]
    pairs = [(each.total - each.reserve, found) for each, found in zip(planned, held, strict=True)]
    return max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))


@dataclass
class Compared:
    """Figures of all runs, planned and as they were, by what they are of."""

    off: dict[str, list[float]]

    def cells(self, what: str, planned: float, was: float, form: str) -> str:
        """A run's figures as text, which are counted."""
        self.off.setdefault(what, []).append(planned / was - 1)
        return f"{planned:>12{form}}{was:>12{form}}{planned / was - 1:>+10.1%}"

    def summary(self) -> Iterator[str]:
        """How far the plans of all runs were off, a line for each kind of figure."""
        for what, found in self.off.items():
            yield f"{what}: median {statistics.median(map(abs, found)):.1%}, largest {max(map(abs, found)):.1%}"


@contextmanager
def place_of(given: Settings, folder: Path) -> Iterator[tuple[Place, Cluster]]:
    """Where runs are, and its figures."""
    figures = cluster.load("here")
    if given.network is None:
        yield Here(), figures
    else:
        yield Emulated(given.network, folder), emulated(figures, given.network)


def main(words: list[str]) -> int:
    given = read(Settings, words, "benchmarks.plan")
    compared = Compared({})
    units = ["s"] * given.time + ["MB"] * given.memory
    print(f"{'run':<20}" + "".join(f"{f'planned, {unit}':>12}{f'was, {unit}':>12}{'off by':>10}" for unit in units))
    with tempfile.TemporaryDirectory() as name, place_of(given, Path(name)) as (place, figures):
        folder = Path(name)
        data = write_text(folder)
        for number, run in enumerate(given.names()):
            settings = place.words([*COMMON, *data, *RUNS[run]])
            config = compose.compose(settings)
            line = f"{run:<20}"
            if given.time:
                plan = Plan(config, figures, timed=place.timed(config))
                out = folder / f"run-{number}"
                place.train([*settings, f"run.dir={out}"], config)
                line += compared.cells("time", plan.step(AS_WRITTEN).step_s, measured_s(out), ".3f")
            if given.memory:
                planned, held = farthest(Plan(config, figures), settings)
                line += compared.cells("memory", planned / 1e6, held / 1e6, ".1f")
            print(line, flush=True)
    print("\n".join(compared.summary()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
