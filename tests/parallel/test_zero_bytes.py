"""What the sharded state weighs on each rank, on about ten million parameters of odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.shards import ParamInfo, stacked_experts
from parallel.zero.optimizer import build
from tests.parallel.zero_world import make_groups
from tests.spawn import Ranks
from train.recipe.adamw import AdamW
from train.recipe.optimizer import OptimizerConfig

NUM_EXPERTS = 8
DENSE = [(5003, 257), *[(257, 771), (257,), (83, 257), (83,), (1021, 83)] * 6]
EXPERTS = [(NUM_EXPERTS, 2 * 131, 257), (NUM_EXPERTS, 257, 131)] * 8


def weigh(dp: int, ep: int, engine: str, dtype: torch.dtype, moments_dtype: str) -> tuple[int, float]:
    """On each rank: bytes of state, and elements of state by counting (held, divided by replicas)."""
    num_local = NUM_EXPERTS // ep
    params, inner = [], AdamW(OptimizerConfig(moments_dtype=moments_dtype))
    for i, shape in enumerate(DENSE):
        param = nn.Parameter(torch.zeros(shape, dtype=dtype))
        params.append((ParamInfo(f"dense.{i}", shape), param, inner, 0.1 if len(shape) > 1 else 0.0))
    for i, (_, *shape) in enumerate(EXPERTS):
        local = (num_local, *shape)
        info = stacked_experts(f"experts.{i}", local, NUM_EXPERTS, dist.get_rank() % ep * num_local)
        params.append((info, nn.Parameter(torch.zeros(local, dtype=dtype)), inner, 0.1))
    optimizer = build(engine, params, make_groups(dp, ep))
    held = sum(param.numel() / (dp // ep if info.replicas == "expert" else dp) for info, param, _, _ in params)
    return optimizer.state_bytes(), held


@pytest.mark.parametrize(
    ("engine", "dtype", "moments_dtype", "bytes_each"),
    [
        ("native", torch.float32, "fp32", 12),
        ("native", torch.bfloat16, "bf16", 8),
        ("native", torch.float64, "fp32", 24),
        ("deepspeed", torch.bfloat16, "fp32", 12),
        ("deepspeed", torch.float32, "bf16", 8),
    ],
)
def test_state_bytes_follow_the_formula(
    ranks: Ranks, engine: str, dtype: torch.dtype, moments_dtype: str, bytes_each: int
) -> None:
    total = 0.0
    for state_bytes, held in ranks.run(weigh, 4, 2, engine, dtype, moments_dtype, world_size=4):
        assert state_bytes == pytest.approx(bytes_each * held, rel=0.02)
        total += held
    assert total == pytest.approx(sum(math.prod(shape) for shape in (*DENSE, *EXPERTS)))
    assert 9e6 < total < 12e6
