"""What a rank's memory holds over a step, out of traced layers: the schedule's own list, booked turn by turn."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from launch.plan.events import Event, Memory
from launch.plan.replay import Ends, Passes, Progress, ReplayedStage
from parallel.pipeline.actions import Action, Chunk
from parallel.pipeline.grouped_links import NUM_UNDER_WAY
from parallel.pipeline.order import Channel, Message, messages, source
from parallel.pipeline.overlap import overlap_of
from parallel.pipeline.placement import Placement
from parallel.pipeline.rounds import Round
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Booked:
    """What a stretch of events does to memory.

    Attributes:
        net_bytes: what is taken and not given back, by (component, label).
        peak_bytes: the most above what there was before it.
        at_peak: by (component, label), what makes that up.
    """

    net_bytes: Counter[tuple[str, str]]
    peak_bytes: int
    at_peak: Counter[tuple[str, str]]

    @cached_property
    def net_of_component(self) -> Counter[str]:
        """What is taken and not given back, by component."""
        return _by_component(self.net_bytes)

    @cached_property
    def peak_of_component(self) -> Counter[str]:
        """What makes up the most, by component."""
        return _by_component(self.at_peak)


def book(events: Iterable[Event]) -> Booked:
    """The memory of a stretch of events."""
    now: Counter[tuple[str, str]] = Counter()
    total = peak = 0
    at_peak: Counter[tuple[str, str]] = Counter()
    changes = [event for event in events if isinstance(event, Memory)]
    for place, event in enumerate(changes):
        now[event.what, event.label] += event.num_bytes
        total += event.num_bytes
        # A peak is followed by a return, or by the end; only there is it worth a copy.
        rises_on = place + 1 < len(changes) and changes[place + 1].num_bytes > 0
        if total > peak and not rises_on:
            peak, at_peak = total, now.copy()
    return Booked(Counter({key: size for key, size in now.items() if size}), peak, at_peak)


def _by_component(sizes: Mapping[tuple[str, str], int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (component, _), size in sizes.items():
        found[component] += size
    return found


@dataclass(frozen=True)
class Held:
    """What a rank holds around one action, in bytes by component.

    Attributes:
        fullest: at the moment of the action at which it is most.
        after: when the action is over.
    """

    fullest: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True)
class Peak:
    """The moment at which a rank holds most.

    Attributes:
        num_bytes: what the step itself holds then, beside weights and the optimizer's state.
        by_component, by_label: what of.
        by_micro_batch: (stage, micro-batch) -> bytes that it holds.
        action: in which it happens.
        series: what is held around each action of the list.
    """

    num_bytes: int
    by_component: dict[str, int]
    by_label: dict[str, int]
    by_micro_batch: dict[tuple[int, int], int]
    action: Action | None
    series: tuple[Held, ...]


class _Ledger:
    """Plays stretches; knows at any time what is held, by whom."""

    def __init__(self) -> None:
        self.held: Counter[tuple[str, str]] = Counter()
        self.of_micro_batch: Counter[tuple[int, int]] = Counter()
        self.total = self.peak = 0
        self.snapshot: tuple[Counter[tuple[str, str]], Counter[tuple[int, int]], int] | None = None
        self._components: Counter[str] = Counter()
        self._fullest, self._most = dict[str, int](), 0

    def play(self, stretch: Booked, scope: tuple[int, int, int]) -> None:
        if self.total + stretch.peak_bytes > self._most:
            self._most = self.total + stretch.peak_bytes
            self._fullest = dict(self._components + stretch.peak_of_component)
        self._components.update(stretch.net_of_component)
        if self.total + stretch.peak_bytes > self.peak:
            self.peak = self.total + stretch.peak_bytes
            held, owners = self.held.copy(), self.of_micro_batch.copy()
            held.update(stretch.at_peak)
            owners[scope[:2]] += stretch.peak_bytes
            self.snapshot = held, owners, self.peak
        self.held.update(stretch.net_bytes)
        net = sum(stretch.net_bytes.values())
        self.of_micro_batch[scope[:2]] += net
        self.total += net

    def ended(self) -> Held:
        """What was held around the action that is over now."""
        after = {name: size for name, size in self._components.items() if size}
        held = Held(self._fullest or after, after)
        self._fullest, self._most = after, self.total
        return held


def peak_of(
    schedule: Schedule,
    rank: int,
    slices: Sequence[tuple[str, ...]],
    layers: Mapping[str, Passes[Booked]],
    boundary_bytes: int,
    num_posted: int = 0,
    sent: Mapping[Channel, Sequence[Message]] | None = None,
    own_rounds: Sequence[Round] | None = None,
) -> Peak:
    """What one rank holds over a step of a schedule.

    boundary_bytes: of the tensor that one stage hands to the next. num_posted: receives that lie there all the time,
    posted ahead. sent: the schedule's messages, where they are known. own_rounds: what the rank exchanges where
    messages are kernels; None where each link works by itself.
    """
    ledger = _Ledger()
    sent = messages(schedule) if sent is None else sent
    posted = num_posted * boundary_bytes
    ahead = Counter({("links", "receives posted ahead"): posted})
    ledger.play(Booked(ahead, posted, ahead), (-1, -1, 0))
    placement = schedule.placement
    stages = {
        stage: ReplayedStage(stage, [layers[kind] for kind in slices[placement.position(stage)]], ledger)
        for stage in placement.stages_on(rank)
    }
    series: list[Held] = []
    peaks: list[tuple[int, Action]] = []

    def ended(action: Action) -> None:
        if not peaks or ledger.peak > peaks[-1][0]:
            peaks.append((ledger.peak, action))
        series.append(ledger.ended())

    links: Ends
    if own_rounds is None:
        links = _Boundaries(placement, sent, rank, ledger, boundary_bytes)
    else:
        links = _GroupedBoundaries(placement, own_rounds, rank, ledger, boundary_bytes)
    overlap = overlap_of(own_rounds is not None)
    Runtime(rank, stages, links, Progress(ended), overlap).run(schedule, ())
    assert ledger.snapshot is not None
    held, owners, _ = ledger.snapshot
    components: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    for (component, label), size in held.items():
        components[component] += size
        labels[label] += size
    return Peak(
        ledger.peak,
        {name: size for name, size in components.most_common() if size},
        {name: size for name, size in labels.most_common() if size},
        {owner: size for owner, size in sorted(owners.items()) if size and owner[0] >= 0},
        peaks[-1][1],
        tuple(series),
    )


class _Boundaries(Ends):
    """Books the tensors that stages hand on, as `Links` holds them: one that was sent is let go when its target has
    said something that it could not have said before it had taken it."""

    def __init__(
        self,
        placement: Placement,
        sent: Mapping[Channel, Sequence[Message]],
        rank: int,
        ledger: _Ledger,
        num_bytes: int,
    ) -> None:
        super().__init__(self._leaves)
        self._placement, self._rank, self._ledger = placement, rank, ledger
        self._arrives, self._goes = _borders(num_bytes)
        self._to_send = {channel: deque(each) for channel, each in sent.items() if channel.source == rank}
        self._to_take = {channel: deque(each) for channel, each in sent.items() if channel.target == rank}
        self._leaving: dict[Channel, deque[tuple[int, tuple[int, int, int]]]] = {
            channel: deque() for channel in self._to_send
        }

    def take(self, part: Chunk) -> None:
        made_by = source(self._placement, part)
        if made_by is None or self._placement.rank_of[made_by.stage] == self._rank:
            return
        channel = Channel(self._placement.rank_of[made_by.stage], self._rank, part.kind)
        self._ledger.play(self._arrives, (part.stage, part.micro_batch, 0))
        message = self._to_take[channel].popleft()
        for kind in "FB":
            leaving = self._leaving.get(Channel(self._rank, channel.source, kind), deque())
            while leaving and leaving[0][0] < message.sent:
                self._ledger.play(self._goes, leaving.popleft()[1])

    def close(self) -> None:
        for leaving in self._leaving.values():
            while leaving:
                self._ledger.play(self._goes, leaving.popleft()[1])

    def _leaves(self, part: Chunk) -> None:
        at = {"F": self._placement.after, "B": self._placement.before}[part.kind](part.stage)
        if at is None or self._placement.rank_of[at] == self._rank:
            return
        channel = Channel(self._rank, self._placement.rank_of[at], part.kind)
        self._leaving[channel].append((self._to_send[channel].popleft().taken, (part.stage, part.micro_batch, 0)))


class _GroupedBoundaries(Ends):
    """Books the tensors that stages hand on, as `GroupedLinks` holds them: what a call receives has memory from its
    launch on, and what it sends is let go when the rank waits for that call or for a later one."""

    def __init__(
        self, placement: Placement, own_rounds: Sequence[Round], rank: int, ledger: _Ledger, num_bytes: int
    ) -> None:
        super().__init__(lambda _: self._launch(self._place + 1))
        self._placement, self._rank, self._ledger = placement, rank, ledger
        self._arrives, self._goes = _borders(num_bytes)
        self._ahead, self._under_way = deque(own_rounds), deque[Round]()
        self._place = 0

    def turn_to(self, at: int) -> None:
        self._launch(2 * at)

    def reach(self, at: int, moment: float) -> None: ...

    def take(self, part: Chunk) -> None:
        made_by = source(self._placement, part)
        if made_by is None or self._placement.rank_of[made_by.stage] == self._rank:
            return
        if any(part == message.consumer for each in self._under_way for _, message in each.receives):
            while part not in [message.consumer for _, message in self._wait().receives]:
                pass

    def close(self) -> None:
        if self._ahead:
            self._launch(self._ahead[-1].place)
        while self._under_way:
            self._wait()

    def _launch(self, place: int) -> None:
        self._place = place - place % 2
        while self._ahead and self._ahead[0].place <= place:
            self._under_way.append(self._ahead.popleft())
            for _, message in self._under_way[-1].receives:
                self._ledger.play(self._arrives, _scope(message.consumer))
            if len(self._under_way) > NUM_UNDER_WAY:
                self._wait()

    def _wait(self) -> Round:
        """For the oldest call under way."""
        over = self._under_way.popleft()
        for _, message in over.sends:
            self._ledger.play(self._goes, _scope(message.producer))
        return over


def _borders(num_bytes: int) -> tuple[Booked, Booked]:
    """A tensor between stages that comes, and one that goes."""
    change = Counter({("activations", "between stages"): num_bytes})
    gone = Counter({("activations", "between stages"): -num_bytes})
    return Booked(change, num_bytes, change), Booked(gone, 0, Counter())


def _scope(part: Chunk) -> tuple[int, int, int]:
    return part.stage, part.micro_batch, 0
