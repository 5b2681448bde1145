"""The recipe: learning rate, batch size, router-bias speed and MTP weight of every step, as pure functions of tokens.

Everything is laid over one axis, the tokens of the run. Step `i` (counted from 0) covers the tokens [first, last)
of that axis, and two rules say what it does:

- A step belongs to the phase that holds its *first* token, and reads every curve there. A phase is [from, until):
  the step that begins exactly on a border is the first of the new phase, a step that straddles it is the last of the
  old one.
- Warm-up alone is read at the step's *last* token: the first step already moves the weights, step
  `warmup_steps - 1` is the first at full rate, and warm-up takes exactly `warmup_steps` steps as papers count them.
  It is published in steps; the batch ramp turns that into tokens once, here.

The axis of a branch is that of the runs before it: tokens and steps are counted from the beginning of the first. Before
the branch they go by the settings of those runs, after it by its own; every border (of a phase, of the ramp, of a
change, the end of the run) lies on the whole axis. So a warm-up that is over is not repeated; a `linear` phase from a
rate of 0 that begins where the branch does is one.

DeepSeek-V3's numbers (technical report, section 4.2): LR 0 -> 2.2e-4 in 2K steps, constant to 10T tokens, cosine to
2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B; batch 3072 -> 15360 sequences over 469B tokens; bias speed 1e-3,
0 after 14.3T; MTP weight 0.3, 0.1 after 10T.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from train.recipe.config import LrSchedulerConfig, MoeConfig, MtpConfig, TrainConfig
from train.recipe.phases import resolve_phases
from train.recipe.ramp import BatchRun, Stretch, batch_runs
from train.recipe.rules import check_positive, refuse

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


class Recipe:
    """The whole recipe. Memory and construction grow with the number of batch sizes and phases, never with steps.

    Raises ValueError naming field, value and rule for anything illegal.
    """

    def __init__(
        self,
        train: TrainConfig,
        lr_scheduler: LrSchedulerConfig,
        moe: MoeConfig,
        mtp: MtpConfig,
        history: Sequence[Stretch] = (),
    ) -> None:
        """history: of a branch, the runs before it, in order."""
        self.train, self.lr_scheduler, self.moe, self.mtp = train, lr_scheduler, moe, mtp
        self._check()
        self._runs = batch_runs(train, history)
        self._run_steps = [run.first_step for run in self._runs]
        self._run_tokens = [run.first_token for run in self._runs]
        #: Steps before the branch; 0 for a run that is none.
        self.first_step = history[-1].until_step if history else 0
        self.num_steps = self._count_steps()
        self._check_begins()
        limits = [] if train.max_tokens is None else [train.max_tokens]
        #: Tokens that a share of the run refers to: `max_tokens` as written, or what `max_steps` will consume.
        self.nominal_tokens = min([*limits, self.tokens_before(self.num_steps)])
        self.warmup_tokens = self.tokens_before(lr_scheduler.warmup_steps)
        self.phases = resolve_phases(lr_scheduler, self.nominal_tokens)
        self._phase_tokens = [phase.from_tokens for phase in self.phases]
        self._check_covered()

    def _check(self) -> None:
        train, lr, moe, mtp = self.train, self.lr_scheduler, self.moe, self.mtp
        check_positive(
            train__micro_batch_size=train.micro_batch_size,
            train__max_steps=train.max_steps,
            train__max_tokens=train.max_tokens,
            moe__bias_update_until_tokens=moe.bias_update_until_tokens,
        )
        endless = train.max_steps is None and train.max_tokens is None
        refuse(endless, "neither train.max_steps nor train.max_tokens is set: the run would have no end")
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
            refuse(not 0 <= value < math.inf, f"{name}={value} is not a finite number of 0 or more")
        borders = [0, *(change.from_tokens for change in mtp.loss_weight_changes)]
        for index, (before, after) in enumerate(pairwise(borders)):
            refuse(
                after <= before,
                f"mtp.loss_weight_changes[{index}].from_tokens={after} is not past the change before it ({before})",
            )

    def _check_begins(self) -> None:
        train, first, tokens = self.train, self.first_step, self.tokens_before(self.first_step)
        refuse(
            first > 0 and self.num_steps <= first,
            f"train.max_steps={train.max_steps}, train.max_tokens={train.max_tokens}: steps and tokens count from the "
            f"beginning of the run that is branched off, and the branch begins after step {first} and {tokens} tokens: "
            "it must end later",
        )

    def _check_covered(self) -> None:
        until = self.phases[-1].until_tokens
        last_step_from = self.tokens_before(self.num_steps - 1)
        refuse(
            until is not None and until <= last_step_from,
            f"lr_scheduler.phases end at {until} tokens, but the last of {self.num_steps} steps begins at "
            f"{last_step_from}: lengthen the last phase, or leave its length out",
        )

    def _count_steps(self) -> int:
        limits = [] if self.train.max_steps is None else [self.train.max_steps]
        if self.train.max_tokens is not None:
            limits.append(self.step_at(self.train.max_tokens))
        return min(limits)

    def _run_of(self, step: int) -> BatchRun:
        return self._runs[bisect_right(self._run_steps, step) - 1]

    def batches(self) -> list[tuple[int, int]]:
        """(sequences of a step, number of such steps) of every batch size in turn, from the run's own first step on."""
        starts = [max(run.first_step, self.first_step) for run in self._runs]
        stops = [*starts[1:], self.num_steps]
        spans = zip(self._runs, starts, stops, strict=True)
        return [(run.num_sequences, min(stop, self.num_steps) - start) for run, start, stop in spans if stop > start]

    def sequences_before(self, step: int) -> int:
        """Sequences of all steps before this one (of any number, past the run's end too)."""
        return self._run_of(step).at(step)[0]

    def tokens_before(self, step: int) -> int:
        """Position of a step's first token on the run's axis."""
        return self._run_of(step).at(step)[1]

    def step_at(self, tokens: int) -> int:
        """The first step that begins at or past a position: the first of a phase whose border lies there."""
        run = self._runs[bisect_right(self._run_tokens, tokens) - 1]
        return run.first_step - (run.first_token - tokens) // (run.num_sequences * run.seq_len)

    def _lr(self, first_token: int, last_token: int) -> float:
        phase = self.phases[bisect_right(self._phase_tokens, first_token) - 1]
        warmth = min(1.0, last_token / self.warmup_tokens) if self.warmup_tokens else 1.0
        return warmth * phase.lr_at(first_token)

    def at(self, step: int) -> StepPlan:
        """The plan of step 0 <= `step` < num_steps, in time logarithmic in the number of batch sizes."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is not in a run of {self.num_steps} steps")
        run = self._run_of(step)
        first_sequence, first_token = run.at(step)
        last_token = first_token + run.num_sequences * run.seq_len
        stop = self.moe.bias_update_until_tokens
        weights = [c.loss_weight for c in self.mtp.loss_weight_changes if c.from_tokens <= first_token]
        return StepPlan(
            step=step,
            lr=self._lr(first_token, last_token),
            num_sequences=run.num_sequences,
            first_sequence=first_sequence,
            consumed_tokens=last_token,
            bias_update_rate=self.moe.bias_update_rate if stop is None or first_token < stop else 0.0,
            mtp_loss_weight=weights[-1] if weights else self.mtp.loss_weight,
        )

    def borders(self) -> tuple[tuple[int, str], ...]:
        """(tokens, what begins there), ascending, for people: the recipe's events inside the run."""
        events = [(self.warmup_tokens, "warm-up ends")] if self.warmup_tokens else []
        if self.first_step:
            events.append((self.tokens_before(self.first_step), "the branch begins"))
        if self.train.batch_ramp.start is not None:
            events.append((self.train.batch_ramp.tokens, f"batch {self.train.global_batch_size} sequences"))
        for phase in self.phases:
            rates = f"{phase.lr:.3g}" if phase.lr == phase.end_lr else f"{phase.lr:.3g} -> {phase.end_lr:.3g}"
            events.append((phase.from_tokens, f"LR {phase.kind} {rates}"))
        if self.moe.bias_update_until_tokens is not None:
            events.append((self.moe.bias_update_until_tokens, "bias speed 0"))
        events += [(c.from_tokens, f"MTP weight {c.loss_weight:g}") for c in self.mtp.loss_weight_changes]
        return tuple(sorted(event for event in events if event[0] < self.tokens_before(self.num_steps)))

    def remarks(self) -> tuple[str, ...]:
        """What is legal, and seldom meant, in sentences for people."""
        found = []
        end = self.tokens_before(self.num_steps)
        if self.warmup_tokens > end:
            found.append(
                f"the warm-up of lr_scheduler.warmup_steps={self.lr_scheduler.warmup_steps} does not end within the "
                f"{self.num_steps} steps of the run: its full learning rate is never reached"
            )
        before = [self.lr_scheduler.lr, *(phase.end_lr for phase in self.phases)]
        falls = (phase for phase, rate in zip(self.phases, before, strict=False) if min(phase.lr, phase.end_lr) < rate)
        first = next(falls, None)
        if first is not None and first.from_tokens < min(self.warmup_tokens, end):
            found.append(
                f"the learning rate begins to fall after {self.step_at(first.from_tokens):,} steps (phase {first.kind} "
                f"from {first.from_tokens:,} tokens), before the warm-up of "
                f"lr_scheduler.warmup_steps={self.lr_scheduler.warmup_steps} ends: both are multiplied"
            )
        return tuple(found)

    def fingerprint(self) -> str:
        """Text that is equal for two recipes exactly when they give equal plans at every step both have.

        Where the run ends is not part of it (a run may be prolonged), unless a phase's border depends on the end.
        """
        history = [(run.first_step, run.seq_len) for run in self._runs if run.first_step < self.first_step]
        return json.dumps(
            {
                **({"branched": (self.first_step, history)} if history else {}),
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
