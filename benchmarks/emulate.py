"""`python -m benchmarks.emulate`: a cluster of several nodes on one Linux machine, to run distributed code against.

    python -m benchmarks.emulate nodes=4 per_node=2 rate=200mbit -- python script.py
    python -m benchmarks.emulate check                              # can this machine? exit code 0, or a reason

Each node is a network namespace. The ranks of a node share its loopback (fast, like NVLink). Nodes meet on a bridge, in
a namespace of its own so that the host's interfaces stay untouched, through one link each (like an InfiniBand port),
shaped to `rate` in both directions. A rate is emulated, not a latency. Needs root, iproute2 (ip, tc) and a kernel with
veth, bridge, htb and u32. Every rank gets torchrun's environment, and in GLOO_SOCKET_IFNAME the name of its link:
traffic to an address of its own node goes through loopback all the same, unshaped.

With several ranks to a core stay at 100 to 400 mbit, so that the wire and not the processor is the limit.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import IO, Any

LINK = "ib0"
NETWORK = "10.77.0."
GRACE_S = 5.0  # for the other ranks to say what they saw, once one has failed
_numbers = count()


@dataclass(frozen=True)
class Result:
    """What a run was: exit code and output of each rank; per node the bytes sent to other nodes and over loopback."""

    seconds: float
    exit_codes: list[int]
    outputs: list[str]
    internode_bytes: list[int]
    loopback_bytes: list[int]

    @property
    def ok(self) -> bool:
        return not any(self.exit_codes)


def bits_per_s(rate: str) -> int:
    """'200mbit' -> 200000000. Raises ValueError for anything else than a number and bit, kbit, mbit or gbit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", rate.lower())
    if found is None or not (value := int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2]])):
        raise ValueError(f"rate={rate}: a rate is a number and a unit, such as 200mbit or 1gbit")
    return value


