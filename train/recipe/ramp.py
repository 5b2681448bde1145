"""The batch size over the tokens of a run: one size, or a ramp in jumps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from train.recipe.config import TrainConfig
from train.recipe.rules import check_positive, refuse


class Stretch(NamedTuple):
    """The steps of an earlier run that a branch goes on from: all of its steps before `until_step`."""

    until_step: int
    train: TrainConfig


@dataclass(frozen=True)
class BatchRun:
    """Consecutive steps of `num_sequences` sequences of `seq_len` tokens: the first of them, and what lies before it.

    Sequences and tokens are counted from the beginning of the first run; a branch may have another `seq_len` than the
    run that it branches off.
    """

    first_step: int
    first_sequence: int
    first_token: int
    num_sequences: int
    seq_len: int

    def at(self, step: int) -> tuple[int, int]:
        """Sequences and tokens before a step of this run, or of its prolongation."""
        sequences = (step - self.first_step) * self.num_sequences
        return self.first_sequence + sequences, self.first_token + sequences * self.seq_len


def batch_sizes(train: TrainConfig) -> tuple[int, ...]:
    """Every global batch size (sequences) the ramp may use, ascending; the last is `train.global_batch_size`.

    A topology is legal when dp * micro_batch_size divides all of them.
    """
    ramp, final = train.batch_ramp, train.global_batch_size
    check_positive(train__global_batch_size=final)
    if ramp.start is None:
        refuse(ramp.tokens != 0, f"train.batch_ramp.tokens={ramp.tokens} is set, but train.batch_ramp.start is not")
        return (final,)
    check_positive(
        train__batch_ramp__start=ramp.start,
        train__batch_ramp__tokens=ramp.tokens,
        train__batch_ramp__quantum=ramp.quantum,
    )
    refuse(ramp.start > final, f"train.batch_ramp.start={ramp.start} is above train.global_batch_size={final}")
    refuse(
        (final - ramp.start) % ramp.quantum != 0,
        f"train.batch_ramp.quantum={ramp.quantum} does not divide the ramp from train.batch_ramp.start={ramp.start} "
        f"to train.global_batch_size={final}",
    )
    return tuple(range(ramp.start, final + 1, ramp.quantum))


def batch_runs(train: TrainConfig, history: Sequence[Stretch] = ()) -> tuple[BatchRun, ...]:
    """The ramp as runs of equal steps, the last one open: at most one per size, whatever the number of steps.

    Size k of n + 1 holds from position k/n of the ramp's tokens on, so the run's first steps have size `start` and
    the first step that begins at or past `batch_ramp.tokens` has the final size.

    history: the runs before a branch, in order. Their steps go by their own settings, and the branch begins where they
    end; its ramp lies over the tokens since the beginning of the first.
    """
    found: list[BatchRun] = []
    start = 0, 0, 0
    for until_step, past in history:
        found += [run for run in _runs_from(past, *start) if run.first_step < until_step]
        start = until_step, *found[-1].at(until_step)
    return (*found, *_runs_from(train, *start))


def _runs_from(train: TrainConfig, step: int, sequence: int, token: int) -> list[BatchRun]:
    """The runs of one recipe whose first step is `step`, after so many sequences and tokens."""
    sizes, seq_len = batch_sizes(train), train.seq_len
    check_positive(train__seq_len=seq_len)
    runs = []
    num_jumps, ramp_tokens = len(sizes) - 1, train.batch_ramp.tokens
    level = min(num_jumps, token * num_jumps // ramp_tokens) if num_jumps else 0
    while level < num_jumps:
        runs.append(BatchRun(step, sequence, token, sizes[level], seq_len))
        # First position of the next size, rounded up: k * tokens / n need not be a whole token.
        border = -(-(level + 1) * ramp_tokens // num_jumps)
        step += -(-(border - token) // (sizes[level] * seq_len))
        sequence, token = runs[-1].at(step)
        # One step may cross several borders.
        level = min(num_jumps, token * num_jumps // ramp_tokens)
    return [*runs, BatchRun(step, sequence, token, sizes[-1], seq_len)]
