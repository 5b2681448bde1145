"""What earlier runs read of their sources: what a branch needs to know so as to go on where they stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceRead:
    """One source of a run, as the run read it.

    Attributes:
        name: of the source.
        weight: its share of the rows; 0 for one that an earlier run read and this one does not.
        seed: what shuffles its rows.
        num_tokens: of its training split.
        whole_shards: checksum of what the tokens are, and of all shards but the last.
        last_shard_tokens: tokens of the last shard.
        last_shard: SHA-256 of the last shard.
        tokenizer: checksum of the tokenizer.
        folder: where the tokens lay.
        continues: the source of the run before whose tokens these are, or begin with; null where there is none.
    """

    name: str
    weight: float
    seed: int
    num_tokens: int
    whole_shards: str
    last_shard_tokens: int
    last_shard: str
    tokenizer: str
    folder: str
    continues: str | None = None


@dataclass(frozen=True)
class Reading:
    """What an earlier run read: rows of `seq_len` tokens at all positions before `until`, counted from the first run's
    first row, dealt out to `sources` by (seed, position)."""

    until: int
    seq_len: int
    seed: int
    sources: Sequence[SourceRead]

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the sources that are read."""
        return {source.name: source.weight for source in self.sources if source.weight}
