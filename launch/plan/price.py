"""Traced layers with what each of their events takes on a cluster, in one of the three sets of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launch.plan.clock import Priced
from launch.plan.cluster import Cluster
from launch.plan.events import Calls, Enter, Event, Kernel, Launch, LayerPasses, Read, Turn
from launch.plan.exchange import COMBINE, DISPATCH, exchange_seconds
from launch.plan.kernels import AS_WRITTEN, BOUND, PUBLISHED, Rates
from launch.plan.own_scales import OwnScales
from launch.plan.replay import Passes, slots, weight_gradients

# Whose rows DeepEP's combine carries: those on their way home, and the gradients of those that went out.
_HOMEWARD = {("combine", "F"), ("dispatch", "B")}


@dataclass(frozen=True)
class Pricing:
    """Rates for a run on a cluster.

    Attributes:
        precision: of the run.
        kernels: one of `kernels.KERNELS`.
        beside: whether communication runs beside what computes, and takes processors from it, as in a pair.
        crosses: whether experts' rows travel between machines: the hop inside one then rides, in the published set, on
            the kernel that brings them.
        slowdown: kind of work, or `calls` of the host -> how much longer it takes beside other ranks that share a
            machine's cores.
        ranks_together: kind of group -> how many of its ranks share a machine, where it is not what the cluster says.
        own: how the run's own layers were timed; matters to as written alone.
    """

    cluster: Cluster
    rates: Rates
    precision: str
    kernels: str
    beside: bool
    crosses: bool
    slowdown: Mapping[str, float]
    ranks_together: Mapping[str, int]
    own: OwnScales = field(default_factory=OwnScales)

    @property
    def num_taken(self) -> int:
        """Processors that communication holds meanwhile."""
        return self.cluster.exchange.num_units_taken if self.beside else 0

    def layer(self, passes: LayerPasses) -> Passes[Priced]:
        """A traced layer, priced stretch by stretch."""
        return Passes(
            tuple(self._stretches(passes.forward)),
            tuple(self._stretches(passes.backward)),
            tuple(self._weights(weights) for weights in passes.weights),
            slots(passes.forward),
            slots(passes.backward),
        )

    def events(self, events: Sequence[Event]) -> list[tuple[Event, float]]:
        """Events with their seconds. In sets that know nodes only, products and attention take their own time, and what
        else a node takes is dealt out to its other kernels."""
        found: list[tuple[Event, float]] = []
        counts = _counts(events)
        for enter, node in _nodes(events):
            scale = self._scale(enter, node)
            found.append((enter, 0.0))
            for event in node:
                if isinstance(event, Kernel):
                    found.append((event, self._kernel(event, scale) * self.own.of_work(enter)))
                elif isinstance(event, Calls):
                    found.append((event, self._calls(event, enter)))
                elif isinstance(event, Launch) and not (self.kernels == PUBLISHED and event.number in counts):
                    found.append((event, self._communication(event, enter)))
                else:  # DeepEP's kernels tell each other the counts before the rows, in the same launch
                    found.append((event, 0.0))
        return found

    def update(self, events: Sequence[Event], num_bytes: int) -> list[tuple[Event, float]]:
        """The optimizer's events with their seconds. In sets of fused kernels all that it keeps, `num_bytes`, passes
        memory once; its collectives are those of the set."""
        written = [self.rates.seconds(event) if isinstance(event, Kernel) else 0.0 for event in events]
        figures = self.cluster.memory
        rate = figures.peak_gb_per_s * 1e9 if self.kernels == BOUND else self.cluster.bytes_per_s
        scale = 1.0 if self.kernels == AS_WRITTEN else num_bytes / rate / max(sum(written), 1e-12)
        enter, found = Enter("optimizer", "update", "U"), list[tuple[Event, float]]()
        for event, seconds in zip(events, written, strict=True):
            if isinstance(event, Enter):
                enter = event
            if isinstance(event, Launch):
                seconds = self._communication(event, enter)
            elif isinstance(event, Calls):
                seconds = self._calls(event, enter)
            elif isinstance(event, Kernel):
                seconds *= scale * self.slowdown.get(event.work, 1.0) * self.own.of_work(enter)
            found.append((event, seconds))
        return found

    def _kernel(self, kernel: Kernel, scale: float) -> float:
        longer = self.slowdown.get(kernel.work, 1.0)
        if kernel.work == "move" or not kernel.flops:
            return self.rates.seconds(kernel, self.num_taken) * scale * longer
        return self.rates.core_seconds(kernel, self.kernels, self.num_taken) * longer

    def _calls(self, calls: Calls, enter: Enter) -> float:
        """What a host that is the device needs to call operations; fused kernels are few."""
        if not self.cluster.host.is_device or self.kernels != AS_WRITTEN:
            return 0.0
        us = self.cluster.host.call_us(self.precision, enter.layer, enter.node, enter.kind)
        return calls.number * us * 1e-6 * self.slowdown.get("calls", 1.0) * self.own.of_work(enter)

    def _scale(self, enter: Enter, node: Sequence[Event]) -> float:
        """How long the passes over memory of a node are, over what they are as written."""
        if self.kernels == AS_WRITTEN:
            return 1.0
        work = [event for event in node if isinstance(event, Kernel)]
        core = sum(self._kernel(each, 0.0) for each in work)
        passes = sum(self.rates.seconds(each, self.num_taken) for each in work if each.work == "move" or not each.flops)
        whole = self.rates.node_seconds(node, enter, self.kernels, self.num_taken)
        return max(0.0, whole - core) / passes if passes else 0.0

    def _communication(self, launch: Launch, enter: Enter) -> float:
        if self.kernels != AS_WRITTEN and launch.group == "node" and self.crosses:
            return 0.0
        way = COMBINE if (enter.node, enter.kind) in _HOMEWARD else DISPATCH
        kernel_set = self.rates.kernel_set if self.beside else None
        together = self.ranks_together.get(launch.group)
        seconds = exchange_seconds(launch, self.cluster, self.kernels, kernel_set, way, together)
        return seconds * self.own.of_waits(enter)

    def _stretches(self, events: Sequence[Event]) -> Iterator[Priced]:
        found: list[tuple[Event, float]] = []
        for each in self.events(events):
            if isinstance(each[0], Turn):
                yield self._stretch(found)
                found = []
            else:
                found.append(each)
        yield self._stretch(found)

    def _weights(self, events: Sequence[Event]) -> tuple[Priced, ...]:
        """Weight gradients one by one; a node's are priced together."""
        priced = iter(self.events(events))
        return tuple(self._stretch([next(priced) for _ in each]) for each in weight_gradients(events))

    @staticmethod
    def _stretch(priced: Sequence[tuple[Event, float]]) -> Priced:
        return Priced([event for event, _ in priced], [seconds for _, seconds in priced])


def _counts(events: Sequence[Event]) -> set[int]:
    """The communications that tell how many rows will travel: those of a piece that come before the host reads."""
    found, launched = set[int](), list[int]()
    for event in events:
        if isinstance(event, Enter):
            launched.clear()
        elif isinstance(event, Launch):
            launched.append(event.number)
        elif isinstance(event, Read):
            found.update(launched)
    return found


def _nodes(events: Sequence[Event]) -> Iterator[tuple[Enter, list[Event]]]:
    """Runs of events, each with the piece that it is of."""
    enter, node = Enter("", "", ""), list[Event]()
    for event in events:
        if isinstance(event, Enter) and event != enter:
            if node:
                yield enter, node
            enter, node = event, []
        else:
            node.append(event)
    if node:
        yield enter, node


def priced(layers: Mapping[str, LayerPasses], pricing: Pricing) -> dict[str, Passes[Priced]]:
    """All kinds of layers."""
    price: Callable[[LayerPasses], Passes[Priced]] = pricing.layer
    return {kind: price(passes) for kind, passes in layers.items()}
