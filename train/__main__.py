"""`torchrun ... -m train key=value ...`, or `python -m train key=value ...` for one process: one rank of one run.

Settings are read before torch is imported, so that help and mistakes cost a moment.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from train import compose, environment
from train.cli import console, usage
from train.config import RunConfig
from train.stopping import end_now, ended, stop_signals

# The exit code of settings that were refused (`train.rank` has the others).
REFUSED = 2
# All ranks meet the same mistake in the settings, one of a machine says it, and torchrun ends the rest when that exits.
# A rank that nobody ends within this time has a mistake of its own.
LET_RANK_0_SPEAK_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Help, the composed tree, or one rank's part of the run that the settings describe; returns the exit code."""
    console.take()
    if any(word in usage.HELP for word in arguments):
        print(usage.run_help("python -m train"))
        return 0
    speaks = environment.speaks()
    with stop_signals(lambda code, sentence: end_now(code, sentence if speaks else "")) as stop:

        def start(config: RunConfig) -> int:
            if config.run.kernels == "compiled":
                environment.check_compiler()
            from train.rank import run_rank

            return run_rank(config, lambda: compose.asked(arguments), stop, speaks)

        try:
            environment.read()
            return compose.started(arguments, start)
        except ValueError as error:  # of the settings: those of the run itself are exit codes by now
            stop.leave()
            end_s = time.monotonic() + LET_RANK_0_SPEAK_S
            while not speaks and not stop.asked and time.monotonic() < end_s:
                time.sleep(0.05)
            if speaks:
                print(error, file=sys.stderr)
            elif not stop.asked:
                print(f"rank {os.environ.get('RANK')}: {error}", file=sys.stderr)
            return REFUSED


def program(arguments: Sequence[str]) -> NoReturn:
    """`main` in a process of its own."""
    ended(lambda: main(arguments))


if __name__ == "__main__":
    program(sys.argv[1:])
