"""What tells the layouts of one run apart, and the settings that make a run have one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from launch.plan.guess import Guess
from train.config import RunConfig


class Layout(NamedTuple):
    """What tells the layouts of one run apart."""

    pp: int
    ep: int
    dispatch: str
    schedule: str
    micro_batch_size: int
    recompute: str
    precision: str

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        """The layout of a run."""
        mesh, again = config.parallel, config.recompute
        names = ["norm"] * again.norm + ["mla_up_proj"] * again.mla_up_proj
        names += ["experts_up_proj"] * again.experts_up_proj + again.nodes
        size, precision = config.train.micro_batch_size, config.precision.name
        return cls(mesh.pp, mesh.ep, mesh.dispatch, config.pipeline.schedule, size, "+".join(names), precision)

    def differs(self, other: Layout) -> list[str]:
        """The fields in which another one is another."""
        return [name for name, mine, its in zip(self._fields, self, other, strict=True) if mine != its]


def settings(config: RunConfig) -> list[str]:
    """The words that make a run have this layout."""
    mesh, again, pipeline = config.parallel, config.recompute, config.pipeline
    words = [f"parallel.{key}={getattr(mesh, key)}" for key in ("pp", "dp", "ep", "nodes", "dispatch")]
    words += [f"pipeline.schedule={pipeline.schedule}"]
    if pipeline.schedule == "dualpipe" and config.train.batch_ramp.start is not None:
        words += [f"pipeline.short_steps={pipeline.short_steps}"]
    words += [f"train.micro_batch_size={config.train.micro_batch_size}", f"precision={config.precision.name}"]
    for key in ("norm", "mla_up_proj", "experts_up_proj"):
        words.append(f"recompute.{key}={str(getattr(again, key)).lower()}")
    return [*words, f"recompute.nodes=[{','.join(again.nodes)}]"]


def change(config: RunConfig, other: RunConfig) -> str:
    """The settings in which another layout of a run is another."""
    mine = settings(config)
    return " ".join(word for word in settings(other) if word not in mine)


def relief(config: RunConfig, guesses: Iterable[Guess]) -> tuple[str, float] | None:
    """The settings of the one thing whose change frees most memory, by guesses, and how many bytes.

    guesses: of the run as it is, and of others. None where none of them that differs in one thing frees any.
    """
    layout = Layout.of(config)
    near = [each for each in guesses if len(layout.differs(Layout.of(each.config))) <= 1]
    held = next(each for each in near if Layout.of(each.config) == layout)
    best = min(near, key=lambda each: each.num_bytes)
    freed = held.num_bytes - best.num_bytes
    return (change(config, best.config), freed) if freed > 0 else None
