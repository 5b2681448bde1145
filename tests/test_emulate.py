"""The emulated cluster: settings anywhere; the network itself where the machine allows it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks import emulate
from benchmarks.emulate import Lab, bits_per_s
from tests.spawn import STOP_S


@pytest.fixture(scope="module")
def able() -> None:
    if reason := emulate.able():
        pytest.skip(f"this machine cannot emulate a cluster: {reason}")


def namespaces(pid: int) -> list[str]:
    """Those made by one process; others on this machine may emulate at the same time."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"halo{pid}x")]


@pytest.mark.parametrize(("rate", "bits"), [("200mbit", 200_000_000), ("1.5gbit", 1_500_000_000), ("9600bit", 9600)])
def test_rates(rate: str, bits: int) -> None:
    assert bits_per_s(rate) == bits


@pytest.mark.parametrize("rate", ["fast", "200", "200mb", "-1mbit", "0mbit", "", "mbit"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match=r"rate=.*: a rate is a number and a unit"):
        bits_per_s(rate)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["node=2", "--", "true"], "'node=2' is not one of nodes=, per_node="),
        (["nodes", "--", "true"], "'nodes' is not one of"),
        (["nodes=two", "--", "true"], "nodes=two must be a whole number"),
        (["per_node=0", "--", "true"], "per_node=0 must be a whole number of at least 1"),
        (["nodes=2"], "a command must follow after --"),
    ],
)
def test_settings_are_refused_by_name_and_rule(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        emulate.main(arguments)


def test_too_many_nodes_are_refused() -> None:
    for nodes in (0, 251):
        with pytest.raises(ValueError, match=f"nodes={nodes} must lie between 1 and 250"):
            Lab(nodes)


# One transfer of 1 MB from rank 0 to rank 1, as plain sockets: starting torch is not what is tested.
TRANSFER = """
import os, socket, sys, time
rank = int(os.environ["RANK"])
if rank == 0:
    server = socket.create_server((os.environ["MASTER_ADDR"], 29501))
    peer = server.accept()[0]
    peer.sendall(bytes(1_000_000))
elif rank == 1:
    while True:
        began = time.monotonic()  # nothing has come before
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 29501))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    left = 1_000_000
    while left:
        left -= len(peer.recv(left))
    print("seconds", time.monotonic() - began)
"""


def test_bytes_meet_the_link_between_nodes_and_loopback_inside(able: None) -> None:
    command = [sys.executable, "-c", TRANSFER]
    with Lab(nodes=2, rate="20mbit") as lab:
        across = lab.run(command, per_node=1, timeout_s=STOP_S)
        inside = lab.run(command, per_node=2, timeout_s=STOP_S)
    assert across.ok and inside.ok
    # 1 MB of payload, headers on top, and what is sent again where a busy machine acknowledges late
    assert 1.0e6 < across.internode_bytes[0] < 1.5e6 and across.internode_bytes[1] < 0.05e6
    assert across.loopback_bytes[0] < 0.05e6
    assert inside.loopback_bytes[0] > 1.0e6 and sum(inside.internode_bytes) < 0.05e6
    # 8 Mbit over a 20 Mbit/s link take 0.4 s; the first burst of 70 kB is free. A loaded machine only adds to it.
    assert float(across.outputs[1].split()[1]) > 0.3


def test_ranks_have_the_environment_of_torchrun(able: None) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"]
    with Lab(nodes=2) as lab:
        result = lab.run(["sh", "-c", "echo " + " ".join(f"${name}" for name in names)], per_node=2)
    assert result.outputs == [f"{rank} {rank % 2} 4 2 {rank // 2} 10.77.0.1 ib0\n" for rank in range(4)]


def test_a_failed_rank_ends_the_others_and_nothing_is_left(able: None) -> None:
    began = time.monotonic()
    with Lab(nodes=2) as lab:
        assert len(namespaces(os.getpid())) == 3
        result = lab.run(["sh", "-c", "test $RANK = 1 && exit 3; sleep 1200"], per_node=1, timeout_s=1800)
    assert result.exit_codes[1] == 3 and result.exit_codes[0] != 0
    assert time.monotonic() - began < STOP_S, "the other rank was waited for"
    assert namespaces(os.getpid()) == []


def test_it_is_taken_down_after_an_error_and_after_a_signal(able: None) -> None:
    with pytest.raises(KeyError), Lab(nodes=2):
        raise KeyError
    assert namespaces(os.getpid()) == []
    program = "import sys; from benchmarks import emulate; sys.exit(emulate.main(sys.argv[1:]))"
    running = subprocess.Popen(
        [sys.executable, "-c", program, "nodes=2", "--", "sh", "-c", "echo up; sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None and running.stdout.readline().endswith("up\n")
    assert len(namespaces(running.pid)) == 3
    running.terminate()
    running.communicate(timeout=STOP_S)
    assert running.returncode == 143
    assert namespaces(running.pid) == []


def test_the_verb_prints_lines_with_ranks_and_passes_failure_on(able: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert emulate.main(["nodes=2", "rate=none", "--", "sh", "-c", "echo hello; printf end"]) == 0
    out = capsys.readouterr().out
    assert all(f"[{rank}] {word}" in out for rank in (0, 1) for word in ("hello", "end"))
    assert "2 nodes x 1 ranks at none" in out and "exit codes [0, 0]" in out
    assert emulate.main(["nodes=2", "--", "false"]) == 1
    assert emulate.main(["check"]) == 0


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(emulate.os, "geteuid", lambda: 1000)
    assert "needs root" in emulate.able()
    assert emulate.main(["check"]) == 1
    assert "needs root" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot emulate a cluster: making network namespaces needs root"):
        emulate.main(["--", "true"])
