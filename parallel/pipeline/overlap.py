"""Which piece of a backward stands beside which communication of a forward, and the reverse: tables, and their reader.

A pass stops wherever a communication of its is under way, in a slot that has a name: the node of the layer whose trip
it is, and which leg of the trip.

    departure   nothing yet: the rows of a backward's trip are ready to leave
    counts      the numbers of rows that will travel: of a dispatch in the forward alone
    first hop   rows on a hop that another one follows: between nodes on the way out, inside a node on the way home
    last hop    rows on the hop that ends the trip; of a trip with a single hop, that one

A line of a table lets one pass go on from one slot, if that is where it stands: it waits for what is under way there,
computes what follows, launches what comes next and stops in the next slot. Or it takes weight gradients that the
backward has left. So a table, read from top to bottom and again from the top, is the order in which a rank issues two
passes, and what lies between the launch of a slot and the line that goes on from it is what hides it. What is computed:

    B combine last hop       experts of the backward
    F dispatch last hop      experts of the forward
    B dispatch last hop      attention of the backward
    F combine last hop       attention of the forward's next layer

The order depends on the tables and on the slots of the two passes, and on nothing that differs between the ranks of an
expert group or between one run and the next. So all of them launch their communications in one order, which is what
keeps them from waiting for each other in a circle; and weight gradients are added in the order in which backward passes
left them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from parallel.collectives import Steps


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        who: `F` or `B`, the pass that goes on; `W`, weight gradients are taken.
        slot: where a pass must stand to go on; None for a pass wherever it stands, or to begin it.
        share: of the weight gradients that wait, the first ones, rounded up to whole ones.
    """

    who: str
    slot: str | None = None
    share: float = 1.0


def lines(*texts: str) -> tuple[Line, ...]:
    """Lines as text: `F` to begin a pass, `F dispatch counts`, `W` for all weight gradients that wait, `W half`."""
    weights = {"W": Line("W"), "W half": Line("W", share=0.5)}
    return tuple(weights.get(text) or Line(text[0], text[2:] or None) for text in texts)


@dataclass(frozen=True)
class Overlap:
    """The tables of one kind of device.

    Attributes:
        opening: how the passes of a pair are begun. A backward opens with a communication, a forward with computation,
            and what the one has launched is under way beside the other; so are the weight gradients that are left from
            before.
        pair: for a forward and a backward that run together.
        opening_alone: how a pass by itself is begun. It may have to wait for a neighbour, and what is left from before
            is done first.
        alone: for a pass by itself, and for the rest of a pair when one of the two is over.
    """

    opening: tuple[Line, ...]
    pair: tuple[Line, ...]
    opening_alone: tuple[Line, ...]
    alone: tuple[Line, ...]


_OPENING = lines("B", "B combine departure", "W half", "F")
_OPENING_ALONE = lines("W", "B", "F")
# A backward hides its longer hop, the one between nodes, behind weight gradients: the first of a way out, the last of a
# way home. A forward has nothing to hide behind.
_ALONE = lines(
    *("F combine first hop", "F combine last hop"),
    *("F dispatch counts", "F dispatch first hop", "F dispatch last hop"),
    "B combine departure",
    "W",
    *("B combine first hop", "B combine last hop"),
    *("B dispatch departure", "B dispatch first hop"),
    "W",
    "B dispatch last hop",
)

# DeepSeek-V3's figure of a pair (arXiv 2412.19437, figure 4), with half of the weight gradients behind each piece of
# the forward, where the host computes itself. A hop is planned and launched by the host, between two pieces of
# computing; so what lies between two lines of a trip is all that can hide a hop. Counts are a few bytes: rows that left
# half a layer later would cost more than standing still for them.
HOST_COMPUTES = Overlap(
    _OPENING,
    lines(
        "F dispatch counts",
        "B combine first hop",
        "W",
        "B combine last hop",  # experts of the backward
        "B dispatch departure",
        "F dispatch first hop",
        "W half",
        "B dispatch first hop",
        "F dispatch last hop",  # experts of the forward
        "W",
        "F combine first hop",
        "B dispatch last hop",  # attention of the backward
        "B combine departure",
        "W half",
        "F combine last hop",  # attention of the forward's next layer
    ),
    _OPENING_ALONE,
    _ALONE,
)

# The same figure where the host queues work for a device and trips run on streams of their own (`Host.beside`). The
# order of computing is the same. The host has queued the backward's experts before it stands still for counts, and the
# rows of the forward leave before the backward's, which are computed later: a group's communications run in the order
# in which they are launched. A trip's second hop is queued right behind its first.
HOST_AHEAD = Overlap(
    _OPENING,
    lines(
        "B combine first hop",
        "W",
        "B combine last hop",
        *("F dispatch counts", "F dispatch first hop"),
        *("B dispatch departure", "B dispatch first hop"),
        "W half",
        *("F dispatch last hop", "F combine first hop"),
        "W",
        "B dispatch last hop",
        *("B combine departure", "B combine first hop"),
        "W half",
        "F combine last hop",
    ),
    _OPENING_ALONE,
    _ALONE,
)


def overlap_of(runs_ahead: bool) -> Overlap:
    """The tables of a device whose host runs ahead of it, or computes itself."""
    return HOST_AHEAD if runs_ahead else HOST_COMPUTES


def interleave(
    overlap: Overlap,
    backward: Steps[Any] | None = None,
    forward: Steps[Any] | None = None,
    take_weights: Callable[[float], object] = lambda share: None,
) -> tuple[Any, Any]:
    """Run a backward, a forward, or both to their ends as the tables say; returns what they return.

    take_weights: does a share of the weight gradients that wait, the oldest first. What the backward of a pair leaves
    at last still waits at the end, to stand beside the first communication of what comes next, if the backward itself
    has had any. A slot that no line names is gone on from at the end of each round through the table.
    """
    return _Run(overlap, {"B": backward, "F": forward}, take_weights).to_the_end()


class _Run:
    """Passes under way."""

    def __init__(
        self, overlap: Overlap, passes: dict[str, Steps[Any] | None], take_weights: Callable[[float], object]
    ) -> None:
        self._overlap, self._take_weights = overlap, take_weights
        self._passes = {who: steps for who, steps in passes.items() if steps is not None}
        self._slots: dict[str, str] = {}
        self._stops_backward = False
        self._results: dict[str, Any] = {}

    def to_the_end(self) -> tuple[Any, Any]:
        is_pair = len(self._passes) == 2
        for line in self._overlap.opening if is_pair else self._overlap.opening_alone:
            self._do(line)
        while self._passes:
            self._round(self._overlap.pair if len(self._passes) == 2 else self._overlap.alone)
        if not (is_pair and self._stops_backward):
            self._take_weights(1.0)
        return self._results.get("B"), self._results.get("F")

    def _round(self, table: Sequence[Line]) -> None:
        """Once through a table, or until a pass is over and there is another table to read."""
        num_passes, known = len(self._passes), {(line.who, line.slot) for line in table}
        unknown = [who for who, slot in self._slots.items() if (who, slot) not in known]
        for line in table:
            self._do(line)
            if len(self._passes) < num_passes:
                return
        for who in unknown:
            self._do(Line(who))

    def _do(self, line: Line) -> None:
        if line.who == "W":
            self._take_weights(line.share)
        elif line.who in self._passes and line.slot in (None, self._slots.get(line.who)):
            try:
                self._slots[line.who] = next(self._passes[line.who])
                self._stops_backward |= line.who == "B"
            except StopIteration as end:
                self._results[line.who] = end.value
                del self._passes[line.who]
                self._slots.pop(line.who, None)
