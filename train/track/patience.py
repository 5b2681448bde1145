"""How long a run goes on whose validation loss no longer improves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Patience:
    """Counts the evaluations in a row that have not improved the validation loss. A function of the losses so far.

    Attributes:
        limit: after so many it is at its end; None: never.
        min_improvement: a loss improves on the best one where it is lower by more than this.
        best: the loss that later ones are compared with; None before the first.
        num_since: evaluations since then.
    """

    limit: int | None = None
    min_improvement: float = 0.0
    best: float | None = None
    num_since: int = 0

    @property
    def is_exhausted(self) -> bool:
        return self.limit is not None and self.num_since >= self.limit

    @property
    def sentence(self) -> str:
        """Why a run ends that has exhausted it."""
        return (
            f"the validation loss has not improved on {self.best:.4f} by more than {self.min_improvement:g} in "
            f"{self.num_since} evaluations (evaluate.patience={self.limit})"
        )

    def see(self, loss: float) -> None:
        """Take in the loss of an evaluation."""
        if self.best is None or loss < self.best - self.min_improvement:
            self.best, self.num_since = loss, 0
        else:
            self.num_since += 1
