"""Activations and gradients between neighbouring stages where receives cost nothing until they are met (gloo).

Two one-way links per direction, each with a group of its own. A link keeps order and the schedule says it, so no
message carries a tag: both ends derive from the lists which tensor comes next. Receives are posted ahead of need. A
sent tensor is kept until the lists prove that it has arrived: whoever sends at the end of one action has taken all that
its earlier actions work on. (Asking would not help: gloo says that a send is complete only to those who wait for it.)
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.pipeline.actions import Chunk
from parallel.pipeline.order import Channel, Message, messages, source
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule
from parallel.watch import Need, Watch

# Receives that each link has posted ahead.
NUM_POSTED = 2
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

    Each link carries one message at once: who is missing is missed here. (A rank that is not in a group only counts it;
    for all links of 2048 ranks that takes a few hundredths of a second.)
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


class _Expected(NamedTuple):
    """A receive that has been posted."""

    message: Message
    buffer: Tensor
    work: dist.Work
    need: Need


class _Leaving(NamedTuple):
    """A send under way, to be taken by the `taken`-th action of its target."""

    taken: int
    work: dist.Work
    tensor: Tensor
    need: Need


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
        self._dtype, self._device = dtype, device
        self._shape: tuple[int, ...] = ()
        self._placement: Placement | None = None
        self._to_send: dict[Channel, deque[Message]] = {}
        self._to_post: dict[Channel, deque[Message]] = {}
        self._posted: dict[Channel, deque[_Expected]] = {}
        self._leaving: dict[Channel, deque[_Leaving]] = {}
        self._here: dict[Chunk, Tensor] = {}

    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None:
        """Post the first receives of a schedule, whose tensors all have this shape."""
        self._placement, self._shape = schedule.placement, shape
        for channel, sent in messages(schedule).items():
            if channel.source == self._rank:
                self._to_send[channel], self._leaving[channel] = deque(sent), deque()
            if channel.target == self._rank:
                self._to_post[channel], self._posted[channel] = deque(sent), deque()
                for _ in range(NUM_POSTED):
                    self._post(channel)

    def turn_to(self, at: int) -> None:
        """The rank begins the `at`-th action of its list."""

    def reach(self, at: int, moment: float) -> None:
        """What is posted ahead stands in nobody's way."""

    def close(self) -> None:
        """Wait until everything sent has left."""
        for leaving in self._leaving.values():
            while leaving:
                sent = leaving.popleft()
                self._watch.wait(sent.need, sent.work.wait)
        assert not self._here
        assert not any(map(any, (self._to_send.values(), self._to_post.values(), self._posted.values())))

    def take(self, part: Chunk) -> Tensor | None:
        """What an F or B works on: waits for it. None where tokens or the loss come in."""
        assert self._placement is not None
        made_by = source(self._placement, part)
        if made_by is None:
            return None
        if self._placement.rank_of[made_by.stage] == self._rank:
            return self._here.pop(part)
        channel = Channel(self._placement.rank_of[made_by.stage], self._rank, part.kind)
        message, buffer, work, need = self._posted[channel].popleft()
        assert message.consumer == part, f"{channel} brings {message.consumer}, not {part}"
        self._watch.wait(need, work.wait)
        self._post(channel)
        for kind in "FB":
            leaving = self._leaving.get(Channel(self._rank, channel.source, kind), ())
            # Strictly: the two halves of a pair take and send in turns.
            while leaving and leaving[0].taken < message.sent:
                leaving.popleft().work.wait()  # no time: it is there
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
        channel = Channel(self._rank, target, part.kind)
        group, leaving, message = self._groups[channel], tensor.contiguous(), self._to_send[channel].popleft()
        assert message.producer == part, f"{channel} is to carry {message.producer}, not {part}"
        need = Need("output", f"{CARRIES[part.kind]} of {{what}} to be taken by {{peers}}", group, part)
        work = self._watch.reach(need, lambda: dist.isend(leaving, group=group, group_dst=1 - dist.get_rank(group)))
        assert work is not None
        self._leaving[channel].append(_Leaving(message.taken, work, leaving, need))

    def _post(self, channel: Channel) -> None:
        if not self._to_post[channel]:
            return
        group, message = self._groups[channel], self._to_post[channel].popleft()
        buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        need = Need("input", f"{CARRIES[channel.kind]} of {{what}} from {{peers}}", group, message.producer)
        work = self._watch.reach(need, lambda: dist.irecv(buffer, group=group, group_src=1 - dist.get_rank(group)))
        assert work is not None
        self._posted[channel].append(_Expected(message, buffer, work, need))
