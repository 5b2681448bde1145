"""The recipe: learning rate, batch size, router-bias speed and MTP weight of every step, as pure functions of tokens.

Everything is laid over one axis, the tokens of the run. Step `i` (counted from 0) covers the tokens [first, last)
of that axis, and two rules say what it does:

- A step belongs to the phase that holds its *first* token, and reads every curve there. A phase is [from, until):
  the step that begins exactly on a border is the first of the new phase, a step that straddles it is the last of the
  old one.
- Warm-up alone is read at the step's *last* token: the first step already moves the weights, step
  `warmup_steps - 1` is the first at full rate, and warm-up takes exactly `warmup_steps` steps as papers count them.
  It is published in steps; the batch ramp turns that into tokens once, here.

DeepSeek-V3's numbers (technical report, section 4.2): LR 0 -> 2.2e-4 in 2K steps, constant to 10T tokens, cosine to
2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B; batch 3072 -> 15360 sequences over 469B tokens; bias speed 1e-3,
0 after 14.3T; MTP weight 0.3, 0.1 after 10T.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from train.recipe.config import LrPhaseConfig, LrSchedulerConfig, MoeConfig, MtpConfig, TrainConfig

KINDS = ("constant", "linear", "cosine")
AUX_COEFFS = ("seq_aux_coeff", "device_aux_coeff", "comm_aux_coeff")


@dataclass(frozen=True)
class StepPlan:
    """What one step does. `step` counts from 0; `consumed_tokens` is the run's total *after* the step."""

    step: int
    lr: float
    num_sequences: int
    first_sequence: int
    consumed_tokens: int
    bias_update_rate: float
    mtp_loss_weight: float


@dataclass(frozen=True)
class Phase:
    """A resolved stretch [from_tokens, until_tokens) of the LR curve; `until_tokens` None: open (constant only)."""

    kind: str
    from_tokens: int
    until_tokens: int | None
    lr: float
    end_lr: float

    def lr_at(self, tokens: int) -> float:
        """LR at a position inside the phase, without warm-up. Cosine as in SGDR (Loshchilov and Hutter), Eq. 5."""
        if self.kind == "constant" or self.until_tokens is None:
            return self.lr
        done = (tokens - self.from_tokens) / (self.until_tokens - self.from_tokens)
        remaining = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.end_lr + (self.lr - self.end_lr) * remaining


@dataclass(frozen=True)
class BatchRun:
    """Consecutive steps with one batch size: the first of them, and the sequences before it."""

    first_step: int
    first_sequence: int
    num_sequences: int


def _refuse(broken: bool, sentence: str) -> None:
    if broken:
        raise ValueError(sentence)


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        key = name.replace("__", ".")
        _refuse(value is not None and value < 1, f"{key}={value} is below 1")


