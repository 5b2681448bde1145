"""What a run reads: one source's rows, or those of several, blended by weight."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from train.data.config import DataConfig
from train.data.meta import TOKENIZER, Meta
from train.data.past import Reading
from train.data.rows.epochs import Rows
from train.data.rows.follow import Followed, follow
from train.data.rows.shares import Shares
from train.data.rows.tokens import DocumentSpan, Tokens


class Stream(Protocol):
    """An endless stream of rows, each a function of (seed, position) alone."""

    @property
    def num_rows(self) -> int:
        """Positions from the first on in which no row comes twice."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal exactly where the same seed reads the same tokens at the same positions."""
        ...

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends every document."""
        ...

    @property
    def unigram_entropy_nats(self) -> float | None:
        """Entropy of the tokens' frequencies, in nats per token; None where they are of several sources."""
        ...

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows at positions [first, first + count): int64 [count, seq_len + 1]."""
        ...

    def num_targets(self, first: int, count: int) -> int:
        """How many tokens those rows have to predict."""
        ...

    def documents(self, position: int) -> list[DocumentSpan]:
        """The documents that the row at this position is cut from."""
        ...

    def exposures(self, num_positions: int) -> list[Exposure]:
        """What a run over so many positions sees of each source, what the runs saw that it branches off included."""
        ...

    @property
    def followed(self) -> Followed:
        """How it goes on in its sources after earlier runs, and what a branch has to know so as to do that."""
        ...


class Exposure(NamedTuple):
    """How often a run sees a source: its share of the positions, its tokens, how often it comes round."""

    name: str
    share: float
    num_tokens: int
    num_epochs: float


class OneSource:
    """The rows of one source."""

    def __init__(self, source: Rows, followed: Followed | None = None) -> None:
        self._source, self.followed = source, followed or Followed()
        place = self.followed.place
        # From positions of the run to those of the source, which differ where an earlier run read others beside it.
        self._ahead = sum(place.before.values()) - place.first

    @property
    def num_rows(self) -> int:
        return self._source.num_rows

    @property
    def fingerprint(self) -> str:
        return self._source.tokens.fingerprint

    @property
    def end_of_document(self) -> int:
        return self._source.tokens.eod

    @property
    def unigram_entropy_nats(self) -> float | None:
        return self._source.tokens.unigram_entropy_nats

    def rows(self, first: int, count: int) -> torch.Tensor:
        return self._source.rows(first + self._ahead, count)

    def num_targets(self, first: int, count: int) -> int:
        return self._source.num_targets(first + self._ahead, count)

    def documents(self, position: int) -> list[DocumentSpan]:
        return self._source.documents(position + self._ahead)

    def exposures(self, num_positions: int) -> list[Exposure]:
        rows, end = self._source, num_positions + self._ahead
        return [Exposure(rows.tokens.folder.name, 1.0, rows.cut.tokens(end), rows.cut.epochs(end))]


class Blend:
    """Rows of several sources. A weight is a share of the rows, which are equally long, and so of the tokens.

    Each source is an endless stream of its own, with its own permutation for each epoch, drawn by (seed, its name).
    """

    def __init__(
        self,
        sources: Mapping[str, Rows],
        weights: Mapping[str, float],
        seed: int,
        followed: Followed | None = None,
    ) -> None:
        self.sources, self._shares, self.followed = dict(sources), Shares(weights, seed), followed or Followed()
        # Since which position these weights hold, and how many rows of each source lay before it.
        self._first, self._before = self.followed.place

    @property
    def num_rows(self) -> int:
        def is_too_many(num_positions: int) -> bool:
            counts = self._shares.counts(num_positions)
            return any(counts[name] > rows.num_rows for name, rows in self.sources.items())

        most = sum(rows.num_rows for rows in self.sources.values())
        return bisect_left(range(1, most + 1), True, key=is_too_many)

    @property
    def fingerprint(self) -> str:
        return _blended(self._shares, {name: rows.tokens.fingerprint for name, rows in self.sources.items()})

    @property
    def end_of_document(self) -> int:
        return next(iter(self.sources.values())).tokens.eod

    @property
    def unigram_entropy_nats(self) -> float | None:
        return None

    def rows(self, first: int, count: int) -> torch.Tensor:
        found = [self.sources[name].rows(index, 1) for name, index in self._places(first, count)]
        empty = next(iter(self.sources.values())).rows(0, 0)
        return torch.cat([empty, *found])

    def num_targets(self, first: int, count: int) -> int:
        before, after = self._counts(first), self._counts(first + count)
        return sum(rows.num_targets(before[name], after[name] - before[name]) for name, rows in self.sources.items())

    def documents(self, position: int) -> list[DocumentSpan]:
        ((name, index),) = self._places(position, 1)
        return self.sources[name].documents(index)

    def exposures(self, num_positions: int) -> list[Exposure]:
        counts = self._counts(num_positions)
        return [
            Exposure(name, float(weight), rows.cut.tokens(counts[name]), rows.cut.epochs(counts[name]))
            for name, weight in self._weights()
            for rows in [self.sources[name]]
        ]

    def _counts(self, num_positions: int) -> dict[str, int]:
        """How many rows of each source lie at the first positions."""
        counts = self._shares.counts(num_positions - self._first)
        return {name: self._before.get(name, 0) + count for name, count in counts.items()}

    def _weights(self) -> list[tuple[str, Fraction]]:
        return list(self._shares.weights.items())

    def _places(self, first: int, count: int) -> list[tuple[str, int]]:
        if first < 0 or count < 0:
            raise ValueError(f"first={first} and count={count} must not be negative")
        found = [self._shares.at(position - self._first) for position in range(first, first + count)]
        return [(name, self._before.get(name, 0) + index) for name, index in found]


def open_stream(
    config: DataConfig,
    split: str,
    seq_len: int,
    seed: int = 0,
    order: str = "shuffled",
    past: Sequence[Reading] = (),
) -> Stream:
    """The rows of a split that `prepare_sources` has prepared. ValueError where a source is not whole or too short.

    past: of a branch, what the runs before it have read, in order; it goes on from there (docs/branches.md).
    """
    opened = {name: Tokens.open(source.folder, split) for name, source in config.sources.items()}
    tokenizers = {tokens.meta.tokenizer_digest for tokens in opened.values()}
    if len(tokenizers) > 1:
        raise ValueError(f"the sources of data.blend in {config.folder} are of several tokenizers: prepare them again")
    weights = {each.name: each.weight for each in config.blend} or dict.fromkeys(opened, 1.0)
    seeds = {name: seed_of(seed, name) if config.blend else seed for name in opened}
    followed = follow(past, opened, weights, seeds, seed, seq_len)
    sources = {
        name: Rows(tokens, seq_len, seeds[name], order, config.document_mask, followed.cuts.get(name))
        for name, tokens in opened.items()
    }
    if config.blend:
        return Blend(sources, weights, seed, followed)
    return OneSource(next(iter(sources.values())), followed)


def prepared_fingerprint(config: DataConfig) -> str:
    """`Stream.fingerprint` of what lies prepared, read from its descriptions alone. ValueError where one is missing."""
    found = {name: Meta.load(source.folder).fingerprint for name, source in config.sources.items()}
    if not config.blend:
        return found[config.name]
    return _blended(Shares({each.name: each.weight for each in config.blend}, seed=0), found)


def prepared_tokenizer(config: DataConfig) -> Path:
    """The `tokenizer.json` beside prepared tokens: that of any source, as a blend has one for all."""
    return next(iter(config.sources.values())).folder / TOKENIZER


def check_same_tokens(config: DataConfig, fingerprint: str) -> None:
    """ValueError unless what lies prepared is what a run has read, whose state has this fingerprint of its data."""
    if prepared_fingerprint(config) not in fingerprint:
        raise ValueError(
            f"{config.folder} was prepared anew since the run: name the run's tokenizer with tokenizer=PATH"
        )


def _blended(shares: Shares, fingerprints: Mapping[str, str]) -> str:
    parts = [f"{name} {weight} {fingerprints[name]}" for name, weight in shares.weights.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def seed_of(seed: int, name: str) -> int:
    """A source's own seed: sources of equal length must not be shuffled alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def check_epochs(stream: Stream, num_positions: int, max_epochs: float | None) -> None:
    """ValueError when a run of so many positions sees a source more often than `data.max_epochs`."""
    for each in stream.exposures(num_positions):
        if each.num_epochs > (math.inf if max_epochs is None else max_epochs):
            raise ValueError(
                f"data.max_epochs={max_epochs}, and the run would see {each.name} {each.num_epochs:.2f} times "
                f"({each.num_tokens} tokens): shorten the run, lower its weight in data.blend, or add text"
            )


def exposure_table(stream: Stream, num_positions: int) -> str:
    """What the run will see of each source, as lines of text."""
    lines = [f"{'source':<24}{'share':>9}{'tokens':>18}{'epochs':>9}"]
    for each in stream.exposures(num_positions):
        lines.append(f"{each.name:<24}{each.share:>9.2%}{each.num_tokens:>18,}{each.num_epochs:>9.2f}")
    return "\n".join(lines)
