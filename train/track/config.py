"""`track`: where a run reports to, and how often."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True)
class TrackConfig:
    """`track`: where a run reports to, and how often.

    Attributes:
        wandb: `auto` (online where an API key is set, offline elsewhere; `WANDB_MODE`, or `WANDB_DISABLED=true`,
            decides before that), `online`, `offline` or `disabled`.
        tensorboard: also write the metrics for TensorBoard, into `<run.dir>/tensorboard`; needs the extra
            `halocline[tensorboard]`.
        project: wandb project.
        entity: wandb entity.
        group: wandb group.
        name: wandb name; None lets wandb choose.
        tags: wandb tags.
        log_interval: steps between two lines in a log.
        load_interval: steps between two lines of `loads.jsonl`, with the tokens that chose each expert; 0: none. The
            first and the last step have one too.
        alert: a command of the shell that is run when something is lost, told on its standard input (docs/jobs.md). A
            rank that hangs or ends, a number that is not finite, a checkpoint that could not be written, a run that is
            given up: it reads the line of `events.jsonl`. None: no command.
        plan: on a CPU, plan the run as it starts, and say at its end what was planned of time and memory and what
            happened (docs/planner.md). Its layers are timed for about a second before the first
            step. Of runs that `python -m launch local` starts on Linux; the jobs of a sweep are not planned.
    """

    wandb: str = "auto"
    tensorboard: bool = False
    project: str = "halocline"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_interval: int = 10
    load_interval: int = 10
    alert: str | None = None
    plan: bool = True

    def check(self) -> None:
        """ValueError for an unknown mode or an interval below 1."""
        if self.wandb not in MODES:
            raise ValueError(f"track.wandb={self.wandb} is not one of {', '.join(MODES)}")
        if self.log_interval < 1:
            raise ValueError(f"track.log_interval={self.log_interval} is below 1")
        if self.load_interval < 0:
            raise ValueError(f"track.load_interval={self.load_interval} is below 0 (0 writes none)")
        if self.alert is not None and not self.alert.strip():
            raise ValueError("track.alert is empty: it must be a command of the shell, or null for none")

    def check_installed(self) -> None:
        """ValueError where a library that is asked for is missing. For a run's start: other verbs do not need it."""
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "track.tensorboard=true needs TensorBoard, which is not installed: pip install 'halocline[tensorboard]'"
            )

    def loads_due(self, step: int, num_steps: int) -> bool:
        """Whether the loads of this step, from 1, are written: every `load_interval`-th, the first and the last."""
        return self.load_interval > 0 and (step % self.load_interval == 0 or step in (1, num_steps))
