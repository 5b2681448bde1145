"""What proposes the jobs of a sweep: every cell of a grid in order, or a sampler that learns from jobs that ended."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from train.compose import Swept

MAX_NAME_LENGTH = 120
DEFAULT_NUM_TRIALS = 20


@dataclass(frozen=True)
class Proposal:
    """A job to run: its number from 0, the name of its folder, and the values of what varies, by key."""

    number: int
    name: str
    values: dict[str, str]


@dataclass(frozen=True)
class Result:
    """What a search learns of a job that ended.

    Attributes:
        status: finished, failed, diverged or pruned.
        value: the metric's last value; None where there is none that is finite.
        history: the metric by step, up to where the job was pruned.
    """

    status: str
    value: float | None
    history: dict[int, float] = field(default_factory=dict)


class Search(Protocol):
    """Proposes jobs one by one. Asked again from the start after a kill, it proposes the same ones again."""

    @property
    def num_jobs(self) -> int:
        """How many there will be."""

    @property
    def learns(self) -> bool:
        """Whether later proposals depend on results, so that no result may change afterwards."""

    def ask(self) -> Proposal | None:
        """The next job; None when all have been proposed."""

    def tell(self, number: int, result: Result) -> None:
        """A proposed job has ended. A second word about the same one changes nothing."""


class Grid:
    """All combinations; the last setting varies fastest."""

    learns = False

    def __init__(self, swept: Sequence[Swept]) -> None:
        self._jobs: list[Proposal] = []
        varied = [each.key for each in swept if len(each.choices) > 1]
        taken: set[str] = set()
        for number, values in enumerate(itertools.product(*(each.choices for each in swept))):
            by_key = dict(zip((each.key for each in swept), values, strict=True))
            name = _folder_name([f"{key.lstrip('+')}={by_key[key]}" for key in varied], taken)
            taken.add(name)
            self._jobs.append(Proposal(number, name, by_key))
        self.num_jobs = len(self._jobs)
        self._asked = 0

    def ask(self) -> Proposal | None:
        """The next cell."""
        if self._asked == self.num_jobs:
            return None
        self._asked += 1
        return self._jobs[self._asked - 1]

    def tell(self, number: int, result: Result) -> None:
        """Nothing: a grid does not learn."""


def _folder_name(varied: list[str], taken: set[str]) -> str:
    """What varies, in characters that a shell needs no quotes for; a long or taken name is told apart by a digest."""
    whole = ",".join(varied)
    name = re.sub(r"[^\w.,=+-]+", "_", whole) or "only"
    if len(name) > MAX_NAME_LENGTH or name in taken:
        name = f"{name[:MAX_NAME_LENGTH]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return name
