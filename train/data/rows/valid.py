"""What an evaluation reads: sequences that lie evenly over the validation text of every source, always the same."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from train.data.config import DataConfig
from train.data.meta import Meta
from train.data.rows.epochs import Rows
from train.data.rows.shares import Shares
from train.data.rows.tokens import Tokens


@dataclass(frozen=True)
class Portion:
    """The sequences that are evaluated of one source.

    Attributes:
        name: of the source.
        rows: all of its validation text, in order.
        num_sequences: how many of the rows are taken; the others lie evenly between them.
        is_reported: whether it has a loss of its own, beside the mean.
        in_mean: whether it is part of the mean over sources.
    """

    name: str
    rows: Rows
    num_sequences: int
    is_reported: bool = True
    in_mean: bool = True

    def row(self, number: int) -> int:
        """The row that is the sequence of this number, from 0: floor(number * rows / sequences)."""
        return number * self.rows.num_rows // self.num_sequences

    @property
    def num_targets(self) -> int:
        """How many tokens all of its sequences have to predict."""
        return sum(self.rows.num_targets(self.row(number), 1) for number in range(self.num_sequences))


class Validation:
    """The sequences of an evaluation, portion after portion: a function of the data and their number alone."""

    def __init__(self, portions: Sequence[Portion]) -> None:
        """ValueError when they were prepared with several tokenizers."""
        self.portions = tuple(portions)
        self._ends = list(itertools.accumulate(portion.num_sequences for portion in portions))
        if len({portion.rows.tokens.meta.tokenizer_digest for portion in portions}) > 1:
            folders = ", ".join(str(portion.rows.tokens.folder) for portion in portions)
            raise ValueError(f"what is evaluated on is of several tokenizers: prepare it again ({folders})")

    @property
    def num_sequences(self) -> int:
        return self._ends[-1]

    @property
    def num_targets(self) -> int:
        """Predicted tokens of the portions that are part of the mean."""
        return sum(portion.num_targets for portion in self.portions if portion.in_mean)

    @property
    def unigram_entropy_nats(self) -> float | None:
        """Entropy of the token frequencies behind the mean, in nats per token; None where there are several sources."""
        tokens = [portion.rows.tokens for portion in self.portions if portion.in_mean]
        return tokens[0].unigram_entropy_nats if len(tokens) == 1 else None

    def at(self, number: int) -> tuple[Portion, int]:
        """The portion that the sequence of this number, from 0, is of, and the row of the portion that it is."""
        place = bisect.bisect_right(self._ends, number)
        portion = self.portions[place]
        return portion, portion.row(number - self._ends[place] + portion.num_sequences)

    def sequence(self, number: int) -> torch.Tensor:
        """One sequence: int64 [1, seq_len + 1]."""
        portion, row = self.at(number)
        return portion.rows.rows(row, 1)


def open_validation(config: DataConfig, seq_len: int, num_sequences: int | None) -> Validation:
    """What a run with these data evaluates on, prepared before.

    The validation split gives `num_sequences` (None: all), those of a blend by weight, at least one of each source;
    each of `data.valid_sources` gives as many. They are the mean where there is no split, and no part of it elsewhere.
    ValueError where a source is not whole, too short for a row, or of another tokenizer than the others.
    """
    wanted = dict.fromkeys(config.validating, num_sequences) | _by_weight(config, num_sequences)
    portions = [
        _portion(name, source, seq_len, wanted[name], is_reported=bool(config.blend))
        for name, source in config.validating.items()
    ]
    portions += [
        _portion(name, source, seq_len, num_sequences, in_mean=not config.validating)
        for name, source in config.evaluated.items()
    ]
    return Validation(portions)


def open_folder(config: DataConfig, seq_len: int, num_sequences: int | None) -> Validation:
    """One folder of tokens by itself: its validation split, or all of it where it was prepared without one."""
    meta = Meta.load(config.folder)
    split = "valid" if meta.splits["valid"].num_tokens else "train"
    portion = _portion(config.folder.name, config, seq_len, num_sequences, is_reported=False, split=split)
    return Validation([portion])


def _portion(
    name: str,
    source: DataConfig,
    seq_len: int,
    at_most: int | None,
    is_reported: bool = True,
    in_mean: bool = True,
    split: str = "valid",
) -> Portion:
    tokens = Tokens.open(source.folder, split)
    rows = Rows(tokens, seq_len, order="sequential", document_mask=source.document_mask)
    num_sequences = rows.num_rows if at_most is None else min(at_most, rows.num_rows)
    return Portion(name, rows, num_sequences, is_reported, in_mean)


def _by_weight(config: DataConfig, num_sequences: int | None) -> dict[str, int]:
    """Each source's share of a blend's sequences, at least one; nothing where there is no blend, or all are taken."""
    weights = {each.name: each.weight for each in config.blend if each.name in config.validating}
    if num_sequences is None or not weights:
        return {}
    return {name: max(1, count) for name, count in Shares(weights, seed=0).counts(num_sequences).items()}
