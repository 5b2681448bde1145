"""The published job without its cluster: ranks of 2048 assemble with fake tensors and trace a step of 671 B parameters.

A fake tensor has a shape and no values, so whatever would make the host wait for the device (a number read, a size that
depends on values) raises: a step that runs to its end waits nowhere but in `Host`, which counts. The process groups are
fake too: all 2048 ranks are there, and every message arrives. What is chosen for a GPU when a job is built is chosen
here: NCCL's branch of the collectives, grouped products, the optimizer's large chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from launch.plan.routing import Routing
from launch.plan.world import placement_of, world
from parallel.pipeline.order import messages
from parallel.pipeline.schedule import Schedule
from train import loop
from train.compose import compose
from train.config import RunConfig
from train.job import Job, held
from train.track.gauges import StepTimer
from train.track.metrics import METRICS

SETTINGS = ["experiment=v3_h800_2048"]
WORLD_SIZE, DP, EP, NODES_PER_EP_GROUP, LOCAL_EXPERTS = 2048, 128, 64, 8, 4
# Ranks of the first, a middle and the last pipeline rank, in different columns.
RANKS = {"first": 0, "middle": 7 * DP + 5, "last": 15 * DP + 127}
MAIN_PARAMETERS, MTP_PARAMETERS = 671_026_404_352, 11_610_067_968


class Copies(TorchFunctionMode):
    """Notes what names a device: a copy to or from one that is not made by `Host` would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moved = func in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.numpy)
        moved |= func is torch.Tensor.to and any(
            isinstance(arg, str | torch.device) for arg in (*args[1:], kwargs.get("device"))
        )
        moved |= func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if moved:
            self.found.append(str(func))
        return func(*args, **kwargs)


@contextmanager
def fake_job(rank: int) -> Iterator[Job]:
    """The job of one of 2048 ranks, inside a fake world."""
    with world(compose(SETTINGS), rank) as job:
        yield job


# --- closed forms, from the sizes in the report ---


def dense_parameters(config: RunConfig, layer: int) -> int:
    """Parameters of one layer: all but routed experts."""
    model, d = config.model, config.model.hidden_size
    heads, rope = model.num_attention_heads, model.qk_rope_head_dim
    assert model.q_lora_rank is not None
    queries = d * model.q_lora_rank + model.q_lora_rank + model.q_lora_rank * heads * (model.qk_nope_head_dim + rope)
    latent = d * (model.kv_lora_rank + rope) + model.kv_lora_rank
    values = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention = queries + latent + values + heads * model.v_head_dim * d
    if layer < model.first_k_dense_replace:
        return attention + 2 * d + 3 * d * model.intermediate_size
    return attention + 2 * d + 3 * d * model.moe_intermediate_size + model.n_routed_experts * d


def expected_parameters(job: Job) -> tuple[int, int]:
    """(dense, routed experts) of a rank, from the layers that it says it holds."""
    config, d = job.config, job.config.model.hidden_size
    expert = 3 * d * config.model.moe_intermediate_size
    dense = experts = 0
    for part in (model.parts for model in job.models):
        depths = [config.model.num_hidden_layers] if part.mtp else []
        dense += sum(dense_parameters(config, layer) for layer in [*part.layers, *depths])
        experts += LOCAL_EXPERTS * expert * moe_layers(job, part)
        dense += part.embedding * config.model.vocab_size * d + part.head * (config.model.vocab_size + 1) * d
        dense += part.mtp * (2 * d * d + 3 * d)  # the projection, the norms before it and the one before the head
    return dense, experts


def moe_layers(job: Job, part: Any) -> int:
    return sum(layer >= job.config.model.first_k_dense_replace for layer in part.layers) + part.mtp


def moe_forwards(job: Job, schedule: Schedule) -> int:
    """MoE layers through which a rank's forward chunks of a step go."""
    rank = job.groups.mesh.pp_rank
    forwards = [part for action in schedule.ranks[rank] for part in action.parts]
    return sum(moe_layers(job, job.stages[part.stage].model.parts) for part in forwards if part.kind == "F")


def internode_bytes(job: Job, num_forwards: int) -> int:
    """Each token's copies to 7 of 8 nodes, as often as it visits one: out and home, forward and backward."""
    placement = placement_of(job.config, job.groups.mesh)
    visits = Routing.balanced(job.config.model, placement, 4096).copies(0, 32)
    copies = (NODES_PER_EP_GROUP - 1) * visits
    # Out to the experts, and back to them with gradients, rows travel in FP8 with a scale's exponent for each tile.
    width, weight, expert_id = job.config.model.hidden_size, 4, 2
    there, home = width + width // 128, 2 * width
    routes = job.config.model.num_experts_per_tok * (2 * weight + expert_id)  # the weights' gradients come back
    return num_forwards * copies * (2 * there + 2 * home + routes)


# --- one step ---


