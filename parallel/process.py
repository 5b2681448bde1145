"""Starting and stopping the processes' groups: a Mesh joined with torch process groups.

Every group is made at the start, in one order on all ranks. Each stream of communication has groups of its own,
because inside one group a small message waits behind a large one: expert dispatch (`ep`, `node`, `rail`), gradients
(`dense`, `expert`), the step's scalars (`world`), checkpoints (`checkpoint`, gloo on every device).

How a dead rank ends the others. On gloo a process that dies closes its connections, and whatever waits for it raises at
once; those ranks die in turn, so the news crosses the job in milliseconds. Only a rank that hangs alive is left to
`timeout_s`. On NCCL the launcher (torchrun, or ours) sees the death and ends the others; the watchdog's `timeout_s` is
the backstop. For this to work a rank must not call `stop` after an exception: it simply exits.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from parallel.host import Host, host_of
from parallel.mesh import KINDS, Mesh, ParallelConfig
from parallel.watch import Need, Watch


@dataclass(frozen=True)
class Groups:
    """This rank's place in the mesh, its device and border to it, the process group of each kind that it belongs to.

    kernels: the kind of device, cpu or cuda, for which everything is chosen that differs between them. It is that of
    `device`, except where a job is laid out for a device that is not there.
    timeout: after which a group gives up by itself. watch: through which this rank waits for others.
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
    world: dist.ProcessGroup
    checkpoint: dist.ProcessGroup
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
        dist.init_process_group(chosen, store=found, rank=rank, world_size=world_size, timeout=timeout)
    elif not in_job:
        _join(chosen, rank, world_size, timeout)
    everyone = (tuple(range(world_size)),)
    made = {kind: _own_group(rank, mesh.groups(kind), kind, chosen, timeout) for kind in KINDS}
    embedding = made["dense"]
    if shared_ends:
        embedding = _own_group(rank, mesh.groups("embedding"), "embedding", chosen, timeout)
    host = host_of(place)
    return Groups(
        mesh=mesh,
        device=place,
        host=host,
        **made,
        embedding=embedding,
        world=_own_group(rank, everyone, "world", chosen, timeout),
        checkpoint=_own_group(rank, everyone, "checkpoint", backend or "gloo", timeout),
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
    together = Need("numbers", "the end of the run on {peers}", groups.checkpoint)
    groups.watch.wait(together, lambda: dist.barrier(groups.checkpoint))
    # The embedding's group may be the dense one.
    for group in {getattr(groups, name) for name in (*KINDS, "embedding", "world", "checkpoint")}:
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


def _own_group(
    rank: int, all_ranks: tuple[tuple[int, ...], ...], kind: str, backend: str, timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """Make all groups of a kind and return this rank's.

    torch asks every rank to take part in making every group. (`use_local_synchronization` would spare that, but it
    names groups by their ranks, so groups made again in one job would meet the addresses of the ended ones.)
    """
    own = None
    for ranks in all_ranks:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, group_desc=kind)
        if rank in ranks:
            own = group
    assert own is not None, f"rank {rank} is in no {kind} group"
    return own
