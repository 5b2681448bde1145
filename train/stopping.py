"""Requests to stop, by signal: SIGINT, SIGTERM, SIGHUP and SIGUSR1 all ask a run to save and end.

Where there is nothing to save yet, a request ends the process at once. A second SIGINT, or a second SIGTERM, ends it at
once wherever it is. One of another kind is the same request: torchrun sends SIGTERM to ranks that Ctrl-C has reached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from train import environment

log = logging.getLogger("train")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_IMPATIENT = (signal.SIGINT, signal.SIGTERM)
# A scheduler may signal a launcher and its ranks alike, and the launcher passes it on: within this it is one request.
PASSED_ON_S = 2.0


class StopRequest:
    """What has been asked by signals so far.

    Attributes:
        asked: the run is to save and end.
        insisted: and was asked again; only where `insist` lets this process live on.
    """

    def __init__(
        self,
        end: Callable[[int, str], object] | None = None,
        insist: Callable[[int, str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        end: is given an exit code and a sentence where a request ends the process at once.
        insist: what to do in place of `end` with a second request.
        """
        self.asked = self.insisted = False
        self._end, self._insist, self._clock = end, insist or end, clock
        self._first_s: dict[int, float] = {}
        self._is_honoured = False
        # Ranks have a launcher, whose signals they may get a second time from elsewhere.
        self._apart_s = PASSED_ON_S if "RANK" in os.environ else 0.0

    def honour(self) -> None:
        """From here on there is something to save: a first request is noted, and the work looks at it."""
        self._is_honoured = True

    def leave(self) -> None:
        """From here on the process is about to end, with words of its own: requests change nothing."""
        self._is_honoured, self._end, self._insist = True, None, None

    def take(self, number: int) -> None:
        """A signal has come."""
        now_s, name = self._clock(), signal.Signals(number).name
        is_second = number in self._first_s and now_s - self._first_s[number] >= self._apart_s
        is_first, self.asked = not self._first_s, True
        self._first_s.setdefault(number, now_s)
        if not self._is_honoured:
            _call(self._end, 128 + number, f"stopped by {name} before the first step: there was nothing to save")
        elif is_second and number in _IMPATIENT:
            self.insisted = True
            words = f"asked a second time to stop, by {name}: ended at once, without a further checkpoint"
            _call(self._insist, 128 + number, words)
        elif is_first and self._end is not None:
            say(f"asked to stop by {name}: saves after the step that it is in; the same signal again ends it at once")


def say(sentence: str) -> None:
    """In the log, and for people who look at a terminal and wait."""
    log.info("%s", sentence)
    if environment.speaks() and os.isatty(2):
        with contextlib.suppress(OSError):
            os.write(2, f"{sentence}\n".encode())


def _call(end: Callable[[int, str], object] | None, code: int, sentence: str) -> None:
    if end is not None:
        end(code, sentence)


@contextmanager
def stop_signals(
    end: Callable[[int, str], object], insist: Callable[[int, str], object] | None = None
) -> Iterator[StopRequest]:
    """Inside, the signals are requests. A thread takes them, so that one is heard while the main thread waits in a
    library, where no handler of Python's would run. `end` and `insist` as for `StopRequest`; both run in that thread.

    A hang-up that is ignored already (nohup) stays so. Call it in the main thread.
    """
    stop = StopRequest(end, insist)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def note(*_: object) -> None:
        stop.asked = True  # at once where the main thread runs; all else is the thread's to decide

    def listen() -> None:
        while numbers := ours.recv(64):
            for number in numbers:
                if number in before:
                    stop.take(number)

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, note) for number in SIGNALS if number not in ignored}
    thread.start()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        thread.join()
        ours.close()


@contextmanager
def within(limit_s: float, end: Callable[[], object]) -> Iterator[None]:
    """`end` is called, in a thread, if the block has not ended by then."""
    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tell_torchrun(sentence: str | None) -> None:
    """Leave this process's last words where torchrun looks for them: it shows them last, in its table of failures.

    None takes back what was said.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and sentence is None:
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
    elif path:
        body = {"message": {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(body))


def end_now(code: int, sentence: str = "") -> NoReturn:
    """End this process from any thread, whatever the others do: nothing is unwound, and nothing waited for."""
    if sentence:
        # Not through sys.stderr, whose lock a thread may hold that waits.
        with contextlib.suppress(OSError):
            os.write(2, f"{sentence}\n".encode())
    os._exit(code)


def ended(main: Callable[[], int]) -> NoReturn:
    """End this process with the exit code that `main` returns, at once. Python's way of ending waits for threads of
    libraries, which after a failure wait for ranks that are gone, for minutes."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a console that is gone
            stream.flush()
    end_now(code)
