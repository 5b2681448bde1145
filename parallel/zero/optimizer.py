"""ZeRO-1 behind one interface: reduce-scatter, norm and clipping here; masters, updates and all-gather in an engine.

What can be is done beside the pipeline: a set's gradients are summed as soon as the slices of the model that it belongs
to are done with in a step (`complete`), while others still work, and its new weights arrive by the time that its slices
are first needed in the next one (`fence`). Both move time alone: no sum and no order of one is another.

Gradients are plain sums: losses are divided by the step's global counts beforehand, so nothing is averaged here.
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5 (P_os), with
gradients reduced once per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.collectives import reduce_scatter
from parallel.host import Host
from parallel.shards import FlatLayout, ParamInfo, Piece, shard_pieces
from parallel.watch import Need, Watch, Watched
from parallel.zero.arrivals import Arrivals
from parallel.zero.deepspeed_engine import DeepSpeedEngine
from parallel.zero.inner import InnerOptimizer
from parallel.zero.native import NativeEngine
from parallel.zero.norm import global_norm
from parallel.zero.sets import ParamSet, ReplicaGroups, split_sets, views

# The name of the weights in full precision among the states of a parameter; the inner optimizer names the others.
MASTER = "master"


class Engine(Protocol):
    """What owns the shards. The lists have one entry for each `ParamSet`."""

    layouts: list[FlatLayout]
    main_grads: list[Tensor]  # flat accumulators, whole
    masters: list[Any]  # 1-D, the shard that this rank owns
    optimizers: list[torch.optim.Optimizer]
    arrivals: Arrivals  # of weights that `update` has sent on their way

    def state_of(self, index: int) -> dict[str, Any]: ...

    def update(self, grads: list[Tensor]) -> None: ...

    def publish(self) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step, the same on all ranks: the norm before clipping, and whether the step was taken."""

    grad_norm: float
    finite: bool


