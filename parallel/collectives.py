"""Asynchronous collectives with a handle, and sums whose order is fixed.

On gloo (CPU) everything is built from point-to-point messages, every receive posted before the first send: gloo sends
the receiver's "ready" notice over the connection that carries the payload, so a receive posted after a send waits
behind one's own payload and the two directions of a link run one after the other, as they do in gloo's
`all_to_all_single`. On every other backend (NCCL) the library's own collectives are used.

On NCCL an operation runs on a stream of its group, which first waits for what is queued on the current one: to start is
to queue. `Queued.wait` makes the current stream wait, by an event, and never the host; so it is called as late as on a
CPU, and what is queued between start and wait runs beside the operation. Until then the handle holds the operation's
tensors, and after it their memory is given out again in the order of the current stream. This has not yet run on a GPU.

All ranks of a group must launch the same operations in the same order. A tensor handed to an operation must not change
before its handle has been waited for. Code that overlaps communication is written as a generator that yields while
what it has launched is on its way, and yields the name of the slot in which it then stands; `drive` runs one to its
end, and `parallel.pipeline.overlap` two of them beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.torch_names import all_gather_single, reduce_scatter_single

T = TypeVar("T")
# `train.model.tape` has this type and `drive` as well, as neither floor imports the other.
Steps = Generator[str, None, T]


def drive(steps: Steps[T]) -> T:
    """Run a generator of communication steps to its end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


class Handle:
    """A communication under way. Holds its tensors and requests until `wait`, which may be called again."""

    def __init__(
        self, works: Sequence[Any], keep: Sequence[Tensor], finish: Callable[[], Tensor], peers: Sequence[int] = ()
    ) -> None:
        """peers: of each of the works, the rank of the group at its other end; empty where each has several."""
        self._works, self._peers, self._at = works, peers, 0
        self._keep: Sequence[Tensor] = keep
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """The result, after everything sent from and received into this rank's tensors is complete.

        Raises RuntimeError when a peer's connection broke or the group's timeout passed.
        """
        if self._finish is not None:
            for at, work in enumerate(self._works):
                self._at = at
                work.wait()
            self._result = self._finish()
            self._works, self._keep, self._finish = (), (), None
        assert self._result is not None
        return self._result

    def waits_for(self) -> int | None:
        """The rank of the group that `wait` waits for now; None where it waits for all at once."""
        return self._peers[self._at] if self._peers else None


class Queued(Handle):
    """An operation of the library's on a stream of its own (NCCL).

    `wait` makes the current stream wait for it, once for each stream: who waits again on the same one finds it done,
    and another one may not read the result before it has waited, too.
    """

    def __init__(self, work: dist.Work, keep: Sequence[Tensor], result: Tensor) -> None:
        super().__init__([work], keep, lambda: result)
        self._work, self._streams = work, set[object]()

    def wait(self) -> Tensor:
        """The result, which what is queued on the current stream from here on may use."""
        result = self._result if self._result is not None else super().wait()
        stream = current_stream(result)
        if stream not in self._streams:
            if self._streams:
                self._work.wait()
            self._streams.add(stream)
        return result


def current_stream(tensor: Tensor) -> object:
    """The stream of a tensor's device that is queued to now; the same one for all where there are none."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


# Backends whose collectives are built here from messages: gloo, and groups that stand for gloo's where nothing is sent.
BY_MESSAGES = ("gloo", "fake_gloo")


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return dist.get_backend(group) in BY_MESSAGES


def _post(
    receive: Sequence[Tensor], send: Sequence[Tensor], group: dist.ProcessGroup
) -> tuple[list[dist.Work | None], list[int]]:
    """Post one receive from, then one send to, every other rank of the group; empty tensors are left out.

    Returns what was posted and with whom. Peers are met in a rotated order, so that at any time the ranks send to
    different peers.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    sources = [peer for i in range(1, size) if receive[peer := (me - i) % size].numel()]
    targets = [peer for i in range(1, size) if send[peer := (me + i) % size].numel()]
    works = [dist.irecv(receive[peer], group=group, group_src=peer) for peer in sources]
    works += [dist.isend(send[peer], group=group, group_dst=peer) for peer in targets]
    return works, sources + targets


