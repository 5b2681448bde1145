"""`run.dir`: one job at a time writes it, and every rank keeps a log there."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from train.cli import console
from train.files import in_words, locked, refusing
from train.track.console import ConsoleWarnings

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
    with _appending(path) as file, locked(path, _in_use(folder)) if rank == 0 else nullcontext():
        handlers = [_Log(file, path), *([ConsoleWarnings()] if rank == 0 else [])]
        # Libraries speak here from warnings on, our rooms from the start.
        logging.getLogger("train").setLevel(logging.INFO)
        logging.captureWarnings(True)
        for handler in handlers:
            logging.getLogger().addHandler(handler)
        for sentence in console.losses():
            log.info("%s", sentence)
        try:
            yield
        except Exception as error:
            log.error("%s", error, exc_info=not isinstance(error, expected))
            raise
        finally:
            logging.captureWarnings(False)
            for handler in handlers:
                logging.getLogger().removeHandler(handler)


class _Log(logging.StreamHandler[IO[str]]):
    """Writes a rank's log. A line that the disk refuses ends nothing: one warning says that lines are missing."""

    def __init__(self, file: IO[str], path: Path) -> None:
        super().__init__(file)
        self._path, self._is_whole = path, True
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called with the error that writing the record has raised."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self._is_whole:
            self._is_whole = False
            log.warning(
                "%s cannot be written (%s): lines are missing in it; the run goes on", self._path, in_words(error)
            )


def refuse_if_in_use(folder: Path) -> None:
    """ValueError when a job is running in this folder. It may be started right afterwards: its rank 0 asks again."""
    path = log_path(folder, 0)
    if path.exists():
        with locked(path, _in_use(folder)):
            pass


def make(key: str, folder: Path) -> None:
    """A folder that the setting `key` names. ValueError when it cannot be made."""
    with refusing(f"{key}={folder}"):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _appending(path: Path) -> Iterator[IO[str]]:
    with refusing(f"run.dir={path.parent.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # of lines that are said to be missing
            file.close()


def _in_use(folder: Path) -> str:
    return f"run.dir={folder} is in use by a running job: choose another run.dir"
