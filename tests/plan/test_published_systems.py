"""Steps that others have published, on other machines than those that calibrate anything here."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from launch.plan import cluster
from launch.plan.job import Plan
from launch.plan.kernels import PUBLISHED
from train.compose import compose

slow = pytest.mark.slow
# The published recipe at one batch size.
V3 = [
    *("experiment=v3_h800_2048", "train.batch_ramp.start=null", "train.batch_ramp.tokens=0"),
    *("train.max_tokens=null", "train.max_steps=1000", "recompute.experts_up_proj=false"),
]


@dataclass(frozen=True)
class System:
    """DeepSeek-V3 as NVIDIA's Megatron Bridge trains it (its performance summary, container 25.11), routers balanced.

    Attributes:
        tokens_per_s: per device, as published.
        has_mtp: whether the published FLOPs per token have a prediction depth in them: 260.4 G with, 249.7 G without.
        rel: how far off the plan may be.
    """

    cluster: str
    precision: str
    tokens_per_s: float
    batch: int
    pp: int
    stages_per_rank: int
    ep: int
    has_mtp: bool = False
    rel: float = 0.15

    def plan(self) -> Plan:
        """On 256 devices. What they recompute is the projections of all heads; norms take next to nothing."""
        figures = cluster.load(self.cluster)
        several = [f"pipeline.stages_per_rank={self.stages_per_rank}"] if self.stages_per_rank > 1 else []
        settings = [
            *V3,
            *several,
            f"precision={self.precision}",
            f"train.global_batch_size={self.batch}",
            f"parallel.pp={self.pp}",
            f"parallel.dp={256 // self.pp}",
            f"parallel.ep={self.ep}",
            f"parallel.nodes={256 // min(figures.devices_per_node, 64)}",
            f"pipeline.schedule={'interleaved_1f1b' if several else '1f1b'}",
            f"model.num_nextn_predict_layers={int(self.has_mtp)}",
        ]
        return Plan(compose(settings), figures)


SYSTEMS = {
    "gb300, bf16": System("gb300", "bf16", 3848, 4096, 2, 4, 32),
    "gb300, fp8": System("gb300", "fp8", 4357, 4096, 2, 4, 32),
    # A fifth too quick: their BF16 loses more from GB300 to GB200 than the devices differ by.
    "gb200, bf16": System("gb200", "bf16", 3139, 4096, 4, 4, 64, rel=0.2),
    "gb200, fp8": System("gb200", "fp8", 4018, 4096, 8, 4, 32),
    "b200, fp8": System("b200", "fp8", 2139, 2048, 16, 1, 8, has_mtp=True),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "gb300, bf16" else slow) for name in SYSTEMS])
def test_the_published_set_of_kernels_predicts_others(name: str) -> None:
    system = SYSTEMS[name]
    assert system.plan().tokens_per_s_per_gpu(PUBLISHED) == pytest.approx(system.tokens_per_s, rel=system.rel)


@slow
def test_their_order_is_right() -> None:
    found = {name: system.plan().tokens_per_s_per_gpu(PUBLISHED) for name, system in SYSTEMS.items()}
    assert sorted(found, key=found.__getitem__) == sorted(SYSTEMS, key=lambda name: SYSTEMS[name].tokens_per_s)
