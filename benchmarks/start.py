"""`python -m benchmarks.start [rounds=5]`: what it costs to ask, and the way from a command to the first step.

Each row is a process of its own, the best of some rounds in turns, so that what else the machine does counts least.
The last row is a job of four ranks (pp 2 x dp 2, experts over two) whose data are prepared, from the command to the
line of its first step.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks._sides import wall
from train.settings import read

# What a process does, and the words that start it.
ROWS = {
    "python": ["-c", ""],
    "import torch": ["-c", "import torch"],
    "compose a config": ["-c", "from train import compose; compose.compose([])"],
    "python -m launch --help": ["-m", "launch", "--help"],
    "python -m launch local --help": ["-m", "launch", "local", "--help"],
    "python -m launch config": ["-m", "launch", "config"],
    "python -m launch report --help": ["-m", "launch", "report", "--help"],
    "python -m train --help": ["-m", "train", "--help"],
}
UNIT = "import torch"
FIRST_STEP = "four ranks to their first step"
JOB = "parallel=four train.max_steps=1 evaluate.num_sequences=4 track.wandb=disabled run.device=cpu"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        rounds: how often each process is started.
    """

    rounds: int = 5

    def check(self) -> None:
        """ValueError without a round."""
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be a whole number of at least 1")


def measure(rounds: int) -> dict[str, float]:
    """Seconds of the quickest start of each row."""

    def start(words: list[str]) -> None:
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    taken: dict[str, list[float]] = {name: [] for name in [*ROWS, FIRST_STEP]}
    with tempfile.TemporaryDirectory() as folder:
        data = write_text(Path(folder))
        for number in range(rounds):
            for name, words in ROWS.items():
                taken[name].append(wall(lambda words=words: start(words)))  # type: ignore[misc]
            taken[FIRST_STEP].append(first_step([*data, f"run.dir={folder}/run-{number}"]))
    return {name: min(seconds) for name, seconds in taken.items()}


def write_text(folder: Path) -> list[str]:
    """Prepared tokens of a little text in `folder`, and the settings that read them."""
    (folder / "text").mkdir()
    for number in range(20):
        lines = (f"line {line} of text {number}, {line * number} in all\n" for line in range(500))
        (folder / "text" / f"{number}.txt").write_text("".join(lines))
    settings = [f"data.source={folder}/text", f"data.dir={folder}/tokens", "data.valid_fraction=0.3"]
    subprocess.run([sys.executable, "-m", "launch", "prepare", *settings], check=True, stdout=subprocess.DEVNULL)
    return settings


def first_step(settings: list[str]) -> float:
    """Seconds from the command to the line of the first step."""
    command, start_s = [sys.executable, "-m", "launch", "local", *JOB.split(), *settings], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        line = next((line for line in job.stdout if line.startswith("step=1/")), None)
        taken_s = time.perf_counter() - start_s
        job.stdout.read()
    if line is None or job.returncode:
        raise SystemExit(f"the job ended with exit code {job.returncode}")
    return taken_s


def main(arguments: list[str]) -> None:
    try:
        settings = read(Settings, arguments, "benchmarks.start")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    found = measure(settings.rounds)
    print(f"{'process':34s}{'s':>8s}{'of ' + UNIT:>17s}")
    for name, seconds in found.items():
        print(f"{name:34s}{seconds:8.2f}{seconds / found[UNIT]:17.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
