"""The door to DeepSpeed: its `BF16_Optimizer`, built directly with our process groups, as an engine of the optimizer.

DeepSpeed holds the flat weights and gradients, owns the fp32 masters and runs the inner optimizer on them. We reduce,
take the norm, clip and decide whether to step before it is asked to, and gather what it has written, as its own gather
would end before its step does. `deepspeed.initialize` is
never called and nothing is compiled. What is touched outside of the object, for the life of the process: DeepSpeed's
record of ops that may be compiled, its communication backend (a wrapper of torch.distributed) and its logger.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.shards import lay_out
from parallel.watch import Watch
from parallel.zero.arrivals import Arrivals
from parallel.zero.sets import ParamSet

VERSION = "0.19.8"
_INSTALL = f"pip install deepspeed=={VERSION}, or set zero.engine=native"


class DeepSpeedEngine:
    """Drives a `BF16_Optimizer`. Satisfies `zero.optimizer.Engine`; holds bf16 and fp32 parameters."""

    def __init__(self, sets: list[ParamSet], watch: Watch, kernels: str) -> None:
        if any(each.dtype == torch.float64 for each in sets):
            raise ValueError("zero.engine=deepspeed cannot hold precision=fp64; use zero.engine=native")
        inners = {each.inner.name: each.inner for each in sets}
        if len(inners) > 1 or any(inner.whole_matrices for inner in inners.values()):
            raise ValueError(
                "zero.engine=deepspeed has one optimizer for all parameters, on shards that cut through matrices, and "
                f"cannot hold {' beside '.join(inners)}; use zero.engine=native"
            )
        deepspeed = _start(sets[0].params[0].device.type)
        process_groups = [_process_group(each.group) for each in sets]
        optimizer = sets[0].inner.make(
            [{"params": list(each.params), "weight_decay": each.weight_decay, "kernels": kernels} for each in sets]
        )
        self._zero = _build(optimizer, sets, process_groups, self._send)
        self.layouts = [
            # DeepSpeed puts parameters end to end and pads the end to twice the number of shards.
            lay_out(each.numels, each.num_shards, align_shard=self._zero.nccl_start_alignment_factor)
            for each in sets
        ]
        sizes = [flat.numel() for flat in self._zero.bf16_groups_flat]
        assert sizes == [layout.numel for layout in self.layouts], (deepspeed.__version__, sizes, self.layouts)
        self.main_grads: list[Tensor] = self._zero.fp32_groups_gradients_flat
        self.masters: list[Tensor] = self._zero.fp32_groups_flat_partition
        self.optimizers = [optimizer]
        self._sets = sets
        self.arrivals = Arrivals(sets, self.layouts, self._zero.bf16_groups_flat, watch)

    def state_of(self, index: int) -> dict[str, Any]:
        """What the inner optimizer keeps of the master of set number `index`."""
        return self.optimizers[0].state[self.masters[index]]

    def update(self, grads: list[Tensor]) -> None:
        """Hand the reduced gradient shards to DeepSpeed, which steps on its masters; new weights then set out."""
        self.arrivals.settle()
        for own, grad in zip(self._zero.fp32_groups_gradient_flat_partition, grads, strict=True):
            if own.data_ptr() != grad.data_ptr():
                own.copy_(grad)
        self._zero.step()
        for master in self.masters:
            master.grad = None

    def publish(self) -> None:
        """Masters to weights, and every replica's shard to all of them."""
        self.arrivals.settle()
        self._write_shards()
        self.arrivals.send(range(len(self._sets)))
        self.arrivals.settle()

    def _send(self) -> None:
        """In DeepSpeed's step, where it would gather: weights that stay as they are need not travel."""
        self._write_shards()
        self.arrivals.send([index for index, each in enumerate(self._sets) if not each.frozen])

    @torch.no_grad()
    def _write_shards(self) -> None:
        both = zip(self._sets, self._zero.bf16_partitioned_groups, self.masters, strict=True)
        for each, parts, master in both:
            parts[each.shard].copy_(master)


def _start(device_type: str) -> ModuleType:
    """Import DeepSpeed, quietly and with its compiled ops switched off, and point it at torch.distributed."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ValueError(f"zero.engine=deepspeed needs DeepSpeed: {_INSTALL}") from error
    if deepspeed.__version__.split("+")[0] != VERSION:
        raise ValueError(
            f"zero.engine=deepspeed was proven with DeepSpeed {VERSION}, not {deepspeed.__version__}: {_INSTALL}"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory collectives would be compiled at the first start, for minutes; they serve tensor parallelism.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        # DeepSpeed asks torch.distributed for rank and size even when there is one process.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _process_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A process group for DeepSpeed, which knows no None; only this rank takes part when it must be made."""
    if group is not None:
        return group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _build(
    optimizer: torch.optim.Optimizer,
    sets: list[ParamSet],
    process_groups: list[dist.ProcessGroup],
    send: Callable[[], None],
) -> Any:
    """send: called where its step would gather the weights."""
    from deepspeed.runtime import bf16_optimizer, compiler
    from deepspeed.utils.timer import NoopTimer

    # It imports a Muon to ask whether the inner optimizer is one, and that is compiled as it is imported, which loads
    # all of inductor: one to two seconds on every rank, for what is never called here.
    compile_at_import, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_at_import

    class Sharded(bf16_optimizer.BF16_Optimizer):
        """One process group per set, and no norm, clipping or zeroing of its own."""

        def _setup_for_real_optimizer(self) -> None:
            # Its own way to give experts another replica group leads through module-wide dictionaries.
            self.real_dp_process_group = process_groups
            super()._setup_for_real_optimizer()

        def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
            # Norm, clipping and the decision to step are made by then. Its own norm would read all unreduced gradients.
            return [] if for_clipping else ([torch.zeros((), device=self.bf16_groups_flat[0].device)], {})

        def update_lp_params(self) -> None:
            send()

        def clear_hp_grads(self) -> None:
            # Gradients are set to zero once, by `ZeroOptimizer.zero_grad`.
            pass

    # It prints a report, after a garbage collection, twice per set.
    report, bf16_optimizer.see_memory_usage = bf16_optimizer.see_memory_usage, lambda *_, **__: None
    try:
        return Sharded(
            optimizer,
            {param: info.name for each in sets for info, param in zip(each.infos, each.params, strict=True)},
            # Without immediate updates it installs no hooks: gradients arrive in `main_grad` alone.
            SimpleNamespace(enabled=True, immediate_grad_update=False),
            clip_grad=0.0,
            dp_process_group=process_groups[0],
            timers=NoopTimer(),
            grad_acc_dtype=torch.float32,
        )
    finally:
        bf16_optimizer.see_memory_usage = report
