"""Ranks forked from one process that has imported everything they need: a rank then starts in a moment, not in seconds.

The process is Python's own fork server (`multiprocessing`, context "forkserver"): a program of its own, started early,
so that it imports while this one prepares data. It has started no thread and touched no device, which is what makes
forking it safe; where a device might be touched by importing, ranks are programs of their own instead (`may_fork`).
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from train.environment import num_threads

# What every rank imports sooner or later. DeepSpeed may be absent: what cannot be imported is passed over here, and
# explained by the rank that needs it.
MODULES = ("launch.warm_parent", "train.rank", "train.assemble", "train.recipe.adamw", "torch._dynamo", "deepspeed")
# Where the packages of this program lie.
PROGRAM = Path(__file__).resolve().parent.parent
# What a terminal that closes, or a scheduler, sends to all processes of a job. The one that ranks are forked from must
# live on, or the launcher would not hear how they end.
IGNORED = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def own_path() -> dict[str, str]:
    """Variables under which a Python imports this program, whatever files lie in the working folder."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(PROGRAM), *([before] if before else [])])}


def may_fork(device: str) -> bool:
    """Whether ranks on `run.device` may be forked: on Linux, where no NVIDIA driver could be woken by an import."""
    return sys.platform == "linux" and device != "cuda" and not Path("/proc/driver/nvidia").exists()


def warm_up(environment: Mapping[str, str]) -> None:
    """Start the process that ranks are forked from, unless it runs; returns at once, while it imports.

    environment: of that process, where this one's does not say otherwise: what a rank cannot set for itself, as its
        memory allocator and its thread pools read them when they are loaded.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(MODULES))
    defaults = {"DS_ACCELERATOR": "cpu", **environment}
    with _variables({**{name: value for name, value in defaults.items() if name not in os.environ}, **own_path()}):
        multiprocessing.forkserver.ensure_running()


class ForkedRank:
    """One rank, with the part of `subprocess.Popen` that the launcher uses."""

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path, out: Path | None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self._process: BaseProcess = context.Process(
            target=_rank, args=(module, list(arguments), dict(environment), str(log), None if out is None else str(out))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """Exit code, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Its exit code, once it has ended."""
        self._process.join()
        return self._process.exitcode

    def terminate(self) -> None:
        """Ask it to end, by SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        self._process.kill()


def follow_into_death(by: int = signal.SIGTERM) -> None:
    """The kernel sends this process a signal when the one that started it dies. Else it would go on unwatched."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


def _rank(module: str, arguments: list[str], environment: dict[str, str], log: str, out: str | None) -> None:
    """Body of a forked rank: what a program of its own gets from the system, then `module.program(arguments)`.

    out: file for standard output; None for that of the launcher. Standard error goes to the log.
    """
    follow_into_death()
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)
    # A terminal's Ctrl-C reaches the launcher alone, which then asks the ranks to save.
    os.setsid()
    os.environ.update(environment)
    # What `ps -o comm` and `top` show.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"halocline-r{environment['RANK']}".encode())
    for descriptor, path in ((2, log), (1, out)):
        if path is not None:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.dup2(file, descriptor)
            os.close(file)
    torch = importlib.import_module("torch")
    torch.set_num_threads(num_threads(environment) or 1)
    importlib.import_module(module).program(arguments)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Inside, this process's environment has these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
