"""`python -m benchmarks.start [rounds=5]`: what it costs to ask, before anything trains.

Each row is a process of its own, the best of some rounds in turns, so that what else the machine does counts least.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

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

    taken: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(rounds):
        for name, words in ROWS.items():
            taken[name].append(wall(lambda words=words: start(words)))  # type: ignore[misc]
    return {name: min(seconds) for name, seconds in taken.items()}


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
