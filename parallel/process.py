"""Starting and stopping the processes' groups: a Mesh joined with torch process groups.

Every group is made at the start, in one order on all ranks. Each stream of communication has groups of its own,
because inside one group a small message waits behind a large one: expert dispatch (`ep`, `node`, `rail`), gradients
(`dense`, `expert`), the step's scalars (`world`), checkpoints (`checkpoint`, gloo on every device). What joins all
ranks over gloo is a tree of small groups (`everyone`); torch's default group, which names the job and carries nothing,
connects nobody. What a rank comes to hold is counted by `held_groups` and tests/parallel/test_process.py.

How a dead rank ends the others. On gloo a process that dies closes its connections, and whatever waits for it raises at
once; those ranks die in turn, so the news crosses the job in milliseconds. Only a rank that hangs alive is left to
`timeout_s`. On NCCL the launcher (torchrun, or ours) sees the death and ends the others; the watchdog's `timeout_s` is
the backstop. For this to work a rank must not call `stop` after an exception: it simply exits.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import BY_MESSAGES
from parallel.everyone import WIDTH, Everyone, tree
from parallel.host import Host, host_of
from parallel.mesh import DISPATCH_KINDS, KINDS, Mesh, ParallelConfig
from parallel.watch import Watch

# A rank that has written its part of a checkpoint waits for the slowest disk of all. One that dies is heard of at once.
CHECKPOINT_TIMEOUT = datetime.timedelta(hours=1)
# Exchanges that a computation waits for: on a GPU their kernels come before those that are only queued earlier.
URGENT = ("ep", "node", "rail")


@dataclass(frozen=True)
class Groups:
    """This rank's place in the mesh, its device and border to it, the process group of each kind that it belongs to.

    kernels: the kind of device, cpu or cuda, for which everything is chosen that differs between them. It is that of
    `device`, except where a job is laid out for a device that is not there.
    timeout: after which a group gives up by itself, but for those of `checkpoint`, which have CHECKPOINT_TIMEOUT where
    that is longer. watch: through which this rank waits for others.
    """

    mesh: Mesh
    device: torch.device
    host: Host
    dense: dist.ProcessGroup
    expert: dist.ProcessGroup
    embedding: dist.ProcessGroup
    ep: dist.ProcessGroup
    node: dist.ProcessGroup
    rail: dist.ProcessGroup
    world: Everyone
    checkpoint: Everyone
    started_default: bool
    kernels: str = "cpu"
    timeout: datetime.timedelta = datetime.timedelta(seconds=600)
    watch: Watch = field(default_factory=Watch)


def start(
    config: ParallelConfig,
    device: str = "cpu",
    mirrored: bool = False,
    shared_ends: bool = False,
    timeout_s: float = 600,
    store: dist.Store | None = None,
    *,
    backend: str | None = None,
    kernels: str | None = None,
) -> Groups:
    """Join the job and make its groups; blocks until all ranks have.

    Uses the default process group if there is one, else the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), else this process alone is the world. `device` is "cpu" (gloo) or "cuda" (NCCL, one device per
    LOCAL_RANK). store: where the ranks have met already. backend: of all groups; None is gloo or NCCL, as the device
    asks. kernels: as in `Groups`; None is `device`. Raises ValueError as `check_size` does.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not one of cpu, cuda")
    in_job, (rank, world_size) = dist.is_initialized(), _place()
    check_size(config, world_size)
    mesh = Mesh(config, rank, mirrored, shared_ends)
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    timeout = datetime.timedelta(seconds=timeout_s)
    chosen = backend or ("nccl" if device == "cuda" else "gloo")
    kernels = kernels or device
    if not in_job and store is not None:
        found = dist.PrefixStore("groups", store)
        found.set_timeout(timeout)
        with _unconnected():
            dist.init_process_group(chosen, store=found, rank=rank, world_size=world_size, timeout=timeout)
    elif not in_job:
        with _unconnected():
            _join(chosen, rank, world_size, timeout)
    made = {kind: _own_group(rank, mesh.groups(kind), kind, chosen, timeout) for kind in KINDS}
    embedding = made["dense"]
    if shared_ends:
        embedding = _own_group(rank, mesh.groups("embedding"), "embedding", chosen, timeout)
    host = host_of(place)
    saves, apart = backend or "gloo", max(timeout, CHECKPOINT_TIMEOUT)
    return Groups(
        mesh=mesh,
        device=place,
        host=host,
        **made,
        embedding=embedding,
        world=everyone(rank, world_size, "world", chosen, timeout),
        checkpoint=everyone(rank, world_size, "checkpoint", saves, apart),
        started_default=not in_job,
        kernels=kernels,
        timeout=timeout,
        watch=Watch(
            f"rank {rank} (pipeline rank {mesh.pp_rank}, data rank {mesh.dp_rank})",
            mark=host.mark if host.runs_ahead else None,
        ),
    )


