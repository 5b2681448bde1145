"""`track.alert`: a command of the user's, told of what has gone wrong with a run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from train.files import in_words

# A command that takes longer is left to itself: under Slurm it is then ended with the job, elsewhere it goes on.
PATIENCE_S = 20.0


def tell(command: str, folder: Path, line: bytes, variables: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Run a command of the shell, with a line of JSON on its standard input. What it prints goes nowhere.

    A command that fails, or cannot be run, ends nothing: a sentence says so.

    Args:
        folder: of the run, as HALOCLINE_RUN in the command's environment.
        variables: further ones of its environment.
    """
    place = {**os.environ, "HALOCLINE_RUN": str(folder.absolute()), **variables}
    nowhere = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            env=place,
            stdin=subprocess.PIPE,
            stdout=nowhere,
            stderr=nowhere,
            start_new_session=True,
        )
        process.communicate(line, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        say(f"track.alert={command} has not ended within {PATIENCE_S:.0f} s: it is left to itself")
    except OSError as error:
        say(f"track.alert={command} cannot be run: {in_words(error)}")
    else:
        if process.returncode:
            say(f"track.alert={command} has failed with exit code {process.returncode}")
