"""A moving average of the weights in CPU memory, updated beside training (technical report, section 3.2.3).

Each rank averages the master weights it owns, so all ranks together hold every average once (or as often as the
masters). A thread of its own reads the masters while the next step's forward and backward run; `wait` stands before
everything that changes masters or reads averages.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from train.checkpoint.ranges import HostRange, Pieces

PREFIX, MASTER = "ema.", "master."
# Elements at a time: fewer than torch spreads over several threads, which would take cores from the training itself.
_CHUNK = 1 << 15
# Elements of a pinned buffer: long enough for a copy at full speed, short beside what a rank averages.
_STAGED = 1 << 22


class Source(Protocol):
    """How masters come to the host."""

    def ready(self) -> None:
        """Masters are now as they are to be read. Called in the thread that has changed them."""
        ...

    def pieces(self, master: Tensor) -> Iterator[Tensor]:
        """A master [n] as runs of it in CPU memory, in order, each to be used before the next is asked for."""
        ...


class Here:
    """They lie in CPU memory."""

    def ready(self) -> None: ...

    def pieces(self, master: Tensor) -> Iterator[Tensor]:
        yield master


class Pinned:
    """From a GPU through two buffers of pinned memory, of which one is filled while the other is read.

    Copies run on one stream of their own, behind the optimizer's kernels and beside the next step's. Not yet run on a
    GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = self._new_stream(device)
        self._homes = [self._new_home(), self._new_home()]

    def ready(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def pieces(self, master: Tensor) -> Iterator[Tensor]:
        before: tuple[torch.cuda.Event, Tensor] | None = None
        for number, piece in enumerate(master.split(_STAGED)):
            home = self._homes[number % 2].view(piece.dtype)[: piece.numel()]
            copied = self._copy(piece, home)
            if before is not None:
                before[0].synchronize()
                yield before[1]
            before = copied, home
        if before is not None:
            before[0].synchronize()
            yield before[1]

    def _new_stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.Stream(device)

    def _new_home(self) -> Tensor:
        return torch.empty(_STAGED, dtype=torch.float64, pin_memory=True)  # as wide as any master

    def _copy(self, piece: Tensor, home: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):  # and its device: a thread begins on the first one
            home.copy_(piece, non_blocking=True)
            return self._stream.record_event()


class Ema:
    """ema = decay * ema + (1 - decay) * master after every optimizer step; it begins as the masters it is made with."""

    def __init__(self, masters: Pieces, decay: float, source: Source | None = None) -> None:
        """masters: "master.NAME" to this rank's ranges, as `ZeroOptimizer.state` gives them; others are ignored.

        source: how they come to the host; None is as their device needs.
        """
        self._weight = 1 - decay
        self._masters = {name: parts for name, parts in masters.items() if name.startswith(MASTER)}
        self._averages = {
            name: [HostRange(part.offset, part.tensor.detach().to("cpu", copy=True)) for part in parts]
            for name, parts in self._masters.items()
        }
        device = next((part.tensor.device for parts in self._masters.values() for part in parts), torch.device("cpu"))
        self._source = source or (Pinned(device) if device.type == "cuda" else Here())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Take in the masters as they are now, in the background. They must not change before `wait`."""
        self.wait()
        self._source.ready()
        self._thread = threading.Thread(target=self._run, name="ema")
        self._thread.start()

    def wait(self) -> None:
        """Until the averages are up to date. Raises what went wrong in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def state(self) -> Pieces:
        """Averages as ranges of global tensors, "ema.NAME": views, of which writing loads them. Waits."""
        self.wait()
        return {PREFIX + name.removeprefix(MASTER): parts for name, parts in self._averages.items()}

    @staticmethod
    def sizes(master_sizes: Mapping[str, int]) -> dict[str, int]:
        """Elements of each average's global tensor, from those of all states, of which masters count."""
        return {
            PREFIX + name.removeprefix(MASTER): size for name, size in master_sizes.items() if name.startswith(MASTER)
        }

    def _run(self) -> None:
        try:
            self._update()
        except BaseException as error:
            self._error = error

    @torch.no_grad()
    def _update(self) -> None:
        for name, parts in self._masters.items():
            for master, average in zip(parts, self._averages[name], strict=True):
                first = 0
                for values in self._source.pieces(master.tensor):
                    old = average.tensor[first : first + values.numel()]
                    for piece, into in zip(values.split(_CHUNK), old.split(_CHUNK), strict=True):
                        into.lerp_(piece, self._weight)
                    first += values.numel()
