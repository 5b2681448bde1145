"""The console of a program: standard output and standard error, either of which may go away while the program works.

A terminal is closed (EIO), a reader such as `head` leaves (EPIPE), the disk behind a redirection is full (ENOSPC), or a
stream was closed from the start (`>&-`). None of this is a reason to end a run, so an entry takes its console once,
before all else, and whatever prints afterwards, ours or a library's, prints through it.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

log = logging.getLogger(__name__)

# Where there is nobody to tell: whoever read or closed the stream did so on purpose.
_LEFT = (errno.EPIPE, errno.EIO, errno.EBADF)


class Console:
    """A standard stream that is dropped when it cannot be written; the log then says so, once.

    Everything that is not written passes to the stream itself.
    """

    def __init__(self, stream: TextIO, name: str, trouble: str = "") -> None:
        """trouble: why the stream was lost before it was taken, a sentence; empty where it works."""
        self._stream, self._name, self.trouble = stream, name, trouble
        if hasattr(stream, "reconfigure"):
            # An alphabet without some letter is no reason to end a run either.
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Shows the text, where there is still something to show it; its length."""
        self._guarded(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Shows all of them."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Shows what waits in the buffer. Python calls it as it ends, too, where an error would be the exit code."""
        self._guarded(self._stream.flush)

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        return bool(self._guarded(self._stream.isatty))

    def _guarded(self, call: Any) -> Any:
        if self.trouble:
            return None
        try:
            return call()
        except BlockingIOError:  # a terminal that does not keep up: this text is late or lost, the next one may come
            return None
        except OSError as error:
            self._drop(error.strerror or str(error), logging.INFO if error.errno in _LEFT else logging.WARNING)
        except ValueError:
            if not self._stream.closed:
                raise
            self._drop("it is closed", logging.INFO)
        return None

    def _drop(self, why: str, level: int) -> None:
        self.trouble = f"{self._name} is gone ({why}): nothing more is shown there"
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # a stream of Python's own, or a closed one
            pass
        else:
            # What the buffer still holds, and what libraries and child processes print past Python, goes nowhere now.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            os.close(null)
        log.log(level, "%s", self.trouble)


def take() -> None:
    """Make the standard streams of this process ones whose loss ends nothing. To be called before all else."""
    closed = [descriptor for descriptor in (0, 1, 2) if not _is_open(descriptor)]
    for descriptor in closed:
        # Otherwise the next file that is opened would get the number, and with it all that is printed.
        null = os.open(os.devnull, os.O_RDWR)
        assert null == descriptor, "the lowest free number is given"
        os.set_inheritable(null, True)
    for descriptor, attribute, name in ((1, "stdout", "standard output"), (2, "stderr", "standard error")):
        stream = getattr(sys, attribute)
        if isinstance(stream, Console):
            continue
        trouble = ""
        if stream is None or descriptor in closed:
            stream = open(descriptor, "w", closefd=False)  # noqa: SIM115
            trouble = f"{name} was closed from the start: nothing is shown there"
        setattr(sys, attribute, cast(TextIO, Console(stream, name, trouble)))


def losses() -> list[str]:
    """A sentence for each standard stream that has been lost so far: for a log that is only opened now."""
    streams: list[object] = [sys.stdout, sys.stderr]
    return [stream.trouble for stream in streams if isinstance(stream, Console) and stream.trouble]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
