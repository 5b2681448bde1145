"""What a pass does, written down as events while it runs: operations, memory, communications, reads, turns, names.

A `Recorder` sees every operation that torch is asked for while it is on. Names of pieces come from the records on which
a stage writes its passes (`Recorder.tapes`), communications from the rank's `Watch` (`Recorder.watch`), reads from the
host's border (`Recorder.read`). Nothing of it is known to the code that trains.

Backward passes run on the calling thread, as autograd does wherever tensors lie in the host's memory; so their events
come in order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from launch.plan.events import Answer, Aside, Back, Calls, Enter, Event, Kernel, Launch, Memory, Read, Turn, Wait
from launch.plan.messages import message_of
from launch.plan.names import Piece, tapes
from launch.plan.nearness import Nearness
from launch.plan.operations import kernel_of, tensors_of
from parallel.collectives import Steps
from parallel.host import Source
from parallel.pipeline.segments import Name
from parallel.torch_names import TorchDispatchMode
from parallel.watch import Need, Watch
from train.assemble import Tapes

T = TypeVar("T")

# What an allocator of device memory rounds up to, in bytes.
ROUNDING_BYTES = 512
# Nodes whose tensors are rows on their way between ranks.
_TRAVEL = ("dispatch", "combine")
# They give out what they are given, or what the host holds, and do not say so.
_NO_BIRTHS = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh"}
_NOWHERE = Name("stage", 0, "stage")


@dataclass
class _Storage:
    """Memory that a recording saw taken."""

    num_bytes: int
    label: str
    born: Piece
    died: Piece | None = None


@dataclass(frozen=True)
class _Taken:
    storage: _Storage


@dataclass(frozen=True)
class _Freed:
    storage: _Storage


@dataclass
class _Called:
    """Operations called so far without anything between them."""

    number: int = 0


class Entry(NamedTuple):
    """An event and where it is from; of memory that is given back, also where it was taken."""

    piece: Piece
    event: Event
    taken: Piece | None = None


class Recorder(TorchDispatchMode):
    """Writes down what happens inside of `on`."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[Piece, Event | _Taken | _Freed | _Called]] = []
        self._piece = Piece(_NOWHERE, "F", 0, 0)
        self._is_on = False
        self._num_turns = self._num_visits = self._num_communications = self._num_reads = 0
        self._called: _Called | None = None
        self._near = Nearness()
        self._storages: dict[int, tuple[weakref.ref[Any], _Storage | None]] = {}
        self._messages: list[tuple[str, int, int]] | None = None
        self._brought: list[int] | None = None
        self._pending: dict[int, tuple[Need, int]] = {}

    # --- what others hold of it

    def tapes(self) -> Tapes:
        """What a stage is to write its passes on, so that this recorder hears the names of their pieces."""
        return tapes(self)

    def watch(self, name: str) -> Watch:
        """A rank's watch that tells this recorder of all communications."""
        return _TellingWatch(self, name)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, everything is written down; memory that was taken before is not seen. Communications and reads are
        numbered anew."""
        self._num_communications = self._num_reads = 0
        with self:
            self._is_on = True
            try:
                yield
            finally:
                self._is_on = False

    # --- what is told

    def begins(self, name: Name, kind: str, turn: int | None = None) -> None:
        """A piece begins; what is not in a node is in one that is called as its layer."""
        self._num_visits += 1
        turn = self._num_turns if turn is None else turn
        name = name if name.node else name._replace(node=name.layer)
        self._piece, self._called = Piece(name, kind, turn, self._num_visits), None

    @property
    def piece(self) -> Piece:
        """The piece that has begun last."""
        return self._piece

    @property
    def num_turns(self) -> int:
        """Turns given since `start_pass`."""
        return self._num_turns

    def start_pass(self) -> None:
        """From here on turns are counted anew."""
        self._num_turns, self._called = 0, None

    def drive(self, steps: Steps[T]) -> T:
        """Run a pass to its end, with a `Turn` wherever it gives way."""
        self.start_pass()
        while True:
            try:
                slot = next(steps)
            except StopIteration as end:
                return end.value
            self._add(Turn(slot))
            self._num_turns += 1

    def resume(self, piece: Piece) -> None:
        """A pass that had given way goes on in the piece in which it stood."""
        self._piece, self._called = piece, None

    def read(self, source: Source) -> tuple[int, list[tuple[int, ...]]]:
        """Numbers are set out for the host. Returns the read's number and the shapes of what `source` gives."""
        self._brought, before = [], self._brought
        try:
            shapes = [tuple(tensor.shape) for tensor in source()]
            after = self._brought[-1] if self._brought else None
        finally:
            self._brought = before
        self._num_reads += 1
        self._add(Read(self._num_reads, after))
        return self._num_reads, shapes

    def beside(self, way: str, trip: Steps[T]) -> Steps[T]:
        """A trip whose work a device does on a stream of its own."""
        first = True
        while True:
            self._add(Aside(way, first))
            first = False
            try:
                slot = next(trip)
            except StopIteration as end:
                self._add(Back(way, last=True))
                return end.value
            self._add(Back(way, last=False))
            yield slot

    def answer(self, number: int) -> None:
        """The host waits for a read."""
        self._add(Answer(number))

    def launched(self, need: Need, call: Callable[[], T]) -> T:
        """Do `call`, whose messages are one communication that `need` will be waited for with."""
        self._messages, before = [], self._messages
        try:
            result = call()
            messages = self._messages
        finally:
            self._messages = before
        if messages and self._is_on:
            self._num_communications += 1
            # A need is told from its equals by being itself, and kept so that no other takes its place.
            self._pending[id(need)] = need, self._num_communications
            self._add(self._launch(need, messages))
        return result

    def waits(self, need: Need) -> None:
        """The result of a communication is needed; of one that has been waited for, again, nothing is written."""
        found = self._pending.pop(id(need), None)
        if found is None:
            return
        if self._brought is not None:  # the border waits for it, not the device's computation
            self._brought.append(found[1])
        else:
            self._add(Wait(found[1]))

    def _launch(self, need: Need, messages: Sequence[tuple[str, int, int]]) -> Launch:
        assert need.group is not None
        kind = need.group.group_desc.split()[0]
        sent, received = sum(each[1] for each in messages), sum(each[2] for each in messages)
        name = messages[0][0] if kind == "link" or len(messages) == 1 else "exchange"
        if kind != "link" and messages[0][0] in ("send", "receive"):
            name = _NAMES.get(need.text.split(" from")[0], "exchange")
        return Launch(self._num_communications, name, kind, dist.get_world_size(need.group), sent, received)

    # --- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._is_on or func.namespace == "prim":
            return out
        if func.namespace == "c10d":
            if self._messages is not None:
                self._messages.append(message_of(func, args, kwargs))
            return out
        self._call()
        if not func.is_view and func._schema.name not in _NO_BIRTHS:
            self._births(out, func)
        kernel = kernel_of(func, args, kwargs, out)
        if kernel is not None:
            far_bytes = self._near.far_bytes(tensors_of([args, list(kwargs.values()), out]))
            self._add(replace(kernel, far_bytes=far_bytes))
        return out

    def _births(self, out: Any, func: Any) -> None:
        returns = func._schema.returns
        for described, value in zip(returns, out if len(returns) > 1 else (out,), strict=False):
            if described.alias_info is None:  # else it is an operand that was written
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                        self._birth(tensor, func)

    def _birth(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        num_bytes = -(-storage.nbytes() // ROUNDING_BYTES) * ROUNDING_BYTES
        if not num_bytes:
            return
        self._near.born(key, num_bytes)
        dtype, op = str(tensor.dtype).removeprefix("torch."), func._schema.name.split("::")[1]
        taken = _Storage(num_bytes, f"{list(tensor.shape)} {dtype}, {op}", self._piece)
        self._storages[key] = weakref.ref(storage, partial(self._death, key)), taken
        self._entries.append((self._piece, _Taken(taken)))

    def _death(self, key: int, _: Any) -> None:
        _, storage = self._storages.pop(key)
        if storage is not None:
            self._near.died(key, storage.num_bytes)
        if storage is not None and self._is_on:
            storage.died = self._piece
            self._entries.append((self._piece, _Freed(storage)))

    def _call(self) -> None:
        if self._called is None:
            self._called = _Called()
            self._entries.append((self._piece, self._called))
        self._called.number += 1

    def _add(self, event: Event) -> None:
        if self._is_on:
            self._entries.append((self._piece, event))
            if not isinstance(event, Kernel):
                self._called = None

    # --- what came of it

    @property
    def num_entries(self) -> int:
        """How much has been written down: for `entries`."""
        return len(self._entries)

    def entries(self, start: int = 0, stop: int | None = None) -> list[Entry]:
        """What was written down, memory under the component that it turned out to be."""
        return [
            Entry(piece, _settled(event), event.storage.born if isinstance(event, _Freed) else None)
            for piece, event in self._entries[start:stop]
        ]

    def live_bytes(self) -> int:
        """Memory that was taken in this recording and has not been given back."""
        return sum(storage.num_bytes for _, storage in self._storages.values() if storage is not None)


# By what a need says: collectives that are built from messages have no name of their own.
_NAMES = {
    "the gradients": "reduce_scatter",
    "the weights": "all_gather",
    "the squared norms of gradients": "all_gather",
    "numbers": "all_gather",
    "counts": "all_reduce",
}


def _settled(event: Event | _Taken | _Freed | _Called) -> Event:
    if isinstance(event, _Called):
        return Calls(event.number)
    if isinstance(event, _Taken):
        return Memory(event.storage.num_bytes, _component(event.storage), event.storage.label)
    if isinstance(event, _Freed):
        return Memory(-event.storage.num_bytes, _component(event.storage), event.storage.label)
    return event


def _component(storage: _Storage) -> str:
    """Where a storage was made says what it is, and where it went."""
    born, died = storage.born, storage.died
    if born.name.node == "loss" and born.kind == "F":
        return "logits"
    if born.name.node in _TRAVEL:
        return "dispatch"
    if died is not None and died.visit == born.visit:
        return "work"
    if born.kind == "F":
        return "activations"
    # A gradient that outlives the backward of its layer waits for a weight gradient.
    return "kept" if died is None or died.kind == "W" else "gradients"


def events_of(entries: Sequence[Entry]) -> tuple[Event, ...]:
    """Events with an `Enter` wherever the piece changes, where a weight gradient begins, and behind a turn."""
    found: list[Event] = []
    before: tuple[Enter, int] | None = None
    for piece, event, _ in entries:
        enter = Enter(piece.name.layer, piece.name.node, piece.kind)
        here = enter, piece.visit if piece.kind == "W" else 0
        if here != before:
            found.append(enter)
            before = here
        found.append(event)
        if isinstance(event, Turn):
            before = None
    return tuple(found)


class _TellingWatch(Watch):
    """A watch that tells a recorder of communications."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        super().__init__(name)
        self._recorder = recorder

    def reach(self, need: Need, call: Callable[[], T]) -> T:
        return super().reach(need, lambda: self._recorder.launched(need, call))

    def wait(self, need: Need, call: Callable[[], T], peer: Callable[[], int | None] | None = None) -> T:
        result = super().wait(need, lambda: self._recorder.launched(need, call), peer)
        self._recorder.waits(need)
        return result