def exchange(send: Tensor, send_counts: list[int], recv_counts: list[int], group: dist.ProcessGroup) -> Handle:
    """Uneven all-to-all along dim 0.

    send: [sum(send_counts), ...], the rows for rank 0 of the group first. The handle's result, [sum(recv_counts), ...],
    holds the rows from rank 0 first. `recv_counts[i]` must equal rank i's `send_counts[this rank]`.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    assert len(send_counts) == len(recv_counts) == size and send_counts[me] == recv_counts[me]
    assert sum(send_counts) == send.shape[0], (send_counts, send.shape)
    send = send.contiguous()
    received = send.new_empty((sum(recv_counts), *send.shape[1:]))
    if not _is_gloo(group):
        work = dist.all_to_all_single(received, send, recv_counts, send_counts, group=group, async_op=True)
        return Queued(work, (send, received), received)
    outgoing, incoming = send.split(send_counts), received.split(recv_counts)
    works, peers = _post(incoming, outgoing, group)
    incoming[me].copy_(outgoing[me])
    return Handle(works, (send, received), lambda: received, peers)


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Handle:
    """counts: integers [group size, ...], row i for rank i. The handle's result has in row i what rank i had for us."""
    ones = [1] * counts.shape[0]
    return exchange(counts, ones, ones, group)


def reduce_scatter(flat: Tensor, group: dist.ProcessGroup, numels: Sequence[int] | None = None) -> Handle:
    """Sum `flat` [n] over the group; the handle's result, 1-D, is this rank's piece of the sum.

    numels: elements of each rank's piece, in rank order; None for equal ones.

    Each rank receives all pieces of its own part and adds them in rank order (bf16: in fp32, rounded once), so the sum
    depends on nothing but the values. Raises ValueError when equal pieces are asked for and the group's size does not
    divide n.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    if numels is None and (flat.dim() != 1 or flat.numel() % size):
        raise ValueError(f"reduce_scatter of {tuple(flat.shape)}: {size} ranks must divide a one-dimensional tensor")
    sizes = [flat.numel() // size] * size if numels is None else list(numels)
    assert len(sizes) == size and sum(sizes) == flat.numel(), (sizes, flat.shape)
    flat = flat.contiguous()
    own = flat.split(sizes)
    if not _is_gloo(group):
        piece = flat.new_empty(sizes[me])
        if len(set(sizes)) == 1:
            work = reduce_scatter_single(piece, flat, group=group, async_op=True)
        else:
            work = dist.reduce_scatter(piece, list(own), group=group, async_op=True)
        return Queued(work, (flat, piece), piece)
    parts = flat.new_empty(size, sizes[me])
    works, peers = _post(parts.unbind(), own, group)
    parts[me].copy_(own[me])
    return Handle(works, (flat, parts), lambda: _sum_in_order(parts), peers)


def all_gather(
    shard: Tensor, group: dist.ProcessGroup, out: Tensor | None = None, numels: Sequence[int] | None = None
) -> Handle:
    """The handle's result, [sum(numels), ...], holds every rank's `shard` [n, ...] in rank order.

    It is `out` where one is given; `shard` may be this rank's part of it.

    numels: rows of each rank's shard, in rank order; None: all have as many as this rank's.
    """
    size, me = dist.get_world_size(group), dist.get_rank(group)
    shard = shard.contiguous()
    sizes = [shard.shape[0]] * size if numels is None else list(numels)
    gathered = shard.new_empty((sum(sizes), *shard.shape[1:])) if out is None else out
    parts = gathered.split(sizes)
    if not _is_gloo(group):
        if len(set(sizes)) == 1:
            work = all_gather_single(gathered, shard, group=group, async_op=True)
        else:
            work = dist.all_gather(list(parts), shard, group=group, async_op=True)
        return Queued(work, (shard, gathered), gathered)
    works, peers = _post(parts, [shard] * size, group)
    if parts[me].data_ptr() != shard.data_ptr():
        parts[me].copy_(shard)
    return Handle(works, (shard, gathered), lambda: gathered, peers)


def _sum_in_order(parts: Tensor) -> Tensor:
    """parts [ranks, n] -> [n], added from the first row to the last; 16-bit floats in fp32, rounded once."""
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32)) if _is_short(parts) else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _is_short(x: Tensor) -> bool:
    return x.is_floating_point() and x.element_size() < 4
