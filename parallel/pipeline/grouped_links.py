"""Activations and gradients between neighbouring stages where messages are kernels (NCCL): in rounds of group calls.

What a rank sends and receives at one moment is one call (`rounds`), on the one communicator of its pipeline. A receive
is launched when what it brings is about to be sent, and not before; nothing launched needs anything that this rank has
yet to launch. The calls of a rank run one after the other, so that who waits for one has waited for all before it, and
what they have sent is let go. The choice between this and `links.Links` is taken where a job is put together. Proved by
a model of NCCL and run on gloo; not yet run on a GPU.
"""

from __future__ import annotations

import datetime
import math
from collections import deque
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.pipeline.actions import Chunk
from parallel.pipeline.links import CARRIES, channels
from parallel.pipeline.order import Channel, source
from parallel.pipeline.placement import Placement
from parallel.pipeline.rounds import Round, rounds
from parallel.pipeline.schedule import Schedule
from parallel.watch import Need, Watch

# Calls under way after which the oldest is waited for, which no order forbids: where a rank only sends, as the first
# one of an evaluation does, nothing else lets go of what it has sent. Each is over about an action later.
NUM_UNDER_WAY = 8
# A run has one list for a step of each size, and those of its evaluations.
_rounds = lru_cache(maxsize=8)(rounds)


def connect_column(
    placement: Placement, mesh: Mesh, device: torch.device, timeout: datetime.timedelta | None = None
) -> dist.ProcessGroup:
    """Make the group of every pipeline, in one order on all ranks of the job, which all call it. Returns one's own.

    NCCL makes a communicator in its first call, in which all of its ranks must be, and connects two ranks at their
    first message, where each waits for the other: all of that is done here.
    """
    own = None
    for column in range(mesh.config.dp):
        ranks = [stage * mesh.config.dp + column for stage in range(mesh.config.pp)]
        group = dist.new_group(ranks, timeout=timeout, group_desc="link")
        if mesh.rank in ranks:
            own = group
    assert own is not None
    if mesh.config.pp > 1:
        dist.all_reduce(torch.zeros(1, device=device), group=own)
        links = channels(placement)
        targets = sorted({link.target for link in links if link.source == mesh.pp_rank})
        sources = sorted({link.source for link in links if link.target == mesh.pp_rank})
        operations = [dist.P2POp(dist.isend, torch.zeros(1, device=device), group=own, group_peer=to) for to in targets]
        operations += [
            dist.P2POp(dist.irecv, torch.zeros(1, device=device), group=own, group_peer=by) for by in sources
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return own


class GroupedLinks:
    """One rank's ends of the links. `open` a schedule, then `turn_to` each action, `take` and `send`, in its order."""

    def __init__(
        self, rank: int, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device, watch: Watch | None = None
    ) -> None:
        """rank: in the pipeline, and in `group`, which has all of its ranks. watch: through which it waits."""
        self._rank, self._group, self._watch = rank, group, watch or Watch()
        self._dtype, self._device = dtype, device
        self._shape: tuple[int, ...] = ()
        self._placement: Placement | None = None
        self._ahead: deque[Round] = deque()
        self._under_way: deque[_Call] = deque()
        self._to_send: dict[tuple[Channel, Chunk], Tensor] = {}
        self._arrived: dict[Chunk, Tensor] = {}
        self._here: dict[Chunk, Tensor] = {}
        self._place = 0

    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None:
        """Begin a schedule, whose tensors all have this shape."""
        self._placement, self._shape, self._place = schedule.placement, shape, 0
        self._ahead = deque(_rounds(schedule)[self._rank])

    def turn_to(self, at: int) -> None:
        """The rank begins the `at`-th action of its list."""
        self._launch(2 * at)

    def reach(self, at: int, moment: float) -> None:
        """Before the `at`-th action: launch what is to come before anything that waits for other ranks at this moment
        of the rounds' clock."""
        self._launch(2 * at, moment)

    def close(self) -> None:
        """Wait until everything sent has left."""
        if self._ahead:
            self._launch(self._ahead[-1].place)
        if self._under_way:
            self._wait(self._under_way[-1], None)
        assert not (self._here or self._to_send or self._arrived)

    def take(self, part: Chunk) -> Tensor | None:
        """What an F or B works on: waits for it. None where tokens or the loss come in."""
        assert self._placement is not None
        made_by = source(self._placement, part)
        if made_by is None:
            return None
        if self._placement.rank_of[made_by.stage] == self._rank:
            return self._here.pop(part)
        for call in self._under_way:
            if part in call.brings:
                self._wait(call, part)
                break
        return self._arrived.pop(part)

    def send(self, part: Chunk, tensor: Tensor | None) -> None:
        """Hand on the result of an F or B; None where a route ends. That of a D leaves at once, others behind their
        action."""
        assert self._placement is not None
        at = {"F": self._placement.after, "B": self._placement.before}[part.kind](part.stage)
        if at is None:
            return
        assert tensor is not None
        target = self._placement.rank_of[at]
        if target == self._rank:
            self._here[Chunk(part.kind, at, part.micro_batch)] = tensor
            return
        self._to_send[Channel(self._rank, target, part.kind), part] = tensor.contiguous()
        self._launch(self._place + 1)

    def _launch(self, place: int, moment: float = math.inf) -> None:
        """Launch all rounds up to this place of the list and this moment."""
        self._place = place - place % 2
        while self._ahead and self._ahead[0].place <= place and self._ahead[0].moment <= moment:
            self._under_way.append(_Call(self._ahead.popleft(), self._group, self._new, self._to_send, self._watch))
            if len(self._under_way) > NUM_UNDER_WAY:
                self._wait(self._under_way[0], None)

    def _new(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def _wait(self, call: _Call, part: Chunk | None) -> None:
        """Wait for a call, and for those before it, which are over by then."""
        waited: _Call | None = None
        while waited is not call:
            waited = self._under_way.popleft()
            waited.wait(self._watch, part if waited is call else None)
            self._arrived |= waited.brings


class _Call:
    """A round under way, with the tensors that it reads and writes."""

    def __init__(
        self,
        each: Round,
        group: dist.ProcessGroup,
        new: Callable[[], Tensor],
        to_send: dict[tuple[Channel, Chunk], Tensor],
        watch: Watch,
    ) -> None:
        self._round, self._group = each, group
        self.brings = {message.consumer: new() for _, message in each.receives}
        self.sent = [to_send.pop((channel, message.producer)) for channel, message in each.sends]
        operations = [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=channel.target)
            for (channel, _), tensor in zip(each.sends, self.sent, strict=True)
        ]
        operations += [
            dist.P2POp(dist.irecv, self.brings[message.consumer], group=group, group_peer=channel.source)
            for channel, message in each.receives
        ]
        self._works = watch.reach(self._need(None), lambda: dist.batch_isend_irecv(operations))

    def wait(self, watch: Watch, part: Chunk | None) -> None:
        """part: what is to work on what the call brings; None where its sends are waited for."""

        def all_of_them() -> None:
            for work in self._works:
                work.wait()

        watch.wait(self._need(part), all_of_them)

    def _need(self, part: Chunk | None) -> Need:
        what = next((message.producer for _, message in self._round.receives if message.consumer == part), None)
        kind = "output" if what is None else "input"
        text = "results to be exchanged with {peers}"
        if what is not None:
            text = f"{CARRIES[what.kind]} of {{what}}, exchanged with {{peers}}"
        return Need(kind, text, self._group, what, self._round.peers)