def trace(job: Job, num_micro_batches: int) -> None:
    """Everything that `loop.run` does in a step, held against the closed forms."""
    plan = job.recipe.at(first_step_of(job, num_micro_batches))
    schedule = job.config.schedule(plan.num_sequences // DP)
    exchanged: Counter[tuple[str, int]] = Counter()
    batch = dist.batch_isend_irecv

    def note(operations: list[dist.P2POp]) -> Any:
        for each in operations:
            assert each.tensor.shape == (1, 4096, 7168) and each.tensor.dtype == torch.bfloat16
            exchanged["sent" if each.op is dist.isend else "received", each.group_peer] += 1
        return batch(operations)

    with Copies() as copies:
        with mock.patch.object(dist, "batch_isend_irecv", note):
            tally = loop.accumulate(job, plan, loop.loss_terms(job, plan), StepTimer())
        forwards = moe_forwards(job, schedule)
        assert job.dispatch.internode_bytes == internode_bytes(job, forwards)
        assert job.update(plan.lr).finite
        totals = loop.reduce(job, plan, tally, asked_to_stop=False)
        assert {metric.name for metric in METRICS if metric.is_loss} <= totals.values.keys()
        assert totals.loads == [[1] * 256] * 59
        for model in job.models:
            loop.update_bias(model, tally.load, plan.bias_update_rate)
    assert copies.found == []
    pp_rank = job.groups.mesh.pp_rank
    expected: Counter[tuple[str, int]] = Counter()
    for channel, carried in messages(schedule).items():
        if channel.source == pp_rank:
            expected["sent", channel.target] += len(carried)
        if channel.target == pp_rank:
            expected["received", channel.source] += len(carried)
    assert exchanged == expected
    reads = {"hop counts": forwards, "gradient norm": 1, "step": 1}
    assert job.host.num_reads == {name: count for name, count in reads.items() if count}


def check_sizes(job: Job) -> None:
    """Parameters, and bytes of weights, gradients and sharded state."""
    dense, experts = expected_parameters(job)
    params = held(job.models)
    assert sum(param.numel() for info, param in params if info.replicas != "expert") == dense
    assert sum(param.numel() for info, param in params if info.replicas == "expert") == experts
    assert {param.dtype for _, param in params} == {torch.bfloat16}
    assert {param.main_grad.dtype for _, param in params} == {torch.float32}
    # fp32 masters and two bf16 moments, over 2 x 128 replicas of what is dense and 2 x 128 / 64 of an expert.
    exact = 8 * (dense / 256 + experts / 4)
    assert exact <= job.optimizer.state_bytes() < exact * 1.0001


def first_step_of(job: Job, num_micro_batches: int) -> int:
    """The first step of the ramp with that many micro-batches for each pipeline."""
    steps = range(job.recipe.num_steps)
    return next(step for step in steps if job.recipe.at(step).num_sequences >= DP * num_micro_batches)


# The run's very first step has 24 micro-batches, too few for DualPipe: 1F1B over one of its two directions.
STEPS = [
    ("first", 32),
    pytest.param("middle", 24, marks=pytest.mark.slow),
    pytest.param("last", 32, marks=pytest.mark.slow),
    pytest.param("first", 24, marks=pytest.mark.slow),
    pytest.param("middle", 32, marks=pytest.mark.slow),
    pytest.param("last", 24, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("place", "num_micro_batches"), STEPS)
def test_a_rank_assembles_and_traces_a_step(place: str, num_micro_batches: int) -> None:
    with fake_job(RANKS[place]) as job:
        check_sizes(job)
        trace(job, num_micro_batches)


def test_the_ranks_of_a_pipeline_hold_the_published_model() -> None:
    """Half of them: the others are their mirrors."""
    sizes: dict[str, int] = {}
    for pp_rank in range(8):
        with fake_job(pp_rank * DP) as job:
            for info, _ in held(job.models):
                assert info.name not in sizes
                sizes[info.name] = info.global_numel
            check_sizes(job)
    assert sum(size for name, size in sizes.items() if not name.startswith("mtp.")) == MAIN_PARAMETERS
    assert sum(size for name, size in sizes.items() if name.startswith("mtp.")) == MTP_PARAMETERS


WAITS = {
    "a number": lambda x: x.sum().item(),
    "a list": lambda x: x.tolist(),
    "a question": lambda x: bool(x.isfinite().all()),
    "where": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a histogram": lambda x: x.long().bincount(),
    "unknown repeats": lambda x: x.repeat_interleave(x.long()),
    "distinct values": lambda x: x.unique(),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_trace_sees_every_wait(wait: str) -> None:
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        WAITS[wait](torch.ones(8))


@pytest.mark.parametrize("copy", [lambda x: x.to("cpu"), lambda x: x.cpu(), lambda x: torch.tensor([1], device="cpu")])
def test_a_trace_sees_copies(copy: Any) -> None:
    with Copies() as copies:
        copy(torch.ones(8))
    assert len(copies.found) == 1
