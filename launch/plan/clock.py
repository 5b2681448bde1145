"""When what a rank issues happens: one compute stream, a stream for each kind of group, and the host that issues.

Events order the streams as the code does. A kernel starts when the one before it has ended and the host has issued it.
A communication starts when its stream is free and what the stream that it is issued on had before it is done; that
stream waits for it, and the host never does. The host stands still only for numbers that it reads. What the compute
stream idles meanwhile is booked on whatever it stood still for: a group, or the host.

Trips have streams beside the compute stream, with kernels of their own: copies and sums of rows. The device is taken to
gain nothing by doing two kernels at once: one of a trip begins as soon as its stream allows, and what computes then is
over that much later. So a trip's kernels cost what they cost, and only when they begin is up to the stream.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launch.plan.events import Answer, Aside, Back, Calls, Event, Kernel, Launch, Read, Wait


@dataclass(frozen=True)
class Host:
    """What the border between host and device costs, in seconds.

    Attributes:
        issue_s: the host's time for one kernel or communication.
        read_s: from the device's having a number to the host's having it.
        is_device: the host computes itself, and goes on when an operation is over. What it needs to call one is then
            told with the calls.
    """

    issue_s: float = 0.0
    read_s: float = 0.0
    is_device: bool = False


@dataclass
class Totals:
    """What has been counted over some events.

    Attributes:
        busy_s: of the compute stream, by the kernels' work (`product`, `attention`, `move`).
        exposed_s: idle compute stream, by the kind of group that it waited for.
        host_s: idle compute stream that had nothing to do, as the host had not issued it yet.
        network_s: of each kind of group's stream at work.
        num_kernels, num_launches, flops: counts.
        sent_bytes: by kind of group.
    """

    busy_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    exposed_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    host_s: float = 0.0
    network_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_kernels: int = 0
    num_launches: int = 0
    flops: int = 0
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, more: Totals) -> None:
        """Count other events too."""
        for mine, theirs in (
            (self.busy_s, more.busy_s),
            (self.exposed_s, more.exposed_s),
            (self.network_s, more.network_s),
        ):
            for name, seconds in theirs.items():
                mine[name] += seconds
        self.host_s += more.host_s
        self.num_kernels += more.num_kernels
        self.num_launches += more.num_launches
        self.flops += more.flops
        self.sent_bytes += more.sent_bytes

    @property
    def length_s(self) -> float:
        """From the first event to the last one, on the compute stream."""
        return sum(self.busy_s.values()) + sum(self.exposed_s.values()) + self.host_s


# What the compute stream waits for where no group is to blame: the host has not issued it.
_HOST = ""


@dataclass
class _Lane:
    """The stream of a trip: when what it has been given is done, and what it waited for last."""

    free_s: float = 0.0
    blamed: str = _HOST


class _Beside(NamedTuple):
    """A kernel of a trip that the compute stream has not come to."""

    start_s: float
    seconds: float
    work: str


class Clock:
    """Runs over events that are handed to it one by one; `totals` may be replaced at any time to count anew."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.host_s = self.compute_s = 0.0
        self._streams: dict[str, float] = {}
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        self._lane: _Lane | None = None
        self._beside: list[_Beside] = []
        self._over: dict[Hashable, tuple[str, float]] = {}
        self._there: dict[Hashable, float] = {}
        self.totals = Totals()

    def see(self, event: Event, seconds: float, scope: Hashable) -> None:
        """The host comes to an event.

        seconds: that a kernel or a communication takes, or calls take a host that is the device. scope: in which
        numbers are unique.
        """
        if isinstance(event, Kernel):
            self._compute(event, seconds)
        elif isinstance(event, Calls):
            self._call(seconds)
        elif isinstance(event, Launch):
            self._communicate(event, seconds, (scope, event.number))
        elif isinstance(event, Wait):
            self._wait(*self._over.pop((scope, event.number), (_HOST, 0.0)))
        elif isinstance(event, Read):
            brought_s = 0.0 if event.after is None else self._over[scope, event.after][1]
            self._there[scope, event.number] = max(self._issued_behind_s, brought_s) + self._host.read_s
        elif isinstance(event, Answer):
            self.host_s = max(self.host_s, self._there.pop((scope, event.number)))
        elif isinstance(event, Aside):
            self._lane = self._lanes[event.way]
            if event.first:
                self._lane.free_s = max(self._lane.free_s, self.compute_s)
        elif isinstance(event, Back):
            self._lane = None
            if event.last:
                lane = self._lanes[event.way]
                self._wait(lane.blamed, lane.free_s)

    @property
    def _issued_behind_s(self) -> float:
        """When what has been issued to the present stream is done."""
        return self.compute_s if self._lane is None else self._lane.free_s

    def _wait(self, group: str, until_s: float) -> None:
        """The present stream waits, for a communication of this kind of group."""
        if self._lane is None:
            self._idle(until_s, group)
        elif until_s > self._lane.free_s:
            self._lane.free_s, self._lane.blamed = until_s, group

    def _compute(self, kernel: Kernel, seconds: float) -> None:
        self._issue()
        self.totals.num_kernels += 1
        self.totals.flops += kernel.flops
        if self._lane is not None:
            self._compute_beside(self._lane, kernel, seconds)
            return
        self._idle(self.host_s, _HOST)
        self._work(kernel.work, seconds)
        while self._beside and self._beside[0].start_s < self.compute_s:
            _, more_s, work = self._beside.pop(0)
            self._work(work, more_s)

    def _compute_beside(self, lane: _Lane, kernel: Kernel, seconds: float) -> None:
        if self.host_s > lane.free_s:
            lane.free_s, lane.blamed = self.host_s, _HOST
        if lane.free_s < self.compute_s:
            self._work(kernel.work, seconds)
        else:
            insort(self._beside, _Beside(lane.free_s, seconds, kernel.work))
        lane.free_s += seconds

    def _work(self, work: str, seconds: float) -> None:
        self.compute_s += seconds
        self.totals.busy_s[work] += seconds

    def _idle(self, until_s: float, group: str) -> None:
        """The compute stream stands still; what trips compute meanwhile is work, which may last longer."""
        while self._beside and self._beside[0].start_s < until_s:
            start_s, seconds, work = self._beside.pop(0)
            self._book_idle(start_s, group)
            self._work(work, seconds)
        self._book_idle(until_s, group)

    def _book_idle(self, until_s: float, group: str) -> None:
        idle_s = max(0.0, until_s - self.compute_s)
        if group == _HOST:
            self.totals.host_s += idle_s
        elif idle_s:
            self.totals.exposed_s[group] += idle_s
        self.compute_s += idle_s

    def _call(self, seconds: float) -> None:
        if self._host.is_device:
            self.host_s = max(self.host_s, self.compute_s) + seconds
            self.totals.host_s += self.host_s - self.compute_s
            self.compute_s = self.host_s

    def _communicate(self, launch: Launch, seconds: float, key: Hashable) -> None:
        self._issue()
        start_s = max(self._streams.get(launch.group, 0.0), self._issued_behind_s, self.host_s)
        self._streams[launch.group] = start_s + seconds
        self._over[key] = launch.group, start_s + seconds
        self.totals.network_s[launch.group] += seconds
        self.totals.num_launches += 1
        self.totals.sent_bytes[launch.group] += launch.sent_bytes

    def _issue(self) -> None:
        if self._host.is_device:
            self.host_s = max(self.host_s, self.compute_s)
        self.host_s += self._host.issue_s


class Priced(NamedTuple):
    """Events and what each of them takes."""

    events: Sequence[Event]
    seconds: Sequence[float]
