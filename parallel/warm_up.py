"""The first use of every communicator, in one order on all ranks, before anything else is under way.

NCCL makes a communicator, and connects the ranks of one, in the first call that needs it, and waits there for the other
ranks. In the middle of a step ranks come to first calls in orders of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from parallel.collectives import Handle, all_gather, exchange_counts, reduce_scatter
from parallel.mesh import DISPATCH_KINDS
from parallel.process import Groups
from parallel.watch import Need

Call = Callable[[torch.Tensor, dist.ProcessGroup], Handle]
# What a step does in a group of each kind. Inside one kind no rank is in two groups, so kinds in one order are enough.
CALLS: dict[str, tuple[Call, ...]] = {
    "dense": (reduce_scatter, all_gather),
    "expert": (reduce_scatter, all_gather),
    "embedding": (reduce_scatter, all_gather),
    "ep": (exchange_counts,),
    "node": (exchange_counts,),
    "rail": (exchange_counts,),
}


def use_communicators(groups: Groups) -> None:
    """Do once, for one number, what a step does in each of this rank's groups. All ranks call it together.

    A group through which this run's dispatch sends nothing is left alone, and never gets a communicator.
    """
    done: set[dist.ProcessGroup] = set()
    idle = {*DISPATCH_KINDS["flat"], *DISPATCH_KINDS["two_hop"]} - {*DISPATCH_KINDS[groups.mesh.config.dispatch]}
    for kind, calls in CALLS.items():
        group: dist.ProcessGroup = getattr(groups, kind)
        if kind in idle or group in done or dist.get_world_size(group) == 1:
            continue  # the embedding's may be the dense one
        done.add(group)
        first = Need("numbers", f"the first message of the {kind} group from {{peers}}", group)
        numbers = torch.zeros(dist.get_world_size(group), device=groups.device)
        for call in calls:
            groups.watch.launch(first, partial(call, numbers, group)).wait()
            groups.host.read("first messages", numbers)
    if groups.world.world_size > 1:
        number, kind = torch.zeros(1, dtype=torch.int64, device=groups.device), "numbers"
        found = groups.world.all_gather(number, groups.watch, kind, "the first message of all from {peers}")
        groups.host.read("first messages", found)
        groups.world.sum(number, groups.watch, kind, "the first sum over {peers}")
        groups.host.read("first messages", number)
