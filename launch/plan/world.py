"""The job of one rank of any run, without its cluster: tensors without values, process groups without peers.

A fake tensor has a shape and no values, so whatever would make the host wait for the device (a number read, a size that
depends on values) raises: what runs to its end waits nowhere but in `Host`. All ranks are there as far as torch knows,
and every message arrives. Tensors lie in the host's memory as torch sees it; for which device kernels, chunks and
collectives are chosen is said apart (`Groups.kernels`).

torch keeps one default process group for a whole process. So a world is refused where there is one already, and leaves
none behind; FakeTensorMode, the state of random numbers and warnings are as they were, too. What was made inside must
not be used outside: keep plain data alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.plan.attention import core_without_values
from launch.plan.fp8 import library_shapes
from launch.plan.record import Recorder
from launch.plan.routing import RoutedHost, Routing
from parallel import process
from parallel.expert.placement import Placement
from parallel.mesh import Mesh
from parallel.torch_names import FakeStore, FakeTensorMode, fake_process_group
from train.assemble import Files, put_together
from train.config import RunConfig
from train.data.rows.ahead import AtOnce
from train.data.rows.blend import Stream
from train.job import Job
from train.precision import tiles
from train.precision.build import settle
from train.precision.kernel_tiles import KernelTiles
from train.precision.reference import QuantisedWeights

# Fake groups that are taken for NCCL's, whose collectives are the library's own, and for gloo's, where they are ours.
_BACKENDS = {"cuda": "fake", "cpu": "fake_gloo"}

MakeRouting = Callable[[RunConfig, Placement], Routing | None]


def balanced(config: RunConfig, placement: Placement) -> Routing | None:
    """Every expert gets the same; None for a model without experts."""
    if not config.model.n_routed_experts:
        return None
    return Routing.balanced(config.model, placement, config.train.micro_batch_size * config.train.seq_len)


def as_drawn(config: RunConfig, placement: Placement) -> Routing | None:
    """Every expert gets the same in the mean, and of a micro-batch what chance makes of it."""
    if not config.model.n_routed_experts:
        return None
    return Routing.as_drawn(config.model, placement, config.train.micro_batch_size * config.train.seq_len)


@contextmanager
def world(
    config: RunConfig,
    rank: int = 0,
    kernels: str = "cuda",
    make_routing: MakeRouting = balanced,
    recorder: Recorder | None = None,
) -> Iterator[Job]:
    """The job of one rank of a run, assembled as a run assembles it; no step has been done.

    kernels: what everything is chosen for that differs between devices, "cuda" or "cpu". make_routing: what experts
    get. recorder: hears of all that the job does while it is on.
    Raises ValueError as `assemble` does for what needs ranks to be seen, and RuntimeError in a process that is a rank
    of a job already.
    """
    recorder = recorder or Recorder()
    config = without_values(config, kernels)
    mesh = Mesh(config.parallel, rank, config.mirrored, config.shared_ends)
    host = RoutedHost(make_routing(config, placement_of(config, mesh)), kernels == "cuda", recorder)
    with fake_world(config.parallel.world_size, rank, kernels):
        groups = process.start(
            config.parallel, "cpu", config.mirrored, config.shared_ends, backend=_BACKENDS[kernels], kernels=kernels
        )
        watch = recorder.watch(groups.watch.name)
        groups = dataclasses.replace(groups, host=host, watch=watch)
        library = library_shapes(config.precision) if kernels == "cuda" else None
        # On a CPU as torch's operations: code compiled for one would look for values.
        rounding = KernelTiles() if kernels == "cuda" else tiles
        weights = library or QuantisedWeights(config.precision.power_of_two_scales, rounding)
        made, core = config.run.kernels, core_without_values(config, kernels)
        yield put_together(
            config, groups, _files(config), tapes=recorder.tapes(), weights=weights, kernels=made, core=core
        )


@contextmanager
def fake_world(world_size: int, rank: int, kernels: str) -> Iterator[None]:
    """Inside, tensors have no values, and this process is the rank of a job of that size, whose peers are not there."""
    if dist.is_initialized():
        raise RuntimeError("this process has a default process group, and torch knows but one world at a time")
    _register()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Buffers of one storage are told by their places, of which fake ones have none.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        dist.init_process_group(_BACKENDS[kernels], store=FakeStore(), rank=rank, world_size=world_size)
        try:
            with FakeTensorMode():
                yield
        finally:
            dist.destroy_process_group()


def without_values(config: RunConfig, kernels: str) -> RunConfig:
    """The run as it can be assembled where tensors have no values.

    Which way of multiplying is faster on a CPU is measured before. There, documents are attended to one by one, and
    only the data have their lengths: they are taken to be as long as rows, which is the most that attention may cost.
    Kernels are not compiled; those of a GPU with Triton can be traced without it. The native engine stands for
    DeepSpeed's, which leaves things in the process.
    """
    on_cpu, named = kernels == "cpu", config.run.kernels in ("eager", "compiled")
    return dataclasses.replace(
        config,
        precision=settle(config.precision, kernels),
        data=dataclasses.replace(config.data, document_mask=config.data.document_mask and not on_cpu),
        run=dataclasses.replace(config.run, kernels="eager" if on_cpu or named else "triton"),
        zero=dataclasses.replace(config.zero, engine="native"),
    )


def placement_of(config: RunConfig, mesh: Mesh) -> Placement:
    """Where the experts are that this rank's dispatch reaches."""
    num_experts = config.model.n_routed_experts
    if config.parallel.dispatch == "local" or not num_experts:
        return Placement(num_experts, ep=1, ep_rank=0, num_nodes=1)
    return Placement.of(mesh, num_experts)


def _register() -> None:
    """Make the second kind of fake groups known to torch, once in a process."""
    if not hasattr(dist.Backend, "FAKE_GLOO"):
        dist.Backend.register_backend("fake_gloo", fake_process_group, extended_api=True, devices=["cpu"])


class FakeRows:
    """Rows of the right shape, as of one endless text."""

    num_rows = 1 << 62
    fingerprint = "none"
    end_of_document = 1
    unigram_entropy_nats = None

    def __init__(self, seq_len: int) -> None:
        self._seq_len = seq_len

    def rows(self, first: int, count: int) -> Tensor:
        return torch.empty(count, self._seq_len + 1, dtype=torch.int64)

    def num_targets(self, first: int, count: int) -> int:
        return count * self._seq_len

    def documents(self, position: int) -> list[Any]:
        return []

    def exposures(self, num_positions: int) -> list[Any]:
        return []

    @property
    def followed(self) -> Any:
        raise NotImplementedError("rows without values cannot be gone on with")


class _Nothing:
    """Stands for files that a job without values does not have: whoever asks for one is told so."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"a job without values has no files, and is asked for {name}")


def nothing() -> Any:
    """Stands for files that a job does not have."""
    return _Nothing()


def _files(config: RunConfig) -> Files:
    rows: Stream = FakeRows(config.train.seq_len)
    return Files(train_rows=rows, validation=nothing(), prompts=None, checkpoints=nothing(), reader=AtOnce)