def batch_sizes(train: TrainConfig) -> tuple[int, ...]:
    """Every global batch size (sequences) the ramp may use, ascending; the last is `train.global_batch_size`.

    A topology is legal when dp * micro_batch_size divides all of them.
    """
    ramp, final = train.batch_ramp, train.global_batch_size
    _check_positive(train__global_batch_size=final)
    if ramp.start is None:
        _refuse(ramp.tokens != 0, f"train.batch_ramp.tokens={ramp.tokens} is set, but train.batch_ramp.start is not")
        return (final,)
    _check_positive(
        train__batch_ramp__start=ramp.start,
        train__batch_ramp__tokens=ramp.tokens,
        train__batch_ramp__quantum=ramp.quantum,
    )
    _refuse(ramp.start > final, f"train.batch_ramp.start={ramp.start} is above train.global_batch_size={final}")
    _refuse(
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
    _check_positive(train__seq_len=train.seq_len)
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


def _resolve_phases(config: LrSchedulerConfig, run_tokens: int) -> tuple[Phase, ...]:
    """Phases with borders in tokens; `run_tokens` is what a share and an open curve refer to."""
    phases: list[Phase] = []
    from_tokens, last_lr = 0, config.lr
    for index, phase in enumerate(config.phases or [LrPhaseConfig("constant")]):
        where = f"lr_scheduler.phases[{index}]"
        _refuse(phase.kind not in KINDS, f"{where}.kind={phase.kind} is none of {', '.join(KINDS)}")
        lr = last_lr if phase.lr is None else phase.lr
        _check_rates(phase, where)
        last_lr = lr if phase.end_lr is None else phase.end_lr
        is_last = index + 1 >= len(config.phases)
        until = _until(phase, where, from_tokens, run_tokens, is_last)
        phases.append(Phase(phase.kind, from_tokens, until, lr, last_lr))
        from_tokens = until or from_tokens
    return tuple(phases)


def _check_rates(phase: LrPhaseConfig, where: str) -> None:
    for name, value in (("lr", phase.lr), ("end_lr", phase.end_lr)):
        _refuse(value is not None and not 0 <= value < math.inf, f"{where}.{name}={value} is not a rate of 0 or more")
    if phase.kind == "constant":
        _refuse(phase.end_lr is not None, f"{where}.end_lr={phase.end_lr} is set, but a constant phase has only an lr")
    else:
        _refuse(phase.end_lr is None, f"{where}.end_lr is not set, but a {phase.kind} phase needs it")


def _until(phase: LrPhaseConfig, where: str, from_tokens: int, run_tokens: int, is_last: bool) -> int | None:
    """End of a phase in tokens; None for a constant that lasts as long as the run, however long that is."""
    given = [name for name in ("tokens", "until_tokens", "share") if getattr(phase, name) is not None]
    _refuse(len(given) > 1, f"{where} sets {' and '.join(given)}, but its length is given in one way")
    if phase.tokens is not None:
        until = from_tokens + phase.tokens
    elif phase.until_tokens is not None:
        until = phase.until_tokens
    elif phase.share is not None:
        _refuse(not 0 < phase.share <= 1, f"{where}.share={phase.share} is not above 0 and at most 1")
        until = from_tokens + round(phase.share * run_tokens)
    else:
        _refuse(not is_last, f"{where} has no length (tokens, until_tokens or share), but only the last phase may fill")
        if phase.kind == "constant":
            return None
        until = run_tokens
    rule = f"{where} would end at {until} tokens, but it starts at {from_tokens}"
    _refuse(until <= from_tokens, rule)
    return until


class Recipe:
    """The whole recipe. Memory and construction grow with the number of batch sizes and phases, never with steps.

    Raises ValueError naming field, value and rule for anything illegal.
    """

    def __init__(self, train: TrainConfig, lr_scheduler: LrSchedulerConfig, moe: MoeConfig, mtp: MtpConfig) -> None:
        self.train, self.lr_scheduler, self.moe, self.mtp = train, lr_scheduler, moe, mtp
        self._check()
        self._runs = batch_runs(train)
        self._run_steps = [run.first_step for run in self._runs]
        self._run_tokens = [run.first_sequence * train.seq_len for run in self._runs]
        self.num_steps = self._count_steps()
        limits = [] if train.max_tokens is None else [train.max_tokens]
        #: Tokens that a share of the run refers to: `max_tokens` as written, or what `max_steps` will consume.
        self.nominal_tokens = min([*limits, self.tokens_before(self.num_steps)])
        self.warmup_tokens = self.tokens_before(lr_scheduler.warmup_steps)
        self.phases = _resolve_phases(lr_scheduler, self.nominal_tokens)
        self._phase_tokens = [phase.from_tokens for phase in self.phases]
        self._check_covered()

    def _check(self) -> None:
        train, lr, moe, mtp = self.train, self.lr_scheduler, self.moe, self.mtp
        _check_positive(
            train__micro_batch_size=train.micro_batch_size,
            train__max_steps=train.max_steps,
            train__max_tokens=train.max_tokens,
            moe__bias_update_until_tokens=moe.bias_update_until_tokens,
        )
        endless = train.max_steps is None and train.max_tokens is None
        _refuse(endless, "neither train.max_steps nor train.max_tokens is set: the run would have no end")
        for name, value in (
            ("lr_scheduler.lr", lr.lr),
            ("lr_scheduler.warmup_steps", lr.warmup_steps),
            *((f"moe.{key}", getattr(moe, key)) for key in ("bias_update_rate", *AUX_COEFFS)),
            ("mtp.loss_weight", mtp.loss_weight),
            *(
                (f"mtp.loss_weight_changes[{i}].loss_weight", c.loss_weight)
                for i, c in enumerate(mtp.loss_weight_changes)
            ),
        ):
            _refuse(not 0 <= value < math.inf, f"{name}={value} is not a finite number of 0 or more")
        borders = [0, *(change.from_tokens for change in mtp.loss_weight_changes)]
        for index, (before, after) in enumerate(pairwise(borders)):
            _refuse(
                after <= before,
                f"mtp.loss_weight_changes[{index}].from_tokens={after} is not past the change before it ({before})",
            )

    def _check_covered(self) -> None:
        until = self.phases[-1].until_tokens
        last_step_from = self.tokens_before(self.num_steps - 1)
        _refuse(
            until is not None and until <= last_step_from,
            f"lr_scheduler.phases end at {until} tokens, but the last of {self.num_steps} steps begins at "
            f"{last_step_from}: lengthen the last phase, or leave its length out",
        )

    def _count_steps(self) -> int:
        limits = [] if self.train.max_steps is None else [self.train.max_steps]
        if self.train.max_tokens is not None:
            limits.append(self.step_at(self.train.max_tokens))
        return min(limits)

    def _sequences_before(self, step: int) -> tuple[int, int]:
        """Sequences before a step (of any number, past the run's end too), and its own."""
        run = self._runs[bisect_right(self._run_steps, step) - 1]
        return run.first_sequence + (step - run.first_step) * run.num_sequences, run.num_sequences

    def tokens_before(self, step: int) -> int:
        """Position of a step's first token on the run's axis."""
        return self._sequences_before(step)[0] * self.train.seq_len

    def step_at(self, tokens: int) -> int:
        """The first step that begins at or past a position: the first of a phase whose border lies there."""
        index = bisect_right(self._run_tokens, tokens) - 1
        run = self._runs[index]
        return run.first_step - (self._run_tokens[index] - tokens) // (run.num_sequences * self.train.seq_len)

    def _lr(self, first_token: int, last_token: int) -> float:
        phase = self.phases[bisect_right(self._phase_tokens, first_token) - 1]
        warmth = min(1.0, last_token / self.warmup_tokens) if self.warmup_tokens else 1.0
        return warmth * phase.lr_at(first_token)

    def at(self, step: int) -> StepPlan:
        """The plan of step 0 <= `step` < num_steps, in time logarithmic in the number of batch sizes."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not in a run of {self.num_steps} steps")
        first_sequence, num_sequences = self._sequences_before(step)
        first_token = first_sequence * self.train.seq_len
        last_token = first_token + num_sequences * self.train.seq_len
        stop = self.moe.bias_update_until_tokens
        weights = [c.loss_weight for c in self.mtp.loss_weight_changes if c.from_tokens <= first_token]
        return StepPlan(
            step=step,
            lr=self._lr(first_token, last_token),
            num_sequences=num_sequences,
            first_sequence=first_sequence,
            consumed_tokens=last_token,
            bias_update_rate=self.moe.bias_update_rate if stop is None or first_token < stop else 0.0,
            mtp_loss_weight=weights[-1] if weights else self.mtp.loss_weight,
        )

    def borders(self) -> tuple[tuple[int, str], ...]:
        """(tokens, what begins there), ascending, for people: the recipe's events inside the run."""
        events = [(self.warmup_tokens, "warm-up ends")] if self.warmup_tokens else []
        if self.train.batch_ramp.start is not None:
            events.append((self.train.batch_ramp.tokens, f"batch {self.train.global_batch_size} sequences"))
        for phase in self.phases:
            rates = f"{phase.lr:.3g}" if phase.lr == phase.end_lr else f"{phase.lr:.3g} -> {phase.end_lr:.3g}"
            events.append((phase.from_tokens, f"LR {phase.kind} {rates}"))
        if self.moe.bias_update_until_tokens is not None:
            events.append((self.moe.bias_update_until_tokens, "bias speed 0"))
        events += [(c.from_tokens, f"MTP weight {c.loss_weight:g}") for c in self.mtp.loss_weight_changes]
        return tuple(sorted(event for event in events if event[0] < self.tokens_before(self.num_steps)))

    def fingerprint(self) -> str:
        """Text that is equal for two recipes exactly when they give equal plans at every step both have.

        Where the run ends is not part of it (a run may be prolonged), unless a phase's border depends on the end.
        """
        return json.dumps(
            {
                "seed": self.train.seed,
                "seq_len": self.train.seq_len,
                "batch_runs": [(run.first_step, run.num_sequences) for run in self._runs],
                "warmup_tokens": self.warmup_tokens,
                "lr_phases": [(p.kind, p.from_tokens, p.until_tokens, p.lr, p.end_lr) for p in self.phases],
                "bias_update": (self.moe.bias_update_rate, self.moe.bias_update_until_tokens),
                "aux_coeffs": [getattr(self.moe, key) for key in AUX_COEFFS],
                "mtp_loss_weight": (0, self.mtp.loss_weight),
                "mtp_changes": [(c.from_tokens, c.loss_weight) for c in self.mtp.loss_weight_changes],
            },
            sort_keys=True,
        )
