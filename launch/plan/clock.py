"""When what a rank issues happens: one compute stream, a stream for each kind of group, and the host that issues.

Events order the streams as the code does. A kernel starts when the one before it has ended and the host has issued it.
A communication starts when its stream is free and what the compute stream had before it is done; the compute stream
waits for it, and the host never does. The host stands still only for numbers that it reads. What the compute stream
idles meanwhile is booked on whatever it stood still for: a group, or the host.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from launch.plan.events import Answer, Calls, Event, Kernel, Launch, Read, Wait


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


class Clock:
    """Runs over events that are handed to it one by one; `totals` may be replaced at any time to count anew."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.host_s = self.compute_s = 0.0
        self._streams: dict[str, float] = {}
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
            group, over_s = self._over.pop((scope, event.number), ("", 0.0))
            if over_s > self.compute_s:
                self.totals.exposed_s[group] += over_s - self.compute_s
                self.compute_s = over_s
        elif isinstance(event, Read):
            brought_s = 0.0 if event.after is None else self._over[scope, event.after][1]
            self._there[scope, event.number] = max(self.compute_s, brought_s) + self._host.read_s
        elif isinstance(event, Answer):
            self.host_s = max(self.host_s, self._there.pop((scope, event.number)))

    def _compute(self, kernel: Kernel, seconds: float) -> None:
        self._issue()
        start_s = max(self.compute_s, self.host_s)
        self.totals.host_s += start_s - self.compute_s
        self.compute_s = start_s + seconds
        self.totals.busy_s[kernel.work] += seconds
        self.totals.num_kernels += 1
        self.totals.flops += kernel.flops

    def _call(self, seconds: float) -> None:
        if self._host.is_device:
            self.host_s = max(self.host_s, self.compute_s) + seconds
            self.totals.host_s += self.host_s - self.compute_s
            self.compute_s = self.host_s

    def _communicate(self, launch: Launch, seconds: float, key: Hashable) -> None:
        self._issue()
        start_s = max(self._streams.get(launch.group, 0.0), self.compute_s, self.host_s)
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
