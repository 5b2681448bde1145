"""`checkpoint`: where, how often and how checkpoints are kept, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CheckpointConfig:
    """`checkpoint`: where, how often and how checkpoints are kept.

    Attributes:
        dir: folder of the step folders; None is `<run.dir>/checkpoints`.
        interval: steps between checkpoints; 0 saves at the end only.
        keep_latest_k: checkpoints that stay; 0 keeps all.
        async_mode: `async` (or true) writes in the background, `disabled` (or false) waits for the disk.
        resume: `auto` goes on from the run's own latest checkpoint; `never`; or the path of a step folder, or of a run
            or folder of checkpoints, of which the latest is taken. `auto` takes one of the same model, data and recipe
            alone; `never` starts anew, and is refused beside checkpoints of an earlier run (docs/checkpoints.md).
        init_from: a checkpoint whose weights and router biases a fresh start begins with, a path as in `resume`; None:
            random weights. It is of another run or imported; its steps, moments and data do not count (docs/export.md).
    """

    dir: str | None = None
    interval: int = 100
    keep_latest_k: int = 2
    async_mode: bool | str = "async"
    resume: str = "auto"
    init_from: str | None = None

    def check(self) -> None:
        """ValueError for an interval, a number to keep, a mode or a way to resume that cannot be."""
        if self.dir is not None and not self.dir:
            raise ValueError("checkpoint.dir is empty: name a folder, or null for the run's own")
        if self.interval < 0:
            raise ValueError(f"checkpoint.interval={self.interval} must not be negative (0 saves at the end only)")
        if self.keep_latest_k < 0:
            raise ValueError(f"checkpoint.keep_latest_k={self.keep_latest_k} must not be negative (0 keeps all)")
        if self.async_mode not in (True, False, "async", "disabled"):
            raise ValueError(f"checkpoint.async_mode={self.async_mode} is not one of async, disabled, true, false")
        if not self.resume:
            raise ValueError("checkpoint.resume is empty: it must be auto, never or the path of a step folder")
        if self.init_from is not None and not self.init_from:
            raise ValueError("checkpoint.init_from is empty: name a checkpoint, or null for random weights")
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"checkpoint.init_from={self.init_from} starts a run and checkpoint.resume={self.resume} goes on with "
                "another one: give one of them"
            )

    @property
    def in_background(self) -> bool:
        return self.async_mode in (True, "async")

    def folder(self, run_dir: str | Path) -> Path:
        """The folder that holds the step folders of a run."""
        return Path(self.dir) if self.dir is not None else Path(run_dir) / "checkpoints"

    def due(self, step: int, num_steps: int) -> bool:
        """Whether a checkpoint is to be taken after `step` of `num_steps` finished steps."""
        return step == num_steps or (self.interval > 0 and step % self.interval == 0)
