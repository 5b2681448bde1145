"""`slurm.*`: how a run is queued; no part of its config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.config import RunConfig
from train.settings import leaves, read

# As sbatch takes a limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and so on.
_TIME = r"(\d+-)?\d+(:\d+){0,2}"
# Options that the script sets itself, by a setting or by its own working.
_OURS = {
    "--nodes": "slurm.nodes",
    "-N": "slurm.nodes",
    "--partition": "slurm.partition",
    "-p": "slurm.partition",
    "--time": "slurm.time",
    "-t": "slurm.time",
    "--account": "slurm.account",
    "-A": "slurm.account",
    "--qos": "slurm.qos",
    "-q": "slurm.qos",
    "--signal": "slurm.signal_s",
    "--dependency": "slurm.chain",
    "--requeue": "slurm.requeue",
    "--no-requeue": "slurm.requeue",
    "--gpus-per-node": "slurm.gpus_per_node",
    "--array": "",
    "-a": "",
    "--output": "",
    "-o": "",
    "--open-mode": "",
    "--chdir": "",
    "-D": "",
    "--ntasks": "",
    "--ntasks-per-node": "",
    "-n": "",
    "--job-name": "run.name",
    "-J": "run.name",
}


def seconds_of(time: str) -> int:
    """What sbatch understands of a time: the last part is minutes with one part and no day, hours with a day."""
    day, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(day or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


@dataclass(frozen=True)
class SlurmConfig:
    """`slurm`: how a run is queued, and what becomes of it between its start and its end (docs/jobs.md).

    Attributes:
        nodes: machines; None: `parallel.nodes`, which follows from this unless it is set.
        partition: of the cluster; None: its default.
        account: whose hours; None: the user's default.
        qos: quality of service; None: the default.
        time: longest run of one job, as sbatch takes it (`24:00:00`); None: the partition's.
        gpus_per_node: devices to ask for; None: one for each rank of a node with `run.device=cuda`, none with
            `run.device=cpu`.
        option: further options of sbatch, as in `slurm.option=--exclusive`; may be given several times.
        setup: lines of shell before the run starts, as in `slurm.setup='module load cuda'`; may be given several times.
        python: the interpreter on the nodes; None: the one that queues the run.
        signal_s: seconds before the limit at which the ranks are asked to save and end. A save, and the step in which
            the request comes, must fit; what does not is said when the run is queued and when it starts.
        requeue: put the job back into the queue after it was asked to stop (its limit comes near, or another job takes
            its place) or a machine was lost, until the run is done.
        chain: jobs to queue one behind the other, of which each goes on where the one before has ended. Those that find
            the run done end at once.
        restarts: how often in a row, without a new checkpoint in between, the ranks start again within a job after one
            of them was lost.
        restart_wait_s: seconds before they do; twice as many each time in a row, up to 300.
        plan: a cluster, as `cluster` of `plan` names it: a run that does not fit into its memory by its plan is
            refused. None: it is not planned.
    """

    nodes: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpus_per_node: int | None = None
    option: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    python: str | None = None
    signal_s: int = 300
    requeue: bool = True
    chain: int = 1
    restarts: int = 3
    restart_wait_s: float = 10.0
    plan: str | None = None

    def check(self) -> None:
        """ValueError for a number or a time that cannot be, or an option that is set elsewhere."""
        for name, least in {"nodes": 1, "gpus_per_node": 0, "signal_s": 1, "chain": 1, "restarts": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"slurm.{name}={value} must be at least {least}")
        if self.signal_s > 65535:
            raise ValueError(f"slurm.signal_s={self.signal_s} must be at most 65535, which is what sbatch takes")
        if not 0 <= self.restart_wait_s < float("inf"):
            raise ValueError(f"slurm.restart_wait_s={self.restart_wait_s:g} must be a number of at least 0")
        if self.time is not None and not re.fullmatch(_TIME, self.time):
            raise ValueError(f"slurm.time={self.time} is no time that sbatch reads: write it as 24:00:00 or 2-12:00:00")
        if self.time is not None and seconds_of(self.time) <= self.signal_s:
            raise ValueError(
                f"slurm.time={self.time} is not longer than slurm.signal_s={self.signal_s}: the job would be asked to "
                "stop as soon as it starts"
            )
        for name in ("partition", "account", "qos", "python"):
            value = getattr(self, name)
            if value is not None and re.search(r"\s", value):
                raise ValueError(f"slurm.{name}={value} must be one word")
        for option in self.option:
            self._check_option(option)
        for line in self.setup:
            if "\n" in line:
                raise ValueError(f"slurm.setup={line!r} must be one line; give it several times for several lines")

    @staticmethod
    def _check_option(option: str) -> None:
        if not option.startswith("-") or "\n" in option:
            raise ValueError(f"slurm.option={option} is no option of sbatch: it begins with -, as in --exclusive")
        # A short option may have its value right behind it.
        name = re.split(r"[=\s]", option)[0] if option.startswith("--") else option[:2]
        if name in _OURS:
            instead = f"set {_OURS[name]}" if _OURS[name] else "the script needs its own"
            raise ValueError(f"slurm.option={option}: {instead}")

    def check_for(self, config: RunConfig) -> None:
        """ValueError where the run and its place in the cluster contradict each other."""
        parallel = config.parallel
        if self.nodes is not None and self.nodes != parallel.nodes:
            raise ValueError(
                f"slurm.nodes={self.nodes} and parallel.nodes={parallel.nodes} must be the same: the ranks of a run "
                "are spread over the machines that it gets"
            )
        if parallel.elastic:
            raise ValueError(
                "parallel.elastic=true: a job of Slurm has the machines that it asked for or is queued again; only "
                "python -m launch local goes on with fewer ranks"
            )
        if self.gpus_per_node is None and config.run.device == "auto":
            raise ValueError(
                "run.device=auto means the devices of the machine that runs, and this one only queues: set "
                "run.device=cuda or run.device=cpu"
            )

    def num_gpus_per_node(self, config: RunConfig) -> int:
        """Devices to ask for on each machine."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return config.parallel.ranks_per_node if config.run.device == "cuda" else 0


@dataclass(frozen=True)
class SubmitSettings:
    """`slurm`: whether the job is queued. All other words are settings of the run.

    Attributes:
        submit: queue the job; with `false` its folder is made and its script shown.
    """

    submit: bool = True


def split(settings: Sequence[str]) -> tuple[SlurmConfig, SubmitSettings, list[str]]:
    """The checked settings of the queue, and what is left for the run. ValueError for an unknown key or value.

    `parallel.nodes` follows from `slurm.nodes` unless the run says it.
    """
    ours = [setting for setting in settings if setting.startswith("slurm.")]
    submit = [setting for setting in settings if setting.partition("=")[0] in dict(leaves(SubmitSettings))]
    rest = [setting for setting in settings if setting not in ours and setting not in submit]
    config = read(SlurmConfig, ours, "slurm", "slurm.")
    has_nodes = any(word.lstrip("+").partition("=")[0] == "parallel.nodes" for word in rest)
    if config.nodes is not None and not has_nodes:
        rest.append(f"parallel.nodes={config.nodes}")
    return config, read(SubmitSettings, submit, "slurm"), rest
