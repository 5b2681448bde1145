"""`plan pair`: what a middle rank's streams do in a pair of a plan, as a picture."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

from launch.plan.clock import Clock, Host
from launch.plan.events import Enter, Event, Kernel, Launch
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.step import ActionCosts
from parallel.pipeline.actions import Action, Pair
from train.view.rows import Bar, RowChart, Swatch, draw_rows

COMPUTES, COPIES = "computes", "copies"
# Of an action: what is further apart on a stream is drawn apart.
_APART = 1e-3
# Passes and their colours, as `timeline` has them.
COLORS = {"F": ("Forward", "#f6b64b"), "B": ("Backward", "#8fcf8a"), "W": ("Weight gradients", "#9dbdec")}


class Span(NamedTuple):
    """A piece of a pass on one stream: its times in seconds from the pair's start."""

    stream: str
    piece: Enter
    start_s: float
    stop_s: float


class _Spans(Clock):
    """A clock that notes when what was computed and sent on which stream."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.found: list[Span] = []
        self._piece = Enter("", "", "")

    def see(self, event: Event, seconds: float, scope: Hashable) -> None:
        lane = self._lane
        super().see(event, seconds, scope)
        if isinstance(event, Enter):
            self._piece = event
        elif isinstance(event, Kernel):
            stop_s = self.compute_s if lane is None else lane.free_s
            self._note(COMPUTES if lane is None else COPIES, stop_s, seconds)
        elif isinstance(event, Launch):
            self._note(event.group, self._over[scope, event.number][1], seconds)

    def _note(self, stream: str, stop_s: float, seconds: float) -> None:
        self.found.append(Span(stream, self._piece, stop_s - seconds, stop_s))


def spans_of(costs: ActionCosts, action: Action) -> list[Span]:
    """What an action does in the middle of a step, stream by stream.

    What follows on a stream and is of the same piece is one span; what the copies of a trip take from what is computed
    lies inside of it. What is under way for the action before or behind is cut off at the borders.
    """
    clock = _Spans(costs.host)
    cost, stop_s = costs.play(action, clock)
    start_s = stop_s - cost.seconds
    last: dict[str, Span] = {}
    found: list[Span] = []
    for span in sorted(clock.found, key=lambda span: span.start_s):
        cut = span._replace(start_s=max(span.start_s, start_s) - start_s, stop_s=min(span.stop_s, stop_s) - start_s)
        if cut.stop_s <= cut.start_s:
            continue
        before = last.get(span.stream)
        is_near = before is not None and cut.start_s - before.stop_s < _APART * cost.seconds
        if before is not None and before.piece == span.piece and (is_near or span.stream == COMPUTES):
            found[found.index(before)] = cut = cut._replace(start_s=before.start_s)
        else:
            found.append(cut)
        last[span.stream] = cut
    return found


def draw_pair(plan: Plan, out: Path) -> None:
    """Writes the SVG or PNG `out`. ValueError for a run without pairs."""
    step = plan.step(AS_WRITTEN)
    action = step.pair[0]
    if not isinstance(action, Pair):
        raise ValueError(f"pipeline.schedule={plan.schedule.name} has no pairs here: there is none to draw")
    spans, cost = spans_of(step.costs, action), step.costs.cost(action)
    groups = sorted({span.stream for span in spans} - {COMPUTES, COPIES}, reverse=True)
    rows = [COMPUTES, *([COPIES] if any(span.stream == COPIES for span in spans) else []), *groups]
    bars = [
        Bar(
            rows.index(span.stream),
            span.start_s * 1e3,
            span.stop_s * 1e3,
            (COLORS[span.piece.kind][1],),
            (span.piece.node,),
        )
        for span in spans
    ]
    entries = [
        [f"{sum(bar.stop - bar.start for bar in bars if bar.row == at) / cost.seconds / 10:.0f}%"]
        for at in range(len(rows))
    ]
    waited_s = sum(cost.totals.exposed_s.values()) + cost.totals.host_s
    note = (
        f"{action} on a middle rank: {cost.seconds * 1e3:.1f} ms, of which it waits for exchanges and for its host "
        f"{waited_s / cost.seconds:.1%}. Copies are those of rows on their way, on streams of their own; what is "
        "computed beside them takes that much longer."
    )
    key = [Swatch(text, [[color]]) for text, color in COLORS.values()]
    draw_rows(RowChart(_title(plan), note, "time, ms", rows, ["busy"], entries), bars, key, out)


def _title(plan: Plan) -> str:
    mesh = plan.config.parallel
    return f"A pair of {plan.schedule.name}: {plan.cluster.title}, experts over {mesh.ep} ranks ({mesh.dispatch})"
