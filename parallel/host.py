"""The border between host and device: the only place where the host waits for the device, counted by name.

On a CPU the two are one, and a read costs nothing but is counted all the same. On a GPU the host runs ahead and queues
work; where it needs a number that the device computes (how many rows will arrive) it must wait. A read is therefore
started early, so that the copy is on its way while the host queues other work, and waited for late. The GPU's side has
not yet run on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from parallel.collectives import Steps
from parallel.watch import Mark

T = TypeVar("T")

# Called to obtain the tensors of a read, which may first wait for their communication.
Source = Callable[[], Sequence[Tensor]]


class Reading(Protocol):
    """Numbers on their way to the host."""

    def wait(self) -> list[Any]:
        """The numbers of each tensor, as nested lists. Blocks; to be called once."""
        ...


class Host:
    """The border where host and device are one. `num_reads` counts by the name that every read gives.

    runs_ahead: whether the host queues work that the device does later.
    """

    runs_ahead = False

    def __init__(self) -> None:
        self.num_reads: Counter[str] = Counter()

    def start(self, name: str, source: Source) -> Reading:
        """Begin to read the tensors of `source`, all of one dtype."""
        self.num_reads[name] += 1
        return self._start(source)

    def read(self, name: str, *tensors: Tensor) -> list[Any]:
        """The tensors' numbers, each as a nested list, at once."""
        return self.start(name, lambda: tensors).wait()

    def look(self, number: Tensor) -> float:
        """A number of one element, where host and device are one: nobody waits, and nothing is counted."""
        return float(number.item())

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's, on the device. The host does not wait."""
        return tensor

    def beside(self, way: str, trip: Steps[T], takes: Sequence[Any]) -> Steps[T]:
        """A trip whose work is queued beside what the device computes, not behind it: where the host computes itself,
        the trip as it is.

        way: `F` or `B`, trips of a forward and of a backward, which do not wait for each other. takes: what the trip
        works on. What it returns may be used when it is over, by what is queued from then on.
        """
        return trip

    def pin(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's where `put` takes no time with it. May be called from any thread."""
        return tensor

    def mark(self) -> Mark:
        """Mark the place behind all that the current stream has been given to do: where host and device are one, now.
        The host does not wait."""
        return _Passed()

    def _start(self, source: Source) -> Reading:
        return _Here(source)


class _Passed:
    """Behind what has been done."""

    def passed(self) -> bool:
        return True


class _Event:
    """A mark of a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = stream.record_event()

    def passed(self) -> bool:
        return self._event.query()


class _Here:
    """Reads when asked: a communication that is still under way goes on until then."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def wait(self) -> list[Any]:
        return [tensor.tolist() for tensor in self._source()]


class CudaHost(Host):
    """The border to one GPU. Numbers leave through pinned memory on a stream of their own.

    That stream, not the one that computes, waits for the communication that brings the numbers (a wait for NCCL's work
    makes the current stream wait, never the host), so neither computation nor the host stops until `wait` is called.
    """

    runs_ahead = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._lanes: dict[str, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> Tensor:
        # A copy from memory that is not pinned would wait for everything queued before it.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def beside(self, way: str, trip: Steps[T], takes: Sequence[Any]) -> Steps[T]:
        """On a stream of its own, which waits once for what has been queued so far, and which what is queued when the
        trip is over waits for. Its kernels are few and short and communication waits for them, so they go first."""
        if way not in self._lanes:
            self._lanes[way] = torch.cuda.Stream(self._device, priority=-1)
        lane = self._lanes[way]
        lane.wait_stream(torch.cuda.current_stream(self._device))
        # Memory belongs to the stream that it was taken on; another one that uses it must be known to the allocator.
        _keep_for(lane, takes)
        while True:
            with torch.cuda.stream(lane):
                try:
                    slot = next(trip)
                except StopIteration as end:
                    result = end.value
                    break
            yield slot
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(lane)
        _keep_for(now, (result,))
        return result

    def pin(self, tensor: Tensor) -> Tensor:
        with torch.cuda.device(self._device):  # a thread begins on the first one
            return tensor.pin_memory()

    def mark(self) -> Mark:
        return _Event(torch.cuda.current_stream(self._device))

    def _start(self, source: Source) -> Reading:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            tensors = source()
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            landed = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            landed.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Landing(tensors, landed, event)


class _Landing:
    """Waits for the event behind the copy. Keeps the sources until then: other streams could be given their memory."""

    def __init__(self, tensors: Sequence[Tensor], landed: Tensor, event: torch.cuda.Event) -> None:
        self._tensors, self._landed, self._event = tensors, landed, event

    def wait(self) -> list[Any]:
        self._event.synchronize()
        sizes = [tensor.numel() for tensor in self._tensors]
        parts = zip(self._landed.split(sizes), self._tensors, strict=True)
        numbers = [part.view(tensor.shape).tolist() for part, tensor in parts]
        self._tensors = ()
        return numbers


def _keep_for(stream: torch.cuda.Stream, values: Sequence[Any]) -> None:
    """Memory of these tensors is given out again only behind what the stream has been given to do until it is freed."""
    for tensor in _tensors_in(values):
        tensor.record_stream(stream)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, also in sequences and dataclasses within it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))


def host_of(device: torch.device) -> Host:
    """The border of a rank that computes on this device."""
    return CudaHost(device) if device.type == "cuda" else Host()