def check_size(config: ParallelConfig, world_size: int) -> None:
    """ValueError for a mesh of another size than the job: a sentence on every rank before they meet, not a time-out."""
    if config.world_size != world_size:
        raise ValueError(
            f"parallel.pp={config.pp} times parallel.dp={config.dp} must equal the number of processes, {world_size}"
        )


def stop(groups: Groups) -> None:
    """Wait for all ranks, then end the groups that `start` made. For a job that ended well; see the module's text."""
    # A connection closed while a peer still reads from it would look like a death to that peer.
    groups.checkpoint.barrier(groups.watch, "the end of the run on {peers}")
    # The embedding's group may be the dense one.
    of_kinds = {getattr(groups, name) for name in (*KINDS, "embedding")}
    for group in of_kinds | {*groups.world.groups, *groups.checkpoint.groups}:
        dist.destroy_process_group(group)
    if groups.started_default:
        dist.destroy_process_group()


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _join(backend: str, rank: int, world_size: int, timeout: datetime.timedelta) -> None:
    if os.environ.get("MASTER_ADDR"):
        dist.init_process_group(backend, timeout=timeout)
    elif world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=1, timeout=timeout)
    else:
        raise ValueError(f"WORLD_SIZE={world_size} is set but MASTER_ADDR is not: start the ranks with torchrun")


def everyone(
    rank: int, world_size: int, kind: str, backend: str, timeout: datetime.timedelta | None = None
) -> Everyone:
    """This rank's place among all of a job, over groups that are made for it; all ranks call it together."""
    return Everyone.make(rank, world_size, _width(backend, world_size), _maker(kind, backend, timeout))


def held_groups(mesh: Mesh, backend: str) -> dict[str, list[int]]:
    """Sizes of the groups of more than one rank that a rank connects to others in, by kind; without its links.

    backend: of the exchanges of a step. NCCL makes a communicator for a group when that is first used, so of the
    dispatch's groups only those of `parallel.dispatch` count; gloo connects every group as it is made.
    """
    kinds = ("dense", "expert", *(DISPATCH_KINDS[mesh.config.dispatch] if backend == "nccl" else URGENT))
    if mesh.embedding_replicas != mesh.dense_replicas:
        kinds = (*kinds, "embedding")
    sizes = {kind: [len(mesh.own_group(kind))] for kind in kinds}
    sizes["world"] = sizes_in_tree(mesh, _width(backend, mesh.world_size))
    return {kind: found for kind, each in sizes.items() if (found := [size for size in each if size > 1])}


def sizes_in_tree(mesh: Mesh, width: int = WIDTH) -> list[int]:
    """Sizes of the groups through which a rank meets all others."""
    return [len(ranks) for level in tree(mesh.world_size, width) for ranks in level if mesh.rank in ranks]


def _width(backend: str, world_size: int) -> int:
    """How wide the tree of the step's scalars is: gloo connects all members of a group with each other."""
    return WIDTH if backend in BY_MESSAGES else max(1, world_size)


@contextmanager
def _unconnected() -> Iterator[None]:
    """Inside, a group of gloo's connects two ranks when they first speak; torch reads the variable as it makes one.

    Only for a group that does not speak, or whose ranks all speak at once: whoever sends first waits for the other.
    """
    name = "TORCH_GLOO_LAZY_INIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _maker(kind: str, backend: str, timeout: datetime.timedelta | None) -> Callable[[Sequence[int]], Any]:
    """Makes groups of a kind."""
    options: dict[str, Any] = {"timeout": timeout, "backend": backend, "group_desc": kind}
    if backend == "nccl" and kind in URGENT:
        options["pg_options"] = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    return lambda ranks: dist.new_group(list(ranks), **options)


def _own_group(
    rank: int, all_ranks: tuple[tuple[int, ...], ...], kind: str, backend: str, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """Make all groups of a kind and return this rank's.

    torch asks every rank to take part in making every group; one that is not in it only counts it, without a word to
    the store: 10 microseconds, 0.3 s for the 31 thousand links and groups of 16 thousand ranks. What would spare that,
    `use_local_synchronization`, names groups by their ranks and by how many groups a rank has at that moment: ranks
    that have different numbers would wait for each other forever, and groups made again in one job would meet the
    addresses of the ended ones.
    """
    make, own = _maker(kind, backend, timeout), None
    for ranks in all_ranks:
        group = make(ranks)
        if rank in ranks:
            own = group
    assert own is not None, f"rank {rank} is in no {kind} group"
    return own