class ZeroOptimizer:
    """Sharded optimizer over flat `main_grad` buffers. Made by `build`."""

    def __init__(
        self,
        engine: Engine,
        sets: list[ParamSet],
        groups: ReplicaGroups,
        clip_grad_norm: float,
        host: Host,
        watch: Watch,
        kernels: str,
        on_new_weights: Callable[[], None],
    ) -> None:
        self._engine, self._sets, self._groups, self._clip_grad_norm = engine, sets, groups, clip_grad_norm
        self._host, self._watch, self._on_new_weights = host, watch, on_new_weights
        self._kernels = kernels
        self.num_steps = 0
        # Of a step: which slices each set still waits for, and what is being summed.
        self._incomplete: list[set[int]] = []
        self._summing: dict[int, Watched[Tensor]] = {}
        for each, layout, flat in zip(sets, engine.layouts, engine.main_grads, strict=True):
            for param, view in zip(each.params, views(flat, layout, each.params), strict=True):
                param.main_grad = view  # type: ignore[attr-defined]
        self._create_state()
        for optimizer in engine.optimizers:
            optimizer.register_step_pre_hook(self._leave_frozen)

    def zero_grad(self) -> None:
        """Set all `main_grad` to zero."""
        for flat in self._engine.main_grads:
            flat.zero_()
        self._incomplete = [set(each.slices) for each in self._sets]
        assert not self._summing, "gradients that were summed were never applied"

    def complete(self, position: int) -> None:
        """Every replica's gradients of a slice of the model are in, for this step: start to sum what waited for it.

        All ranks of a replica group call it in one order. Until `step` such gradients must not change.
        """
        for index, missing in enumerate(self._incomplete):
            if position in missing:
                missing.remove(position)
                if not missing:
                    self._sum(index)

    def fence(self, position: int) -> None:
        """The weights of a slice of the model are whole from here on, those of the last step."""
        for index, each in enumerate(self._sets):
            if position in each.slices or not each.slices:
                self._engine.arrivals.arrive(index)

    def settle(self) -> None:
        """All weights are whole from here on."""
        self._engine.arrivals.settle()

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Reduce, clip and apply what `main_grad` holds. Collective over all groups. The host reads the norm alone.

        Masters are new when it returns, weights on their way: `fence` or `settle` stands before whatever uses them.
        When the norm is not finite nothing is changed, on any rank. The content of `main_grad` is undefined afterwards
        until `zero_grad`.
        """
        grads = self._reduce()
        live = [grad for grad, each in zip(grads, self._sets, strict=True) if not each.frozen]
        norm = global_norm(live, self._groups.world, self._host, self._watch, self._kernels)
        if not math.isfinite(norm):
            return StepResult(norm, False)
        # The factor of torch.nn.utils.clip_grad_norm_, in double.
        factor = self._clip_grad_norm / (norm + 1e-6) if self._clip_grad_norm else 1.0
        if factor < 1:
            for grad in live:
                grad.mul_(factor)
        self._set_lr(lr)
        self._engine.update(grads)
        self._on_new_weights()
        self.num_steps += 1
        return StepResult(norm, True)

    def _reduce(self) -> list[Tensor]:
        """This rank's shard of each set's gradient, summed over the replicas; in a world of one the buffer itself.

        Nobody reads the gradients of a frozen set, which are not summed.
        """
        for index in range(len(self._sets)):
            self._sum(index)
        summing, self._summing = self._summing, {}
        return [
            summing[index].wait() if index in summing else flat[layout.shard_slice(each.shard)]
            for index, (each, layout, flat) in enumerate(
                zip(self._sets, self._engine.layouts, self._engine.main_grads, strict=True)
            )
        ]

    def _sum(self, index: int) -> None:
        """Start to sum a set's gradients over its replicas, unless that is under way, or there is nothing to sum."""
        group = self._sets[index].group
        if index in self._summing or group is None or self._sets[index].num_shards == 1 or self._sets[index].frozen:
            return
        flat, numels = self._engine.main_grads[index], self._engine.layouts[index].shard_numels
        gradients = Need("optimizer", "the gradients from {peers}", group)
        self._summing[index] = self._watch.launch(gradients, lambda: reduce_scatter(flat, group, numels))

    def _leave_frozen(self, *_: Any) -> None:
        """Before a step of torch's optimizers, which leave masters without a gradient alone, and their moments."""
        for each, master in zip(self._sets, self._engine.masters, strict=True):
            if each.frozen:
                master.grad = None

    def _set_lr(self, lr: float) -> None:
        for optimizer in self._engine.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def _values(self, index: int) -> dict[str, Tensor]:
        """The master of a set and what is kept of each of its elements, by name."""
        each, kept = self._sets[index], self._engine.state_of(index)
        return {MASTER: self._engine.masters[index].detach(), **{name: kept[name] for name in each.inner.state_names}}

    @torch.no_grad()
    def _create_state(self) -> None:
        """Make the inner optimizers' state exist, as zeros, before the first step: a checkpoint can be read into it.

        A step with a learning rate of zero leaves masters as they are, whatever the optimizer is.
        """
        for each, layout, flat, master in zip(
            self._sets, self._engine.layouts, self._engine.main_grads, self._engine.masters, strict=True
        ):
            master.grad = flat[layout.shard_slice(each.shard)]
        self._set_lr(0.0)
        for optimizer in self._engine.optimizers:
            optimizer.step()
        for index, (each, master) in enumerate(zip(self._sets, self._engine.masters, strict=True)):
            master.grad = None
            for name in each.inner.state_names:
                self._engine.state_of(index)[name].zero_()
            each.inner.set_num_updates(self._engine.state_of(index), 0)

    def state(self) -> dict[str, list[Piece]]:
        """All state of this rank as ranges of global tensors, keyed "master.NAME" and "STATE.NAME" for each state that
        the parameter's inner optimizer keeps.

        Tensors are views: writing them loads them (then call `load_finished`). Names of which this rank holds nothing
        are absent. The other ranks of the replica group hold the other ranges.
        """
        state = {}
        for index, (each, layout) in enumerate(zip(self._sets, self._engine.layouts, strict=True)):
            for key, value in self._values(index).items():
                for name, pieces in shard_pieces(each.infos, layout, each.shard, value).items():
                    state[f"{key}.{name}"] = pieces
        return state

    def state_sizes(self) -> dict[str, int]:
        """Elements of the global tensor of every state of this rank's parameters, of which it may hold no range."""
        return {
            f"{key}.{info.name}": info.global_numel
            for each in self._sets
            for info in each.infos
            for key in (MASTER, *each.inner.state_names)
        }

    @torch.no_grad()
    def load_finished(self, num_steps: int) -> None:
        """To be called on all ranks once the pieces of `state` are written: masters to weights, on all replicas.

        Args:
            num_steps: optimizer steps taken so far.
        """
        self.num_steps = num_steps
        self.settle()
        for index, each in enumerate(self._sets):
            each.inner.set_num_updates(self._engine.state_of(index), num_steps)
        self._engine.publish()
        self._on_new_weights()

    def state_bytes(self) -> int:
        """Bytes of masters and optimizer state on this rank (weights that are their own masters count as masters)."""
        tensors = [tensor for index in range(len(self._sets)) for tensor in self._values(index).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


_ENGINES: dict[str, Callable[[list[ParamSet], Watch, str], Engine]] = {
    "native": NativeEngine,
    "deepspeed": DeepSpeedEngine,
}


def build(
    engine: str,
    params: Sequence[tuple[ParamInfo, nn.Parameter, InnerOptimizer, float]],
    groups: ReplicaGroups,
    *,
    clip_grad_norm: float = 1.0,
    frozen: Collection[str] = (),
    host: Host | None = None,
    watch: Watch | None = None,
    kernels: str = "cpu",
    on_new_weights: Callable[[], None] = lambda: None,
) -> ZeroOptimizer:
    """Move parameters into flat storage, give each a `main_grad` and shard the optimizer state over its replicas.

    Args:
        engine: "native" or "deepspeed".
        params: (place in the global tensor, local parameter with its initial values, what updates it, its weight
            decay), in an order that is the same on all replicas. `main_grad` is fp32, and fp64 for an fp64 parameter. A
            rank whose pipeline stages hold no layer has none; it still takes part in the norm.
        clip_grad_norm: largest global norm; 0 for no clipping.
        frozen: names of parameters that stay as they are, moments and all; their gradients count in no norm.
        host: where the norm is read; None for a CPU's.
        watch: through which this rank waits for others.
        kernels: cpu or cuda, for which the sizes of what is done at a time are chosen.
        on_new_weights: called after every change of the weights: a step, a checkpoint read.

    Raises ValueError for an unknown engine, or for one that cannot hold these parameters.
    """
    if engine not in _ENGINES:
        raise ValueError(f"zero.engine={engine} is not one of {', '.join(_ENGINES)}")
    sets = split_sets(params, groups, frozen)
    host, watch = host or Host(), watch or Watch()
    # Without parameters there is nothing for DeepSpeed to hold.
    make_engine = _ENGINES[engine] if sets else NativeEngine
    zero = make_engine(sets, watch, kernels)
    return ZeroOptimizer(zero, sets, groups, clip_grad_norm, host, watch, kernels, on_new_weights)
