"""What a run finds in its environment, checked in one place: a launcher's variables, and programs that torch calls."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Variable -> the smallest and the largest whole number that it may be; None: any.
_LIMITS: dict[str, tuple[int, int | None]] = {
    "RANK": (0, None),
    "WORLD_SIZE": (1, None),
    "LOCAL_RANK": (0, None),
    "LOCAL_WORLD_SIZE": (1, None),
    "MASTER_PORT": (1, 65535),
    "OMP_NUM_THREADS": (1, None),
}
# What wandb and Hugging Face's trainers take for "yes" in WANDB_DISABLED, and wandb's words in WANDB_MODE as ours.
_TRUE = ("1", "true", "yes", "on", "y", "t")
_WANDB_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
# Names the file in which a launcher leaves its plan of the run.
PLAN_VARIABLE = "HALOCLINE_PLAN"
_LAUNCHER = "start the ranks with torchrun or python -m launch local, which set them"


@dataclass(frozen=True)
class Environment:
    """Where a launcher has put this process; a process alone without one.

    Attributes:
        local_rank: its number on this machine.
        local_world_size: processes on this machine; None where the launcher does not say.
        num_threads: of OMP_NUM_THREADS; None where it is not set.
        is_launched: whether a launcher said anything.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = None
    num_threads: int | None = None
    is_launched: bool = False


def read(environ: Mapping[str, str] = os.environ) -> Environment:
    """What the launcher says. ValueError for a variable that is no number, is missing, or contradicts another one."""
    rank, world_size = number(environ, "RANK"), number(environ, "WORLD_SIZE")
    local_rank, local_world_size = number(environ, "LOCAL_RANK"), number(environ, "LOCAL_WORLD_SIZE")
    number(environ, "MASTER_PORT")
    wandb_mode(environ)
    is_launched = rank is not None or world_size is not None
    if (world_size or 1) > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise ValueError(f"WORLD_SIZE={world_size} is set but {name} is not: {_LAUNCHER}")
    elif environ.get("MASTER_ADDR"):
        # torch meets at the address as soon as there is one, also alone, and then asks for all of them.
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            if not environ.get(name):
                address = environ["MASTER_ADDR"]
                raise ValueError(f"MASTER_ADDR={address} is set but {name} is not: unset it, or {_LAUNCHER}")
    _below("RANK", rank, "WORLD_SIZE", world_size or 1)
    _below("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world_size)
    if local_world_size is not None and is_launched and local_world_size > (world_size or 1):
        raise ValueError(f"LOCAL_WORLD_SIZE={local_world_size} is above WORLD_SIZE={world_size or 1}: {_LAUNCHER}")
    return Environment(rank or 0, world_size or 1, local_rank or 0, local_world_size, num_threads(environ), is_launched)


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what all of its machine would say: the first of them, or one that is not told which."""
    local_rank = environ.get("LOCAL_RANK", "").strip()
    return not local_rank.isdecimal() or int(local_rank) == 0


def num_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """OMP_NUM_THREADS, of which OpenMP takes the first number for the outermost threads; None where it is not set."""
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if not first.strip():  # an empty one is ignored by OpenMP too
        return None
    return number({"OMP_NUM_THREADS": first}, "OMP_NUM_THREADS")


def plan_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where a launcher leaves its plan of this run; None where nobody plans it."""
    return Path(environ[PLAN_VARIABLE]) if environ.get(PLAN_VARIABLE) else None


def fair_threads(num_ranks: int) -> int:
    """Threads of each of this machine's ranks, where nothing says how many: they share its cores."""
    return max(1, (os.cpu_count() or 1) // num_ranks)


def number(environ: Mapping[str, str], name: str) -> int | None:
    """A variable of the launcher as a whole number; None where it is not set. ValueError for anything else."""
    text = environ.get(name)
    if text is None:
        return None
    least, most = _LIMITS[name]
    value = int(text) if text.strip().isascii() and text.strip().isdecimal() else None
    if value is None or value < least or (most is not None and value > most):
        rule = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
        raise ValueError(f"the environment's {name}={text or repr(text)} must be {rule}, or not be set at all")
    return value


def wandb_mode(environ: Mapping[str, str] = os.environ) -> str | None:
    """online, offline or disabled, as WANDB_DISABLED or else WANDB_MODE ask for it; None where they do not.

    ValueError for a mode that there is not.
    """
    if environ.get("WANDB_DISABLED", "").strip().lower() in _TRUE:
        return "disabled"
    asked = environ.get("WANDB_MODE", "").strip().lower()
    if asked and asked not in _WANDB_MODES:
        raise ValueError(f"the environment's WANDB_MODE={asked} is not one of {', '.join(_WANDB_MODES)}")
    return _WANDB_MODES.get(asked)


def compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The words that start the C++ compiler which torch takes: those of CXX, or g++."""
    return shlex.split(environ.get("CXX", "")) or ["g++"]


def check_compiler(environ: Mapping[str, str] = os.environ) -> None:
    """ValueError unless there is the C++ compiler that torch takes for `run.kernels=compiled`: CXX, or g++."""
    words = compiler(environ)
    if shutil.which(words[0], path=environ.get("PATH")) is None:
        raise ValueError(
            f"run.kernels=compiled needs a C++ compiler, and there is no {words[0]} here: install one, name one in the "
            "environment's CXX, or leave run.kernels=auto"
        )


def _below(name: str, value: int | None, limit_name: str, limit: int | None) -> None:
    if value is not None and limit is not None and value >= limit:
        raise ValueError(f"{name}={value} must be below {limit_name}={limit}: {_LAUNCHER}")
