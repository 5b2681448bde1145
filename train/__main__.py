"""`torchrun ... -m train key=value ...`, or `python -m train key=value ...` for one process: one rank of one run.

Settings are read before torch is imported, so that help and mistakes cost a moment.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from train import compose
from train.cli import usage
from train.config import RunConfig

# The exit code of settings that were refused (`train.rank` has the others).
REFUSED = 2
# All ranks meet the same mistake in the settings, and torchrun ends the rest when the first one exits.
LET_RANK_0_SPEAK_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Help, the composed tree, or one rank's part of the run that the settings describe; returns the exit code."""
    if any(word in usage.HELP for word in arguments):
        print(usage.run_help("python -m train"))
        return 0
    rank, speaks = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"

    def start(config: RunConfig) -> int:
        from train.rank import run_rank

        return run_rank(config, rank, speaks)

    try:
        return compose.started(arguments, start)
    except ValueError as error:  # of the settings: those of the run itself are exit codes by now
        if speaks:
            print(error, file=sys.stderr)
        else:
            time.sleep(LET_RANK_0_SPEAK_S)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
