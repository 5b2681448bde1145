"""What ranks on different machines send each other, by their plan and by the counters of an emulated network."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import emulate
from launch.plan.breakdown import traffic
from launch.plan.job import Plan
from launch.plan.unmeasured import unmeasured
from tests.spawn import STOP_S
from train.compose import compose

RUN = [
    *("model=tiny", "model.num_hidden_layers=3", "zero.engine=native", "train.seq_len=128", "train.micro_batch_size=2"),
    *("train.global_batch_size=8", "parallel.nodes=2", "pipeline.schedule=1f1b", "track.wandb=disabled"),
]


@pytest.mark.parametrize(
    "places",
    [
        pytest.param(["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"], id="experts and gradients"),
        pytest.param(["parallel.pp=2", "parallel.dp=1"], id="a pipeline", marks=pytest.mark.slow),
    ],
)
def test_as_many_bytes_are_sent_as_are_planned(places: list[str]) -> None:
    """Over both nodes, which read the same tokens: what one of them sends more, because the other's experts are chosen
    more often, it gets less. Counters have the headers of packets too, a hundredth, and now and then a packet that was
    sent again: of the steps the least counts."""
    if reason := emulate.able():
        pytest.skip(f"this machine cannot emulate a cluster: {reason}")
    words = [*RUN, *places]
    with emulate.Lab(nodes=2, rate="1gbit") as lab:
        ranks = lab.run([sys.executable, "-m", "tests.emulated_steps", *words], timeout_s=STOP_S)
    assert ranks.ok, ranks.outputs
    sent = [json.loads(said.splitlines()[-1]) for said in ranks.outputs]
    plan = Plan(compose(words), unmeasured())
    planned = 2 * sum(level["sent_bytes_per_rank"] for level in traffic(plan, plan.step()))
    assert min(map(sum, zip(*sent, strict=True))) == pytest.approx(planned, rel=0.02)
