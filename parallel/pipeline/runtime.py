"""Carries out any verified schedule; knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from parallel.collectives import Steps, drive
from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.completion import completions
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.segments import interleave


class StageWork(Protocol):
    """A slice of the model at work. Forward and backward are generators that yield at every communication."""

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor | None]:
        """x: what the stage before sent, None at the first. Returns what the next one needs, None at the last."""
        ...

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor | None]:
        """The gradient of `forward`'s output in, of its input out. Weight gradients are kept."""
        ...

    def weight_gradients(self, micro_batch: int) -> None:
        """Take all weight gradients that the backward of this micro-batch has left so far."""
        ...


class Ends(Protocol):
    """A rank's ends of the links to its neighbours: `links.Links` in a run."""

    def open(self, schedule: Schedule, shape: tuple[int, ...]) -> None: ...

    def close(self) -> None: ...

    def turn_to(self, at: int) -> None: ...

    def reach(self, at: int, moment: float) -> None: ...

    def take(self, part: Chunk) -> Any: ...

    def send(self, part: Chunk, tensor: Any) -> None: ...


class Listener(Protocol):
    """Told of what the rank does: `record.Recorder` in a run."""

    def begin(self, action: Action) -> None: ...

    def started(self) -> None: ...

    def end(self) -> None: ...


class Runtime:
    """One rank of a pipeline: its stages by number, and its links to the neighbours."""

    def __init__(
        self,
        rank: int,
        stages: Mapping[int, StageWork],
        links: Ends,
        recorder: Listener,
        fence: Callable[[int], object] = lambda _: None,
    ) -> None:
        """fence: called with a stage before each of its forwards: its weights are whole from there on."""
        self._rank, self._stages, self._links, self._recorder, self._fence = rank, stages, links, recorder, fence

    def run(self, schedule: Schedule, shape: tuple[int, ...], complete: Callable[[int], object] | None = None) -> None:
        """Do this rank's list from its first action to its last; stages hand on tensors of `shape`.

        complete: called with the position of each slice of the model once no rank has any more of its gradients to
        add, as `completions` says.
        """
        actions = schedule.ranks[self._rank]
        done = completions(schedule)[self._rank] if complete else {}

        def tell(at: int) -> None:
            for moment, position in done.get(at, ()):
                assert complete is not None
                self._links.reach(at, moment)
                complete(position)

        self._links.open(schedule, shape)
        for at, action in enumerate(actions):
            tell(at)
            self._recorder.begin(action)
            self._links.turn_to(at)
            self._do(action)
            self._recorder.end()
        tell(len(actions))
        self._links.close()

    def _do(self, action: Action) -> None:
        if isinstance(action, Pair):
            interleave(self._full_backward(action.backward), self._forward(action.forward))
        elif action.kind == "F":
            drive(self._forward(action))
        elif action.kind == "B":
            drive(self._backward(action))
        elif action.kind == "D":
            drive(self._full_backward(action))
        else:
            self._recorder.started()
            self._stages[action.stage].weight_gradients(action.micro_batch)

    def _forward(self, chunk: Chunk) -> Steps[None]:
        x = self._links.take(chunk)
        self._fence(chunk.stage)
        self._recorder.started()
        y = yield from self._stages[chunk.stage].forward(chunk.micro_batch, x)
        self._links.send(chunk, y)

    def _backward(self, chunk: Chunk) -> Steps[None]:
        part = chunk.parts[0]
        dy = self._links.take(part)
        self._recorder.started()
        dx = yield from self._stages[part.stage].backward(part.micro_batch, dy)
        # Before any weight gradient that still waits: the neighbour needs it now.
        self._links.send(part, dx)

    def _full_backward(self, chunk: Chunk) -> Steps[None]:
        """Weight gradients are taken while the communication just launched is on its way."""
        stage = self._stages[chunk.stage]
        for _ in self._backward(chunk):
            stage.weight_gradients(chunk.micro_batch)
            yield
        stage.weight_gradients(chunk.micro_batch)
