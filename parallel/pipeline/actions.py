"""What a rank can be told to do: one chunk (F, B, W or D), or a pair of chunks run together. Text form included.

    F   forward
    B   backward for the stage's input
    W   backward for the stage's weights, any time after its B
    D   full backward: B, then W
    pair   a forward and a full backward of different micro-batches in one go, so that each computes while the other
           communicates (F&B in the DeepSeek-V3 report, section 3.2.1; its B is our D)

As text: `F3.5` is the forward of micro-batch 5 through stage 3, `F0.7&D3.2` a pair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

KINDS = ("F", "B", "W", "D")
_CHUNK = re.compile(r"([FBWD])(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Chunk:
    """One stage's work of one kind for one micro-batch. ValueError for an unknown kind or a negative number."""

    kind: str
    stage: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.stage < 0 or self.micro_batch < 0:
            raise ValueError(f"{self}: stage and micro-batch must not be negative")

    @cached_property
    def parts(self) -> tuple[Chunk, ...]:
        """The F, B and W that this does, in order."""
        if self.kind == "D":
            return (Chunk("B", self.stage, self.micro_batch), Chunk("W", self.stage, self.micro_batch))
        return (self,)

    @property
    def words(self) -> str:
        """For a sentence."""
        return f"{self} (micro-batch {self.micro_batch} on stage {self.stage})"

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro_batch}"


@dataclass(frozen=True)
class Pair:
    """A forward and a full backward that run together. ValueError unless they are an F and a D of two micro-batches."""

    forward: Chunk
    backward: Chunk
    kind: ClassVar[str] = "pair"

    def __post_init__(self) -> None:
        if (self.forward.kind, self.backward.kind) != ("F", "D"):
            raise ValueError(f"{self}: a pair is an F and a D")
        if self.forward.micro_batch == self.backward.micro_batch:
            raise ValueError(f"{self}: the two of a pair must be of different micro-batches")

    @cached_property
    def parts(self) -> tuple[Chunk, ...]:
        """The F, B and W that this does; the F depends on neither of the others, nor they on it."""
        return (self.forward, *self.backward.parts)

    @property
    def words(self) -> str:
        """For a sentence."""
        first, second = self.forward, self.backward
        places = f"micro-batch {first.micro_batch} on stage {first.stage}, {second.micro_batch} on {second.stage}"
        return f"{self} ({places})"

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Action = Chunk | Pair


def parse_action(text: str) -> Action:
    """Reads what `str(action)` writes. ValueError for any other text."""
    chunks = []
    for part in text.split("&"):
        found = _CHUNK.fullmatch(part)
        if found is None:
            raise ValueError(f"{text!r} is not an action such as F3.5, B3.5, W3.5, D3.5 or F0.7&D3.2")
        chunks.append(Chunk(found[1], int(found[2]), int(found[3])))
    if len(chunks) > 2:
        raise ValueError(f"{text!r}: a pair is two chunks")
    return chunks[0] if len(chunks) == 1 else Pair(*chunks)
