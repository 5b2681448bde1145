"""The runs that a branch goes on from: what its config keeps of them, so that no other run's folder is needed later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.data.past import Reading, SourceRead
from train.recipe.config import BatchRampConfig, TrainConfig
from train.recipe.ramp import Stretch


@dataclass(frozen=True)
class Change:
    """A setting that a branch has and the run before it had otherwise."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.was)} and is {_shown(self.now)}"


@dataclass(frozen=True)
class Ancestor:
    """An earlier run up to the step at which a branch left it.

    Attributes:
        run: its folder.
        checkpoint: the step folder that the branch began with.
        branch_from: what the branch named, `run` or `checkpoint` or the folder between.
        left_for: folder of the branch.
        step: its finished steps there.
        tokens: and tokens, both counted from the beginning of the first run.
        seq_len, global_batch_size, batch_ramp, seed: its `train` settings that say how many sequences its steps took,
            and which.
        sources: what it read, and how far the runs before it had.
        changes: what the branch changed.
    """

    run: str
    checkpoint: str
    branch_from: str
    left_for: str
    step: int
    tokens: int
    seq_len: int
    global_batch_size: int
    batch_ramp: BatchRampConfig
    seed: int
    sources: tuple[SourceRead, ...]
    changes: tuple[Change, ...]

    @property
    def stretch(self) -> Stretch:
        """Its steps, for the recipe."""
        sizes = TrainConfig(
            seq_len=self.seq_len, global_batch_size=self.global_batch_size, batch_ramp=self.batch_ramp, seed=self.seed
        )
        return Stretch(self.step, sizes)

    def reading(self, until: int) -> Reading:
        """What it read, up to the position `until`."""
        return Reading(until, self.seq_len, self.seed, self.sources)

    def plain(self) -> dict[str, Any]:
        """As plain values, for a config."""
        found = asdict(self)
        return {**found, "sources": list(found["sources"]), "changes": list(found["changes"])}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Ancestor:
        """What `plain` gave. ValueError for anything else."""
        try:
            nested = {
                "batch_ramp": BatchRampConfig(**plain["batch_ramp"]),
                "sources": tuple(SourceRead(**source) for source in plain["sources"]),
                "changes": tuple(Change(**change) for change in plain["changes"]),
            }
            return cls(**{**plain, **nested})
        except (TypeError, KeyError) as error:
            raise ValueError(f"checkpoint.ancestry is written by a branch and never set by hand: {error}") from None


def ancestors(plain: Sequence[Mapping[str, Any]]) -> tuple[Ancestor, ...]:
    """The runs of a config's `checkpoint.ancestry`, the first one first."""
    return tuple(Ancestor.of(each) for each in plain)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
