"""Activations and gradients between neighbouring stages: two one-way links per direction, each with a group of its own.

A link keeps order and the schedule says it, so no message carries a tag: both ends derive from the lists which tensor
comes next. Receives are posted ahead of need; a sent tensor is kept until it is gone.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.pipeline.actions import Chunk
from parallel.pipeline.order import Channel, messages, source
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule
from parallel.watch import Need, Watch

# What a link of each kind brings.
CARRIES = {"F": "the activations", "B": "the gradient"}


def channels(placement: Placement) -> list[Channel]:
    """Every link of a placement, in one order on all ranks: activations onwards, gradients back."""
    found = set()
    for stage in range(placement.num_stages):
        following = placement.after(stage)
        if following is not None and placement.rank_of[stage] != placement.rank_of[following]:
            here, there = placement.rank_of[stage], placement.rank_of[following]
            found |= {Channel(here, there, "F"), Channel(there, here, "B")}
    return sorted(found)


def connect(
    placement: Placement, mesh: Mesh, device: torch.device, timeout: datetime.timedelta | None = None
) -> dict[Channel, dist.ProcessGroup]:
    """Make the two-rank groups of all links of all pipelines; every rank of the job must call it. Returns one's own.

    Each link carries one message at once. NCCL connects two ranks at their first message and waits there for the other
    end: met first in the middle of a schedule, in an order of each rank's own, they could wait in a circle. (A rank
    that is not in a group only counts it; for all links of 2048 ranks that takes a few hundredths of a second.)
    """
    own = {}
    for column in range(mesh.config.dp):
        for channel in channels(placement):
            ends = [channel.source * mesh.config.dp + column, channel.target * mesh.config.dp + column]
            group = dist.new_group(sorted(ends), timeout=timeout, group_desc=f"link {channel.kind}")
            if mesh.rank in ends:
                own[channel] = group
    for channel, group in own.items():
        other, message = 1 - dist.get_rank(group), torch.zeros(1, device=device)
        if channel.source == mesh.pp_rank:
            dist.send(message, group=group, group_dst=other)
        else:
            dist.recv(message, group=group, group_src=other)
    return own


class Links:
    """One rank's ends of the links. `open` a schedule, then `take` and `send` in its order."""

    def __init__(
        self,
        rank: int,
        groups: Mapping[Channel, dist.ProcessGroup],
        dtype: torch.dtype,
        device: torch.device,
        watch: Watch | None = None,
    ) -> None:
        """rank: in the pipeline. watch: through which it waits."""
        self._watch = watch or Watch()
        self._rank, self._groups = rank, groups
        # A receive that waits on NCCL occupies multiprocessors, so there only the next one is posted.
        self._slots = 1 if device.type == "cuda" else 2
        self._dtype, self._device = dtype, device
        self._shape: tuple[int, ...] = ()
        self._placement: Placement | None = None
        self._expected: dict[Channel, deque[Chunk]] = {}
        self._posted: dict[Channel, deque[tuple[Chunk, Tensor, dist.Work, Need]]] = {}
        self._leaving: deque[tuple[dist.Work, Tensor, Need]] = deque()
        self._here: dict[Chunk, Tensor] = {}

    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None:
        """Post the first receives of a schedule, whose tensors all have this shape."""
        self._placement, self._shape = schedule.placement, shape
        for channel, expected in messages(schedule).items():
            if channel.target == self._rank:
                self._expected[channel] = deque(message.consumer for message in expected)
                self._posted[channel] = deque()
                for _ in range(self._slots):
                    self._post(channel)

    def close(self) -> None:
        """Wait until everything sent has left."""
        while self._leaving:
            work, _, need = self._leaving.popleft()
            self._watch.wait(need, work.wait)
        assert not self._here and not any(self._posted.values()) and not any(self._expected.values())

    def take(self, part: Chunk) -> Tensor | None:
        """What an F or B works on: waits for it. None where tokens or the loss come in."""
        assert self._placement is not None
        made_by = source(self._placement, part)
        if made_by is None:
            return None
        if self._placement.rank_of[made_by.stage] == self._rank:
            return self._here.pop(part)
        channel = Channel(self._placement.rank_of[made_by.stage], self._rank, part.kind)
        expected, buffer, work, need = self._posted[channel].popleft()
        assert expected == part, f"{channel} brings {expected}, not {part}"
        self._watch.wait(need, work.wait)
        self._post(channel)
        return buffer

    def send(self, part: Chunk, tensor: Tensor | None) -> None:
        """Hand on the result of an F or B, at once; None where a route ends."""
        assert self._placement is not None
        at = {"F": self._placement.after, "B": self._placement.before}[part.kind](part.stage)
        if at is None:
            return
        assert tensor is not None
        target = self._placement.rank_of[at]
        if target == self._rank:
            self._here[Chunk(part.kind, at, part.micro_batch)] = tensor
            return
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()
        group, leaving = self._groups[Channel(self._rank, target, part.kind)], tensor.contiguous()
        need = Need("output", f"{CARRIES[part.kind]} of {{what}} to be taken by {{peers}}", group, part)
        work = self._watch.reach(need, lambda: dist.isend(leaving, group=group, group_dst=1 - dist.get_rank(group)))
        assert work is not None
        self._leaving.append((work, leaving, need))

    def _post(self, channel: Channel) -> None:
        if not self._expected[channel]:
            return
        group = self._groups[channel]
        buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        part = self._expected[channel].popleft()
        assert self._placement is not None
        made_by = source(self._placement, part)
        need = Need("input", f"{CARRIES[part.kind]} of {{what}} from {{peers}}", group, made_by)
        work = self._watch.reach(need, lambda: dist.irecv(buffer, group=group, group_src=1 - dist.get_rank(group)))
        assert work is not None
        self._posted[channel].append((part, buffer, work, need))
