"""What can be wrong with a document or a file, in words, and how often it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from train.data.read.blocks import MAX_LINE_BYTES, Trouble

# Reasons to pass something over.
BAD = {
    "empty": "empty",
    "undecodable": "not UTF-8 text",
    "unreadable": "could not be read",
    "changed": "changed since it was listed",
    "corrupt": "damaged",
    "not_json": "no JSON",
    "missing": "without data.text_field",
    "wrong_type": "data.text_field is no text",
    "ambiguous": "JSON lines without data.text_field under a name that says nothing of them (data.format=text trains "
    "on them as they stand)",
    "giant": f"a line longer than {MAX_LINE_BYTES >> 20} MiB",
}
# What is only noted.
NOTED = {"cut": "longer than data.max_document_bytes, cut at line ends", "duplicate": "the same text again"}
REASONS = {**BAD, **NOTED}
_NUM_EXAMPLES = 10  # of each reason, in the report


@dataclass(frozen=True)
class Skipped:
    """Documents of one kind that were passed over or noted: how many, and the first few of them in words."""

    count: int
    examples: tuple[str, ...]


class Troubles:
    """Counts trouble by reason; under `refuse` the first document that would be passed over is a ValueError."""

    def __init__(self, name: Callable[[int], str], refuse: bool) -> None:
        """name: what the file with an index is called."""
        self._name, self._refuse = name, refuse
        self._counts = dict.fromkeys(REASONS, 0)
        self._examples: dict[str, list[str]] = {reason: [] for reason in REASONS}

    @property
    def num_bad(self) -> int:
        """Documents and files that were passed over."""
        return sum(self._counts[reason] for reason in BAD)

    def add(self, troubles: Iterable[Trouble]) -> None:
        """Count each; ValueError, naming file and line or row, where the first bad one is to be refused."""
        for trouble in troubles:
            self._count(trouble.reason, self.in_words(trouble))

    def add_unlisted(self, names: Iterable[str]) -> None:
        """Files and folders that could not even be listed."""
        for name in names:
            self._count("unreadable", name)

    def _count(self, reason: str, words: str) -> None:
        if self._refuse and reason in BAD:
            raise ValueError(f"{words}: {BAD[reason]}; data.on_bad_document=skip would count it and go on")
        self._counts[reason] += 1
        if len(self._examples[reason]) < _NUM_EXAMPLES:
            self._examples[reason].append(words)

    def in_words(self, trouble: Trouble) -> str:
        """Where it was, and what else is known."""
        where = f", {trouble.where}" if trouble.where else ""
        detail = f" ({trouble.detail})" if trouble.detail else ""
        return f"{self._name(trouble.file)}{where}{detail}"

    def found(self) -> str:
        """How many of each bad reason, in words, and the first of them; empty when there are none."""
        return "; ".join(
            f"{self._counts[reason]} {BAD[reason]}, as in {self._examples[reason][0]}"
            for reason in BAD
            if self._counts[reason]
        )

    def skipped(self) -> dict[str, Skipped]:
        """Counts and examples of every reason."""
        return {reason: Skipped(self._counts[reason], tuple(self._examples[reason])) for reason in REASONS}

    def restore(self, skipped: Mapping[str, Skipped]) -> None:
        """Go on from what `skipped` gave."""
        for reason, each in skipped.items():
            self._counts[reason], self._examples[reason] = each.count, list(each.examples)
