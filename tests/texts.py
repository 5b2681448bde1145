"""A library of source files, the same on every machine: what runs in tests are trained on.

The standard library would be another text under another Python, and with it every loss, every near-tie of a router and
every bound that was measured.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

STARTS = ("get", "set", "parse", "make", "find", "is", "add", "join", "read", "check")
SUBJECTS = ("header", "line", "token", "part", "charset", "value", "message", "name", "address", "payload")
WORDS = ("the", "a", "of", "and", "returns", "whether", "if", "it", "each", "one", "for", "with", "in", "all", "empty")


class Author:
    """Writes functions and their comments. Common words are common: the place of a word is the square of a draw."""

    def __init__(self, seed: int) -> None:
        # `random` alone is the same in every version of Python.
        self._draw = random.Random(seed).random

    def pick(self, items: Sequence[str]) -> str:
        return items[int(self._draw() ** 2 * len(items))]

    def name(self) -> str:
        return f"{self.pick(STARTS)}_{self.pick(SUBJECTS)}"

    def sentence(self) -> str:
        words = [self.pick((*WORDS, *SUBJECTS)) for _ in range(4 + int(self._draw() * 8))]
        return " ".join(words).capitalize() + "."

    def statement(self) -> str:
        one, other = self.pick(SUBJECTS), self.pick(SUBJECTS)
        return self.pick(
            (
                f"{one} = self.{self.name()}({other})",
                f"if not {one}:\n            return {other}",
                f"{one} += {other}[{int(self._draw() * 100)}:]",
                f"for {one} in self._{other}s:\n            {self.name()}({one}, {other})",
                f"# {self.sentence()}",
                f'raise ValueError("{self.sentence()}")',
            )
        )

    def function(self) -> str:
        body = "\n        ".join(self.statement() for _ in range(2 + int(self._draw() * 6)))
        head = f"    def {self.name()}(self, {self.pick(SUBJECTS)}):"
        return f'{head}\n        """{self.sentence()}"""\n        {body}\n\n'


def write_library(folder: Path, seed: int = 0, num_files: int = 30) -> Path:
    """`num_files` files of some 9 kB in `folder`, unless it is there; another seed, another library."""
    if not folder.exists():
        author = Author(seed)
        folder.mkdir(parents=True)
        for number in range(num_files):
            functions = "".join(author.function() for _ in range(30))
            (folder / f"{number:02d}_{author.pick(SUBJECTS)}.py").write_text(f"class Part{number}:\n{functions}")
    return folder
