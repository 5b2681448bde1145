"""Carries out any verified schedule; knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from parallel.collectives import Steps
from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.completion import completions
from parallel.pipeline.overlap import HOST_COMPUTES, Overlap, interleave
from parallel.pipeline.schedule import Schedule


class StageWork(Protocol):
    """A slice of the model at work. Forward and backward are generators that stop in a slot of every communication."""

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor | None]:
        """x: what the stage before sent, None at the first. Returns what the next one needs, None at the last."""
        ...

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor | None]:
        """The gradient of `forward`'s output in, of its input out. Weight gradients are kept."""
        ...

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        """Take weight gradients that the backward of this micro-batch has left so far, the oldest first: all, or this
        share of them, rounded up to whole ones. Returns how many still wait."""
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
        overlap: Overlap = HOST_COMPUTES,
        fence: Callable[[int], object] = lambda _: None,
    ) -> None:
        """overlap: what stands beside what in a pair, and in a pass alone. fence: called with a stage before each of
        its forwards: its weights are whole from there on."""
        self._rank, self._stages, self._links, self._recorder = rank, stages, links, recorder
        self._overlap, self._fence = overlap, fence
        # The backward of a pair whose last weight gradients wait for the next action, whose first communication has
        # little else beside it.
        self._left: Chunk | None = None

    def run(self, schedule: Schedule, shape: tuple[int, ...], complete: Callable[[int], object] | None = None) -> None:
        """Do this rank's list from its first action to its last; stages hand on tensors of `shape`.

        complete: called with the position of each slice of the model once no rank has any more of its gradients to
        add, as `completions` says.
        """
        actions, self._left = schedule.ranks[self._rank], None
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
            if at + 1 in done or at + 1 == len(actions):
                self._take_weights(None, 1)  # the last ones of a slice may be among those left
            self._recorder.end()
        tell(len(actions))
        self._links.close()

    def _do(self, action: Action) -> None:
        if isinstance(action, Pair):
            interleave(
                self._overlap,
                self._backward(action.backward),
                self._forward(action.forward),
                partial(self._take_weights, action.backward),
            )
            # Left before, and too much to stand beside this pair.
            self._take_weights(None, 1)
            self._left = action.backward
        elif action.kind == "F":
            interleave(self._overlap, forward=self._forward(action), take_weights=partial(self._take_weights, None))
        elif action.kind == "B":
            interleave(self._overlap, self._backward(action), take_weights=partial(self._take_weights, None))
        elif action.kind == "D":
            interleave(self._overlap, self._backward(action), take_weights=partial(self._take_weights, action))
        else:
            self._recorder.started()
            self._take_weights(action, 1)

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

    def _take_weights(self, chunk: Chunk | None, share: float) -> None:
        """Weight gradients in a gap: a share of what is left of the backward before, or else of what this one has left;
        all means all of both."""
        left = self._left
        if left is not None:
            self._recorder.started()
            if not self._stages[left.stage].weight_gradients(left.micro_batch, share):
                self._left = None
        if chunk is not None and (left is None or share == 1):
            self._stages[chunk.stage].weight_gradients(chunk.micro_batch, share)
