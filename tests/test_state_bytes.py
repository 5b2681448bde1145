"""What the sharded optimizer weighs on each rank of a real configuration, against the formula."""

from __future__ import annotations

import pytest

from parallel import process
from parallel.expert.build import build as build_dispatch
from parallel.zero.optimizer import build
from parallel.zero.sets import ReplicaGroups
from tests.spawn import Ranks
from train.assemble import build_stages
from train.compose import compose
from train.flops import parameter_counts
from train.job import held
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine
from train.recipe.optimizer import rules

DP, EP = 4, 2


def weigh(settings: list[str]) -> int:
    """On each rank: bytes of masters and moments of the composed run."""
    config = compose(settings)
    groups = process.start(config.parallel)
    dispatch = build_dispatch(config.model.n_routed_experts, groups)
    models = [stage.model for stage in build_stages(config, dispatch, groups, everywhere(TorchEngine())).values()]
    rule = rules(config.optimizer)
    params = [(info, param, *rule(info.name, info.global_shape)) for info, param in held(models)]
    replicas = ReplicaGroups(groups.dense, groups.expert, groups.embedding, groups.world)
    optimizer = build(config.zero.engine, params, replicas)
    process.stop(groups)
    return optimizer.state_bytes()


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
@pytest.mark.parametrize(("precision", "moments", "bytes_each"), [("fp32", "fp32", 12), ("bf16", "bf16", 8)])
def test_small_config(ranks: Ranks, engine: str, precision: str, moments: str, bytes_each: int) -> None:
    """fp32 master (4 bytes) and two moments (4 or 2 bytes each) of every parameter, spread evenly over dp ranks.

    Experts are spread too: ep ways by their placement, then dp / ep ways by their replicas. The tolerance is for
    padding at the shards' borders and for parameters that cannot be split evenly.
    """
    settings = [
        "model=small",
        f"parallel.dp={DP}",
        f"parallel.ep={EP}",
        "parallel.dispatch=flat",
        f"precision={precision}",
        f"optimizer.moments_dtype={moments}",
        f"zero.engine={engine}",
    ]
    counts = parameter_counts(compose(settings).model)
    formula = bytes_each * (counts.total + counts.mtp) / DP
    for state_bytes in ranks.run(weigh, settings, world_size=DP):
        assert state_bytes == pytest.approx(formula, rel=0.02)