def able() -> str:
    """The reason why this machine cannot emulate a cluster; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "iproute2 (ip, tc) is not installed"
    try:
        with Lab(nodes=2, rate="100mbit"):
            return ""
    except (RuntimeError, OSError) as error:
        return str(error)


def _sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


class Lab:
    """The emulated cluster: made on entering the context, always taken down on leaving it or at the program's end.

    rate: each node's link, each way (None: unshaped). loopback_rate: the same inside each node.
    Raises ValueError for sizes that cannot be, RuntimeError when the machine refuses a step.
    """

    def __init__(self, nodes: int, rate: str | None = None, loopback_rate: str | None = None) -> None:
        if not 1 <= nodes <= 250:
            raise ValueError(f"nodes={nodes} must lie between 1 and 250")
        self.num_nodes = nodes
        self.rate, self.loopback_rate = rate, loopback_rate
        self._rates = [bits_per_s(rate) if rate else 0, bits_per_s(loopback_rate) if loopback_rate else 0]
        name = f"halo{os.getpid()}x{next(_numbers)}"
        self._bridge = f"{name}b"
        self._spaces = [f"{name}n{node}" for node in range(nodes)]
        self._ranks: list[subprocess.Popen[bytes]] = []

    def address(self, node: int) -> str:
        return f"{NETWORK}{node + 1}"

    def __enter__(self) -> Lab:
        atexit.register(self._down)
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._down()

    def _up(self) -> None:
        _sh("ip", "netns", "add", self._bridge)
        _sh("ip", "-n", self._bridge, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _sh("ip", "-n", self._bridge, "link", "set", "br0", "up")
        for node, space in enumerate(self._spaces):
            port = f"p{node}"
            _sh("ip", "netns", "add", space)
            _sh("ip", "-n", space, "link", "set", "lo", "up")
            _sh("ip", "-n", space, "link", "add", LINK, "type", "veth", "peer", "name", port, "netns", self._bridge)
            for owner, device in ((space, LINK), (self._bridge, port)):
                _sh("ip", "-n", owner, "link", "set", device, "mtu", "9000", "gso_max_size", "65536")
            _sh("ip", "-n", self._bridge, "link", "set", port, "master", "br0", "up")
            _sh("ip", "-n", space, "addr", "add", f"{self.address(node)}/24", "dev", LINK)
            _sh("ip", "-n", space, "link", "set", LINK, "up")
            link_rate, loopback_rate = self._rates
            if link_rate:
                _shape(space, LINK, link_rate)  # what the node sends
                _shape(self._bridge, port, link_rate)  # what it receives
            if loopback_rate:
                _shape(space, "lo", loopback_rate)
            # One connection may not fill the whole queue, or a small message of another waits behind it. A kernel
            # without these knobs emulates a little less well.
            for knob in ("tcp_limit_output_bytes=262144", "tcp_congestion_control=cubic"):
                with contextlib.suppress(RuntimeError):
                    _sh("ip", "netns", "exec", space, "sysctl", "-qw", f"net.ipv4.{knob}")

    def _down(self) -> None:
        atexit.unregister(self._down)
        self._end_ranks()
        for space in [*self._spaces, self._bridge]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def run(
        self, command: Sequence[str], per_node: int = 1, port: int = 29500, timeout_s: float = 600, echo: bool = False
    ) -> Result:
        """Run `command` once per rank and wait. One rank's failure, or the timeout, ends them all.

        With `echo`, lines are printed as they come, each behind its rank's number.
        """
        before = self._counters()
        started = time.monotonic()
        with contextlib.ExitStack() as files:
            outputs = []
            for rank in range(self.num_nodes * per_node):
                file = files.enter_context(tempfile.TemporaryFile())
                outputs.append(_Output(rank, file.fileno(), echo))
                self._ranks.append(self._start(rank, command, per_node, port, file))
            ranks = list(self._ranks)
            self._watch(ranks, outputs, started + timeout_s)
            seconds = time.monotonic() - started
            self._end_ranks()
            texts = [output.finish() for output in outputs]
        after = self._counters()
        changes = [[new - old for new, old in zip(*pair, strict=True)] for pair in zip(after, before, strict=True)]
        return Result(seconds, [rank.wait() for rank in ranks], texts, *changes)

    def _start(
        self, rank: int, command: Sequence[str], per_node: int, port: int, output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # `ip netns exec` also shows the rank its own /sys, so that it can read its link's counters
            ["ip", "netns", "exec", self._spaces[rank // per_node], *command],
            env=self._environment(rank, per_node, port),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @staticmethod
    def _watch(ranks: list[subprocess.Popen[bytes]], outputs: list[_Output], deadline: float) -> None:
        """Return when all ranks have ended, GRACE_S after the first failure, or at the deadline."""
        failed = False
        while time.monotonic() < deadline:
            for output in outputs:
                output.read()
            codes = [rank.poll() for rank in ranks]
            if None not in codes:
                return
            if not failed and any(codes):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.05)

    def _end_ranks(self) -> None:
        for how, wait_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            alive = [rank for rank in self._ranks if rank.poll() is None]
            for rank in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, how)
            until = time.monotonic() + wait_s
            while time.monotonic() < until and any(rank.poll() is None for rank in alive):
                time.sleep(0.02)
        self._ranks = []

    def _environment(self, rank: int, per_node: int, port: int) -> dict[str, str]:
        node = rank // per_node
        env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
        env |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_node),
            "WORLD_SIZE": str(self.num_nodes * per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": LINK,
            "EMULATED_RATE": self.rate or "",
        }
        return env

    def _counters(self) -> tuple[list[int], list[int]]:
        """Bytes sent so far through each node's link, and over its loopback (the kernel's counters)."""
        sent: list[dict[str, int]] = []
        for space in self._spaces:
            devices: list[dict[str, Any]] = json.loads(_sh("ip", "-n", space, "-s", "-j", "link"))
            sent.append({device["ifname"]: device["stats64"]["tx"]["bytes"] for device in devices})
        return [by_name[LINK] for by_name in sent], [by_name["lo"] for by_name in sent]


class _Output:
    """What a rank wrote to a file so far, passed on line by line when asked."""

    def __init__(self, rank: int, descriptor: int, echo: bool) -> None:
        self._rank, self._descriptor, self._echo = rank, descriptor, echo
        self._text, self._printed = b"", 0

    def read(self) -> None:
        # `pread`: the rank shares the file's position and must go on writing at its end.
        while fresh := os.pread(self._descriptor, 1 << 20, len(self._text)):
            self._text += fresh
        self._print(self._text.rfind(b"\n") + 1)

    def finish(self) -> str:
        self.read()
        self._print(len(self._text))
        return self._text.decode(errors="replace")

    def _print(self, end: int) -> None:
        if self._echo and end > self._printed:
            for line in self._text[self._printed : end].decode(errors="replace").splitlines():
                print(f"[{self._rank}] {line}", flush=True)
            self._printed = end


def _shape(space: str, device: str, rate: int) -> None:
    """Limit what leaves through a device. Packets below 256 bytes go first: acknowledgements that wait behind the
    other direction's bulk would halve a duplex link. Queues are deep, so that nothing is dropped."""
    burst = str(max(70_000, rate // 8000))  # a millisecond of traffic, and at least one large segment
    tc = ("tc", "-n", space)
    _sh(*tc, "qdisc", "replace", "dev", device, "root", "handle", "1:", "htb", "default", "20")
    limits = ("burst", burst, "cburst", burst)
    _sh(*tc, "class", "add", "dev", device, "parent", "1:", "classid", "1:1", "htb", "rate", f"{rate}bit", *limits)
    for name, tenths, priority in (("1:10", 1, "0"), ("1:20", 9, "1")):
        share = ("rate", f"{rate * tenths // 10}bit", "ceil", f"{rate}bit", *limits)
        order = ("prio", priority, "quantum", "60000")
        _sh(*tc, "class", "add", "dev", device, "parent", "1:1", "classid", name, "htb", *share, *order)
        _sh(*tc, "qdisc", "add", "dev", device, "parent", name, "bfifo", "limit", str(32 << 20))
    small = ("u32", "match", "u16", "0x0000", "0xff00", "at", "2")  # the upper byte of the IP packet's length is zero
    _sh(*tc, "filter", "add", "dev", device, "parent", "1:", "protocol", "ip", "prio", "1", *small, "flowid", "1:10")


def main(argv: Sequence[str]) -> int:
    """The verb: settings as key=value, then `--` and the command. Raises ValueError for what it does not know."""
    if list(argv) == ["check"]:
        reason = able()
        print(f"this machine cannot emulate a cluster: {reason}" if reason else "this machine can emulate a cluster")
        return 1 if reason else 0
    cut = list(argv).index("--") if "--" in argv else len(argv)
    command = list(argv[cut + 1 :])
    settings = {"nodes": "2", "per_node": "1", "rate": "200mbit", "loopback_rate": "none", "timeout_s": "600"}
    for given in argv[:cut]:
        key, sign, value = given.partition("=")
        if not sign or key not in settings:
            raise ValueError(f"emulate: {given!r} is not one of {', '.join(f'{name}=' for name in settings)}")
        settings[key] = value
    nodes, per_node, timeout_s = (_whole(name, settings[name]) for name in ("nodes", "per_node", "timeout_s"))
    if not command:
        raise ValueError("emulate: a command must follow after --")
    if reason := able():
        raise ValueError(f"emulate: this machine cannot emulate a cluster: {reason}")
    rates = [None if settings[name] == "none" else settings[name] for name in ("rate", "loopback_rate")]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down
    try:
        with Lab(nodes, *rates) as lab:
            result = lab.run(command, per_node, timeout_s=timeout_s, echo=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    megabytes = [f"{sent / 1e6:.2f}" for sent in result.internode_bytes]
    print(
        f"{nodes} nodes x {per_node} ranks at {settings['rate']}: {result.seconds:.1f} s, exit codes "
        f"{result.exit_codes}, MB sent to other nodes by node: {', '.join(megabytes)}"
    )
    return 0 if result.ok else 1


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"emulate: {name}={text} must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
