"""Where a branch goes on in its sources: how far the runs before it have read each of them, and under which cuts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from train.data.meta import TOKENIZER
from train.data.past import Reading, SourceRead
from train.data.rows.cut import Cut
from train.data.rows.shares import Shares
from train.data.rows.tokens import Tokens
from train.files import SHA256, checksum_of


class Place(NamedTuple):
    """The position since which the weights of a blend hold, and how many rows of each source lay before it."""

    first: int = 0
    before: Mapping[str, int] = {}


@dataclass(frozen=True)
class Track:
    """A source under its last cut, read up to a position."""

    cut: Cut
    read: int


@dataclass(frozen=True)
class Followed:
    """How a run goes on in its sources.

    Attributes:
        place: in the blend.
        cuts: of each source; none for a new one.
        sources: what a branch of this run has to know; a source that is not read any more has weight 0.
        tracks: the sources of the run before, as it left them.
        before: what that run knew of them; None for a run that is no branch.
    """

    place: Place = field(default_factory=Place)
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    sources: Sequence[SourceRead] = ()
    tracks: Mapping[str, Track] = field(default_factory=dict)
    before: Reading | None = None

    def sentences(self) -> list[str]:
        """What a branch reads: of each source where it goes on, what is new, and what may be seen again."""
        earlier = {source.name: source for source in self.before.sources} if self.before else {}
        return [line for source in self.sources for line in self._of(source, earlier)]

    def _of(self, source: SourceRead, earlier: Mapping[str, SourceRead]) -> Iterator[str]:
        name = source.name
        if not source.weight:
            if earlier[name].weight:
                yield f"{name}: read no more, after {self.tracks[name].read:,} rows"
            return
        if source.continues is None:
            if name in self.tracks:
                seen = self.tracks[name].cut.tokens_in_epoch(self.tracks[name].read)
                yield (
                    f"{name}: its tokens are not those of the run before with more behind them, so it begins at its "
                    f"first row; up to {seen:,} tokens may be seen again before its first epoch is over"
                )
            else:
                yield f"{name}: new, {source.num_tokens:,} tokens, begins at its first row"
            return
        track, cut = self.tracks[source.continues], self.cuts[name]
        words = f"{name}: " if source.continues == name else f"{name}, which was {source.continues}: "
        if cut is track.cut:
            yield f"{words}goes on at row {track.read:,}, where the run before stopped"
            return
        if more := source.num_tokens - earlier[source.continues].num_tokens:
            words += f"{more:,} new tokens behind the {earlier[source.continues].num_tokens:,} of the run before; "
        yield f"{words}{_of_rest(cut, track)}"


def _of_rest(cut: Cut, track: Track) -> str:
    rest, is_counted = cut.rest()
    about = "" if is_counted else "about "
    read = track.cut.tokens_in_epoch(track.read)
    left_out = max(0, cut.num_tokens - 1 - read - round(rest) * cut.seq_len)
    return (
        f"{read:,} tokens of the epoch have been read; what follows are the {about}{rest:,.0f} of {cut.num_rows:,} "
        f"rows of {cut.seq_len} tokens that hold none of them, in a new random order; then the next epoch begins, for "
        f"which {about}{left_out:,} unread tokens wait that share a row with read ones"
    )


def follow(
    past: Sequence[Reading],
    opened: Mapping[str, Tokens],
    weights: Mapping[str, float],
    seeds: Mapping[str, int],
    seed: int,
    seq_len: int,
) -> Followed:
    """How a run goes on after `past`; one that is no branch begins at its first rows.

    Args:
        opened: the run's tokens by the names of its sources.
        weights: of its blend.
        seeds: what shuffles each source.
        seed: what draws the order of the sources.
        seq_len: of its rows.

    Raises ValueError where the tokens are of another tokenizer than those that were read.
    """
    place, tracks, position = Place(), dict[str, Track](), 0
    before: Reading | None = None
    for reading in past:
        place = _next_place(place, before, reading, tracks, position)
        tracks = _read(tracks, reading, place)
        before, position = reading, reading.until
    sources = [_source(opened[name], name, weights[name], seeds[name], opened, before) for name in opened]
    place = _next_place(place, before, Reading(position, seq_len, seed, sources), tracks, position)
    going_on = {source.name: (source, tracks[source.continues]) for source in sources if source.continues}
    taken = {source.continues for source in sources} | opened.keys()
    left = [
        dataclasses.replace(source, weight=0.0, continues=source.name)
        for source in (before.sources if before else ())
        if source.name not in taken
    ]
    cuts = {name: _cut(source, seq_len, track) for name, (source, track) in going_on.items()}
    return Followed(place, cuts, [*sources, *left], tracks, before)


def begins_with(tokens: Tokens, read: SourceRead) -> bool:
    """Whether tokens are those that were read, or these and more behind them."""
    shards, shard_tokens = _shards(tokens), _shard_tokens(tokens)
    num_whole = (read.num_tokens - read.last_shard_tokens) // shard_tokens
    if tokens.num_tokens < read.num_tokens or _digest(tokens, shards[:num_whole]) != read.whole_shards:
        return False
    if shards[num_whole] == read.last_shard:
        return True
    head = np.empty(read.last_shard_tokens, dtype=tokens.meta.dtype)
    tokens.copy(num_whole * shard_tokens, head)
    return hashlib.sha256(head.tobytes()).hexdigest() == read.last_shard


def _shards(tokens: Tokens) -> list[str]:
    """The checksum of every shard."""
    return [tokens.meta.files[name].checksum for name in tokens.meta.splits[tokens.split].shards]


def _shard_tokens(tokens: Tokens) -> int:
    return int(tokens.meta.settings["shard_tokens"])


def _digest(tokens: Tokens, shards: Sequence[str]) -> str:
    meta = tokens.meta
    return checksum_of([meta.tokenizer_digest, meta.eod, meta.dtype, _shard_tokens(tokens), list(shards)], SHA256)


def _source(
    tokens: Tokens, name: str, weight: float, seed: int, opened: Mapping[str, Tokens], before: Reading | None
) -> SourceRead:
    """The source, and which one of the run before it goes on with: its namesake, the only one, or one of its tokens."""
    earlier = before.sources if before else ()
    for other in earlier[:1]:
        if other.tokenizer != tokens.meta.tokenizer_digest:
            raise ValueError(
                f"the tokens of {name} in {tokens.folder} are of another tokenizer than those that the run before the "
                f"branch has read: prepare them with data.tokenizer={other.folder}/{TOKENIZER}"
            )
    named = [source for source in earlier if source.name == name]
    if not named and len(opened) == len(earlier) == 1:
        named = list(earlier)
    others = [source for source in earlier if source.name not in opened]
    found = next((source.name for source in [*named, *others] if begins_with(tokens, source)), None)
    shards = _shards(tokens)
    return SourceRead(
        name=name,
        weight=weight,
        seed=seed,
        num_tokens=tokens.num_tokens,
        whole_shards=_digest(tokens, shards[:-1]),
        last_shard_tokens=tokens.num_tokens - (len(shards) - 1) * _shard_tokens(tokens),
        last_shard=shards[-1],
        tokenizer=tokens.meta.tokenizer_digest,
        folder=str(tokens.folder),
        continues=found,
    )


def _next_place(
    place: Place, before: Reading | None, now: Reading, tracks: Mapping[str, Track], position: int
) -> Place:
    """The place of the next run: the same one where the blend goes on as it was."""
    if before is None:
        return place
    active = [source for source in now.sources if source.weight]
    is_same = all(source.continues == source.name for source in active)
    # The only source of a run has all positions, whatever would draw their order.
    same_order = now.seed == before.seed or len(active) == 1
    if is_same and same_order and _shares(now.weights) == _shares(before.weights):
        return place
    return Place(position, {each.name: tracks[each.continues].read if each.continues else 0 for each in active})


def _shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


def _read(tracks: Mapping[str, Track], reading: Reading, place: Place) -> dict[str, Track]:
    """Every source at the end of a run, under the cut that it had there."""
    counts = Shares(reading.weights, reading.seed).counts(reading.until - place.first)
    found = {}
    for source in reading.sources:
        earlier = tracks[source.continues] if source.continues else None
        read = place.before.get(source.name, 0) + counts[source.name] if source.weight else earlier.read  # type: ignore[union-attr]
        found[source.name] = Track(_cut(source, reading.seq_len, earlier), read)
    return found


def _cut(source: SourceRead, seq_len: int, earlier: Track | None) -> Cut:
    """The cut of a source in a run: the one before where nothing has changed."""
    if earlier is None:
        return Cut(source.num_tokens, seq_len, source.seed)
    past = earlier.cut
    if not source.weight or (past.num_tokens, past.seq_len, past.seed) == (source.num_tokens, seq_len, source.seed):
        return past
    return Cut(source.num_tokens, seq_len, source.seed, past=past, at=earlier.read)
