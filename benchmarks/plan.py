"""`python -m benchmarks.plan [cluster=here runs=one,wide,...]`: steps as they were planned, beside steps as they went.

Each run is started as anybody starts one, on this machine, for a dozen steps; of the steps after the first three, in
which kernels are made and memory is found, the median counts. The plan is `launch plan cluster=here`, whose figures
`python -m launch plan calibrate` has measured; nothing of it is fitted to a run. Memory is what the tensors of a rank
take at their fullest (`_allocated.py`), of the rank of which the plan is farthest off.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks._allocated import measured_bytes
from benchmarks.start import write_text
from launch.plan import cluster
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from train import compose
from train.settings import read
from train.track.metrics_file import read_metrics

FIRST, NUM_STEPS = 3, 12
COMMON = [
    "experiment=first_run",
    f"train.max_steps={NUM_STEPS}",
    "evaluate.interval=1000",
    "evaluate.num_sequences=1",
    "track.wandb=disabled",
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


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        cluster: whose figures are planned with.
        runs: some of the runs, by name, with `;` between them; `all`.
    """

    cluster: str = "here"
    runs: str = "all"

    def names(self) -> list[str]:
        """ValueError for a run that is not known."""
        names = list(RUNS) if self.runs == "all" else [name.strip() for name in self.runs.split(";")]
        for name in names:
            if name not in RUNS:
                raise ValueError(f"runs={name} is not one of {'; '.join(RUNS)}")
        return names

    def check(self) -> None:
        """As `names`."""
        self.names()


def measured_s(words: list[str], folder: Path) -> float:
    """The median step of a run."""
    command = [sys.executable, "-m", "launch", "local", *words, f"run.dir={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(folder / "metrics.jsonl")
    return statistics.median(row["perf/step_s"] for row in rows[FIRST:])


def farthest(plan: Plan, words: list[str]) -> tuple[int, int]:
    """(planned, held) bytes of the rank of which the plan is farthest off, the reserve left out."""
    mesh = plan.config.parallel
    held = measured_bytes(words, mesh.world_size)
    planned = [plan.ranks[rank // mesh.dp] for rank in range(mesh.world_size)]
    pairs = [(each.total - each.reserve, found) for each, found in zip(planned, held, strict=True)]
    return max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))


def main(words: list[str]) -> int:
    given = read(Settings, words, "benchmarks.plan")
    figures = cluster.load(given.cluster)
    print(
        f"{'run':<20}{'planned, s':>12}{'went, s':>12}{'off by':>10}{'planned, MB':>14}{'held, MB':>10}{'off by':>10}"
    )
    off, off_bytes = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = write_text(Path(folder))
        for number, name in enumerate(given.names()):
            settings = [*COMMON, *data, *RUNS[name]]
            plan = Plan(compose.compose(settings), figures)
            planned_s = plan.step(AS_WRITTEN).step_s
            went_s = measured_s(settings, Path(folder) / f"run-{number}")
            off.append(planned_s / went_s - 1)
            planned, held = farthest(plan, settings)
            off_bytes.append(planned / held - 1)
            print(
                f"{name:<20}{planned_s:>12.3f}{went_s:>12.3f}{off[-1]:>+10.1%}"
                f"{planned / 1e6:>14.1f}{held / 1e6:>10.1f}{off_bytes[-1]:>+10.1%}",
                flush=True,
            )
    for what, found in (("time", off), ("memory", off_bytes)):
        print(f"{what}: median {statistics.median(map(abs, found)):.1%}, largest {max(map(abs, found)):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
