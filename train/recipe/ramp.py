"""The batch size over the tokens of a run: one size, or a ramp in jumps."""

from __future__ import annotations

from dataclasses import dataclass

from train.recipe.config import TrainConfig
from train.recipe.rules import check_positive, refuse


@dataclass(frozen=True)
class BatchRun:
    """Consecutive steps with one batch size: the first of them, and the sequences before it."""

    first_step: int
    first_sequence: int
    num_sequences: int


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


def batch_runs(train: TrainConfig) -> tuple[BatchRun, ...]:
    """The ramp as runs of equal steps, the last one open: at most one per size, whatever the number of steps.

    Size k of n + 1 holds from position k/n of the ramp's tokens on, so the run's first steps have size `start` and
    the first step that begins at or past `batch_ramp.tokens` has the final size.
    """
    sizes = batch_sizes(train)
    check_positive(train__seq_len=train.seq_len)
    step = sequence = level = 0
    runs = []
    num_jumps = len(sizes) - 1
    ramp_tokens = train.batch_ramp.tokens
    while level < num_jumps:
        runs.append(BatchRun(step, sequence, sizes[level]))
        # First position of the next size, rounded up: k * tokens / n need not be a whole token.
        border = -(-(level + 1) * ramp_tokens // num_jumps)
        num_steps = -(-(border - sequence * train.seq_len) // (sizes[level] * train.seq_len))
        step, sequence = step + num_steps, sequence + num_steps * sizes[level]
        # One step may cross several borders.
        level = min(num_jumps, sequence * train.seq_len * num_jumps // ramp_tokens)
    return (*runs, BatchRun(step, sequence, sizes[-1]))
