"""The learning rate after warm-up, as phases over the tokens of a run: their curves, borders and rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from train.recipe.config import LrPhaseConfig, LrSchedulerConfig
from train.recipe.rules import refuse

CONSTANT = "constant"
# How much of the way from `lr` to `end_lr` is left when the share `done` of a phase is over: 1 at its start, 0 at its
# end. Cosine as in SGDR (Loshchilov and Hutter, arXiv 1608.03983), Eq. 5.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class Phase:
    """A resolved stretch [from_tokens, until_tokens) of the LR curve; `until_tokens` None: open (constant only)."""

    kind: str
    from_tokens: int
    until_tokens: int | None
    lr: float
    end_lr: float

    def lr_at(self, tokens: int) -> float:
        """LR at a position inside the phase, without warm-up."""
        if self.kind == CONSTANT or self.until_tokens is None:
            return self.lr
        done = (tokens - self.from_tokens) / (self.until_tokens - self.from_tokens)
        return self.end_lr + (self.lr - self.end_lr) * SHAPES[self.kind](done)


def resolve_phases(config: LrSchedulerConfig, run_tokens: int) -> tuple[Phase, ...]:
    """Phases with borders in tokens; `run_tokens` is what a share and an open curve refer to."""
    phases: list[Phase] = []
    from_tokens, last_lr = 0, config.lr
    for index, phase in enumerate(config.phases or [LrPhaseConfig(CONSTANT)]):
        where = f"lr_scheduler.phases[{index}]"
        kinds = (CONSTANT, *SHAPES)
        refuse(phase.kind not in kinds, f"{where}.kind={phase.kind} is none of {', '.join(kinds)}")
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
        refuse(value is not None and not 0 <= value < math.inf, f"{where}.{name}={value} is not a rate of 0 or more")
    if phase.kind == CONSTANT:
        refuse(phase.end_lr is not None, f"{where}.end_lr={phase.end_lr} is set, but a constant phase has only an lr")
    else:
        refuse(phase.end_lr is None, f"{where}.end_lr is not set, but a {phase.kind} phase needs it")


def _until(phase: LrPhaseConfig, where: str, from_tokens: int, run_tokens: int, is_last: bool) -> int | None:
    """End of a phase in tokens; None for a constant that lasts as long as the run, however long that is."""
    given = [name for name in ("tokens", "until_tokens", "share") if getattr(phase, name) is not None]
    refuse(len(given) > 1, f"{where} sets {' and '.join(given)}, but its length is given in one way")
    if phase.tokens is not None:
        until = from_tokens + phase.tokens
    elif phase.until_tokens is not None:
        until = phase.until_tokens
    elif phase.share is not None:
        refuse(not 0 < phase.share <= 1, f"{where}.share={phase.share} is not above 0 and at most 1")
        until = from_tokens + round(phase.share * run_tokens)
    else:
        refuse(not is_last, f"{where} has no length (tokens, until_tokens or share), but only the last phase may fill")
        if phase.kind == CONSTANT:
            return None
        until = run_tokens
    rule = f"{where} would end at {until} tokens, but it starts at {from_tokens}"
    refuse(until <= from_tokens, rule)
    return until
