"""`run.dir`: one job at a time writes it, and every rank keeps a log there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from train.files import locked

log = logging.getLogger("train")


def log_path(folder: Path, rank: int) -> Path:
    """Where a rank of a run says what it does."""
    return folder / "logs" / f"rank_{rank}.log"


@contextmanager
def opened(folder: Path, rank: int, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """This rank's log, line by line, while the run lasts; the last line of a failed one says why.

    Rank 0 also holds a lock, on its log, which dies with its process: two jobs that write one folder would spoil it.

    Args:
        expected: errors that a sentence explains; others are logged with their traceback.

    Raises ValueError, before a line is written, when another job is running there or the folder cannot be made.
    """
    path = log_path(folder, rank)
    with _append(path) as file, locked(path, _in_use(folder)) if rank == 0 else nullcontext():
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        # Libraries speak here from warnings on, our rooms from the start.
        logging.getLogger().addHandler(handler)
        logging.getLogger("train").setLevel(logging.INFO)
        try:
            yield
        except Exception as error:
            log.error("%s", error, exc_info=not isinstance(error, expected))
            raise
        finally:
            logging.getLogger().removeHandler(handler)


def refuse_if_in_use(folder: Path) -> None:
    """ValueError when a job is running in this folder. It may be started right afterwards: its rank 0 asks again."""
    path = log_path(folder, 0)
    if path.exists():
        with locked(path, _in_use(folder)):
            pass


def make(key: str, folder: Path) -> None:
    """A folder that the setting `key` names. ValueError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be written: {error.strerror}, {error.filename}") from None


def _append(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        folder = path.parent.parent
        raise ValueError(f"run.dir={folder} cannot be written: {error.strerror}, {error.filename}") from None


def _in_use(folder: Path) -> str:
    return f"run.dir={folder} is in use by a running job: choose another run.dir"
