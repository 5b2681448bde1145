"""What a rank keeps from step to step, in closed form, and what its optimizer does with it, traced.

Shapes come from the model laid out without memory, places from the mesh, sizes of shards from the optimizer's own
layout. Nothing is assembled: a pipeline rank of any job takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launch.plan.events import Event
from launch.plan.record import Recorder, events_of
from launch.plan.routing import RoutedHost
from launch.plan.world import fake_world, placement_of
from parallel.mesh import Mesh
from parallel.pipeline.segments import Name
from parallel.process import everyone
from parallel.shards import FlatLayout, ParamInfo, segments
from parallel.zero.native import layout_of
from parallel.zero.optimizer import build
from parallel.zero.sets import ParamSet, ReplicaGroups, split_sets
from train.assemble import DTYPES
from train.config import RunConfig
from train.job import held
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.grads import wide_dtype
from train.precision.torch_engine import TorchEngine
from train.recipe.optimizer import rules


@dataclass(frozen=True)
class StateBytes:
    """What lies on a rank between its steps, in bytes.

    Attributes:
        weights, main_grad: of all parameters that the rank holds, with the padding of the flat buffers.
        masters, moments: of its shards. Weights in float32 or float64 are their own masters, which then are none but in
            DeepSpeed's engine.
        buffers: the selection biases of routers.
        ema_on_host: the moving average of its shards, in the host's memory.
    """

    weights: int
    main_grad: int
    masters: int
    moments: int
    buffers: int
    ema_on_host: int

    @property
    def on_device(self) -> int:
        """All but what lies on the host."""
        return self.weights + self.main_grad + self.masters + self.moments + self.buffers


def state_bytes(config: RunConfig, pp_rank: int) -> StateBytes:
    """The state of a rank of a pipeline: of the first column, which has as large a shard as any."""
    shell = _Shell.of(config, pp_rank)
    moment = 2 if config.optimizer.moments_dtype == "bf16" else wide_dtype(DTYPES[config.precision.name]).itemsize
    weights = main_grad = masters = moments = ema = 0
    for each, layout in shell.sets():
        own = layout.shard_numels[0]
        weights += layout.numel * each.dtype.itemsize
        main_grad += layout.numel * each.master_dtype.itemsize
        # DeepSpeed's engine keeps masters of float32 weights as well.
        has_masters = each.dtype != each.master_dtype or config.zero.engine == "deepspeed"
        masters += own * each.master_dtype.itemsize if has_masters else 0
        moments += len(each.inner.state_names) * own * moment
        ema += sum(part.numel for part in segments(layout, 0)) * each.master_dtype.itemsize
    return StateBytes(
        weights, main_grad, masters, moments, shell.buffer_bytes, ema if config.optimizer.ema_decay else 0
    )


def update_events(config: RunConfig, pp_rank: int, kernels: str = "cuda") -> tuple[Event, ...]:
    """What the optimizer of a rank of a pipeline does in a step: gradients to zero, reduced, clipped and applied, then
    new weights gathered. All of it behind the pipeline: what of it hides there is for `hidden` to say.

    The events are of the layer `optimizer`, kind `U`: node `zero_grad` stands at the start of a step, `update` at its
    end. The native engine is traced whatever `zero.engine` is. One rank of each group of replicas is seen, the first.
    """
    shell, recorder = _Shell.of(config, pp_rank), Recorder()
    with fake_world(config.parallel.world_size, 0, kernels):
        groups = _groups(config, shell.num_replicas)
        rule, dtype = rules(config.optimizer), DTYPES[config.precision.name]
        params = [
            (info, nn.Parameter(torch.empty(param.shape, dtype=dtype)), *rule(info.name, info.global_shape))
            for info, param in shell.params
        ]
        ahead = kernels == "cuda"
        optimizer = build(
            "native",
            params,
            groups,
            clip_grad_norm=config.optimizer.clip_grad_norm,
            frozen=config.frozen,
            host=RoutedHost(None, ahead, recorder),
            watch=recorder.watch("a rank"),
            kernels=kernels,
        )
        with recorder.on():
            recorder.begins(Name("optimizer", 0, "zero_grad"), "U")
            optimizer.zero_grad()
            recorder.begins(Name("optimizer", 0, "update"), "U")
            optimizer.step(1.0)
            optimizer.settle()
    return events_of(recorder.entries())


def exchanged_sets(config: RunConfig, pp_rank: int) -> list[tuple[int, ...]]:
    """For each set that a rank of a pipeline sums and gathers in an update, in its order: the slices of the model that
    it belongs to; none where they are any."""
    shell = _Shell.of(config, pp_rank)
    return [
        each.slices for each, _ in shell.sets() if not each.frozen and shell.num_replicas[each.infos[0].replicas] > 1
    ]


# Kind of layer -> elements that every rank holds which holds the layer, and elements of all its experts together.
Numels = dict[str, tuple[int, int]]


def numels_by_kind(small: RunConfig) -> Numels:
    """Elements of one layer of each kind, out of a run with one stage (`layers.small_job`).

    The table of embeddings is counted with `embedding`, and once more with `mtp`, whose stage may need one of its own.
    """
    model, shell = small.model, _Shell.of(small, 0)
    found: dict[str, list[int]] = {}
    for info, param in shell.params:
        kind = _kind(info.name, model.first_k_dense_replace)
        layers = {"dense": model.first_k_dense_replace, "moe": model.num_moe_layers}.get(kind, 1)
        is_expert = info.replicas == "expert"
        numel = param.numel() * (small.parallel.ep if is_expert else 1) // layers
        for each in (kind, "mtp") if kind == "embedding" and model.num_nextn_predict_layers else (kind,):
            found.setdefault(each, [0, 0])[is_expert] += numel
    return {kind: (everywhere, experts) for kind, (everywhere, experts) in found.items()}


def _kind(name: str, first_k_dense_replace: int) -> str:
    part, _, rest = name.partition(".")
    if part == "layers":
        return "dense" if int(rest.partition(".")[0]) < first_k_dense_replace else "moe"
    return {"embed_tokens": "embedding", "mtp": "mtp"}.get(part, "head")


@dataclass(frozen=True)
class _Shell:
    """The parameters of a rank, without memory.

    num_replicas: ranks that hold the same, by `ParamInfo.replicas`.
    """

    config: RunConfig
    params: Sequence[tuple[ParamInfo, nn.Parameter]]
    num_replicas: dict[str, int]
    buffer_bytes: int

    @staticmethod
    def of(config: RunConfig, pp_rank: int) -> _Shell:
        mesh = Mesh(config.parallel, pp_rank * config.parallel.dp, config.mirrored, config.shared_ends)
        models = _models(config, mesh)
        kinds = {"dense": "dense", "expert": "expert", "embedding": "embedding" if config.shared_ends else "dense"}
        num_replicas = {kind: _group_size(mesh, group) for kind, group in kinds.items()}
        wide = wide_dtype(DTYPES[config.precision.name]).itemsize
        buffers = sum(buffer.numel() for model in models for buffer in model.buffers()) * wide
        placement = config.placement
        positions = [placement.position(stage) for stage in placement.stages_on(pp_rank)]
        return _Shell(config, held(models, positions, placement.num_slices), num_replicas, buffers)

    def sets(self) -> list[tuple[ParamSet, FlatLayout]]:
        """What is reduced and updated together, and how it lies in its buffer."""
        rule, dtype = rules(self.config.optimizer), DTYPES[self.config.precision.name]
        params = [
            (info, nn.Parameter(param.to(dtype)), *rule(info.name, info.global_shape)) for info, param in self.params
        ]
        sets = split_sets(params, ReplicaGroups(), self.config.frozen)
        return [(each, layout_of(each, self.num_replicas[each.infos[0].replicas])) for each in sets]


def _groups(config: RunConfig, num_replicas: Mapping[str, int]) -> ReplicaGroups:
    """Groups of the right sizes, of which this process is the first rank."""
    made = {kind: dist.new_group(range(size), group_desc=kind) for kind, size in num_replicas.items()}
    if not config.shared_ends:
        made["embedding"] = made["dense"]
    return ReplicaGroups(**made, world=everyone(0, config.parallel.world_size, "world", dist.get_backend()))


def _models(config: RunConfig, mesh: Mesh) -> list[Transformer]:
    placement, model = config.placement, config.model
    slices = config.slices
    experts = placement_of(config, mesh)
    # A model asks of its dispatch which experts live on the rank, and nothing else before it runs.
    dispatch: Any = SimpleNamespace(num_local_experts=experts.num_local_experts, first_expert=experts.first_expert)
    engines = everywhere(TorchEngine())
    with torch.device("meta"):
        return [
            Transformer(model, dispatch, engines, parts=slices[placement.position(stage)])
            for stage in placement.stages_on(mesh.pp_rank)
        ]


def _group_size(mesh: Mesh, kind: str) -> int:
    return next(len(ranks) for ranks in mesh.groups(kind) if mesh.rank in ranks)
