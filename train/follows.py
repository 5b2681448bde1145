"""What follows from other keys unless it is said: values that configs/run.yaml has as `${follows.NAME:...}`.

A key is here when the others leave it one legal value, or one that makes sense. The resolved config has the value.
"""

from __future__ import annotations

import os

from omegaconf import OmegaConf

from train import environment
from train.recipe.config import MoeConfig


def dp(pp: int, ep: int) -> int:
    """`parallel.dp`: what the launcher's processes leave to each stage, or without a launcher as few as `ep` needs."""
    world_size = environment.number(os.environ, "WORLD_SIZE")
    return ep if world_size is None else max(1, world_size // max(1, pp))


def nodes() -> int:
    """`parallel.nodes`: the machines that a launcher started processes on; 1 without a launcher."""
    world_size = environment.number(os.environ, "WORLD_SIZE") or 1
    per_node = environment.number(os.environ, "LOCAL_WORLD_SIZE") or world_size
    return world_size // per_node if world_size % per_node == 0 else 1


def stages_per_rank(schedule: str) -> int | None:
    """`pipeline.stages_per_rank`: 2 where a schedule leaves the choice, which the others do not."""
    return 2 if schedule == "interleaved_1f1b" else None


def zero_engine(precision: str) -> str:
    """`zero.engine`: DeepSpeed's keeps fp32 masters, so a run in fp64 needs the native one."""
    return "native" if precision == "fp64" else "deepspeed"


def bias_update_rate(topk_method: str) -> float:
    """`moe.bias_update_rate`: 0 where no router has a bias."""
    return MoeConfig.bias_update_rate if topk_method == "noaux_tc" else 0.0


def register() -> None:
    """Make the functions known to OmegaConf, by their names."""
    for function in (dp, nodes, stages_per_rank, zero_engine, bias_update_rate):
        OmegaConf.register_new_resolver(f"follows.{function.__name__}", function, replace=True)
