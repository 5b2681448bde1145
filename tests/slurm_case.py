"""A real Slurm on this machine, which poses as two nodes: its daemons, started and ended by the tests.

Debian's `slurm-wlm` and `munge` suffice; nothing of the system's own Slurm is touched. Needs root, as slurmd does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.ranks import HeldPort
from launch.warm import follow_into_death
from tests.spawn import STOP_S

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def skip_without_slurm() -> None:
    """Skips a test where Slurm cannot be started, in a sentence that says what to install."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"no {missing[0]} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd poses as two nodes for root alone")


class Slurm:
    """A cluster of two nodes; `environment` are the variables by which programs find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**kept, "SLURM_CONF": str(self.path), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def start(self) -> None:
        """Start munged, slurmctld and a slurmd for each node, and wait until the nodes are there."""
        (self.folder / "state").mkdir()
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o400)
        ports = [HeldPort() for _ in range(1 + len(NODES))]
        self.path.write_text(self._conf([port.number for port in ports]))
        for port in ports:
            port.close()
        munge = [f"--key-file={self.folder}/key", f"--socket={self.folder}/munge.sock", "--force", "--foreground"]
        own = [f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log"]
        self._daemon("munged", [*munge, *own, f"--seed-file={self.folder}/munged.seed"])
        self.wait_for(lambda: (self.folder / "munge.sock").exists())
        self._daemon("slurmctld", ["-D", "-i"])
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == f"idle {len(NODES)}")

    def start_node(self, node: str) -> None:
        """One node's daemon."""
        self._daemon(node, ["-D", "-N", node], program="slurmd")

    def stop(self) -> None:
        """End every daemon, and what it has started."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        for name in reversed(list(self.daemons)):
            self.daemons[name].terminate()
        for process in self.daemons.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *command: str) -> str:
        """What a program says; its own words where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return (done.stdout + (done.stderr if done.returncode else "")).strip()

    def state(self, job: str) -> str:
        """The state of a job, as PENDING or COMPLETED."""
        said = self.ask("scontrol", "--oneliner", "show", "job", job)
        return said.partition("JobState=")[2].partition(" ")[0]

    def hasten(self, job: str) -> str:
        """Let a job that was put back into the queue not wait until its old credential has expired; its state."""
        state = self.state(job)
        if state == "PENDING":
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        return state

    def wait_for_end(self, job: str) -> str:
        """The state in which a job has ended, hastened."""
        states = []

        def has_ended() -> bool:
            states.append(self.hasten(job))
            return states[-1] in ENDED

        self.wait_for(has_ended)
        return states[-1]

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return when it has happened."""
        end_s = time.monotonic() + STOP_S
        while not happened():
            assert time.monotonic() < end_s, "it never happened"
            time.sleep(0.2)

    def _daemon(self, name: str, arguments: Sequence[str], program: str | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [program or name, *arguments],
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=follow_into_death,
            )

    def _conf(self, ports: Sequence[int]) -> str:
        host, folder = socket.gethostname().split(".")[0], self.folder
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            *("SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge", "CredType=cred/munge"),
            # A job that is put back into the queue may start again as soon as its old credential has expired.
            f"AuthInfo=socket={folder}/munge.sock,cred_expire=5",
            *(f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool.%n"),
            *(f"SlurmctldPidFile={folder}/ctld.pid", f"SlurmdPidFile={folder}/%n.pid"),
            *(f"SlurmctldLogFile={folder}/ctld.log", f"SlurmdLogFile={folder}/%n.log"),
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "ReturnToService=2"),
            *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "SchedulerParameters=sched_interval=2"),
            *("PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE", "KillWait=30", "SlurmdTimeout=15"),
            *("JobRequeue=1", "MinJobAge=3600", "MpiDefault=none", "OverTimeLimit=0"),
        ]
        for node, port in zip(NODES, ports[1:], strict=True):
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName={node} {place} CPUs=2 State=UNKNOWN")
        every = f"Nodes={','.join(NODES)} MaxTime=60 State=UP"
        lines.append(f"PartitionName=low {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60")
        lines.append(f"PartitionName=high {every} PriorityTier=2 PreemptMode=OFF")
        return "\n".join(lines) + "\n"


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """The cluster, in a folder of its own."""
    skip_without_slurm()
    folder.mkdir(parents=True, exist_ok=True)
    slurm = Slurm(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


if __name__ == "__main__":  # to look at it by hand: python -m tests.slurm_case FOLDER
    import sys

    with running_slurm(Path(sys.argv[1])) as cluster:
        print(json.dumps({"SLURM_CONF": cluster.environment["SLURM_CONF"]}), flush=True)
        time.sleep(float(sys.argv[2]))
