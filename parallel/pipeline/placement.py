"""Where stages live and which way micro-batches take through them: straight, looped, V-shaped, bidirectional.

A stage is a slice of the model with an owner rank. A route is the stages that a micro-batch passes, first to last, and
every route is a whole model: the stage at position k of any route is the k-th of the model's equal slices. So DualPipe
has two routes over twice as many stages (two copies of each slice), everything else has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """Stages 0..n-1, each on one rank and in one route.

    `routes[k]` lists the stages of route k in order; `rank_of[stage]` is the stage's rank. ValueError for a stage that
    is missing or met twice, for routes of different lengths and for a rank that does not exist.
    """

    num_ranks: int
    routes: tuple[tuple[int, ...], ...]
    rank_of: tuple[int, ...]

    def __post_init__(self) -> None:
        stages = sorted(stage for route in self.routes for stage in route)
        if not stages or stages != list(range(len(self.rank_of))):
            raise ValueError(f"routes {self.routes} must pass each of the {len(self.rank_of)} stages exactly once")
        if len({len(route) for route in self.routes}) != 1:
            raise ValueError(f"routes {self.routes} must be equally long: each passes the whole model")
        if not all(0 <= rank < self.num_ranks for rank in self.rank_of):
            raise ValueError(f"stages lie on ranks {self.rank_of}, but there are {self.num_ranks} ranks")

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)

    @property
    def num_slices(self) -> int:
        """Into how many stages one copy of the model is cut."""
        return len(self.routes[0])

    @property
    def stage_size(self) -> float:
        """A stage's share of the model, in units of 1 / num_ranks of it."""
        return self.num_ranks / self.num_slices

    @cached_property
    def _found_at(self) -> dict[int, tuple[int, int]]:
        return {stage: (k, at) for k, route in enumerate(self.routes) for at, stage in enumerate(route)}

    def route_of(self, stage: int) -> int:
        """Index of the route that passes this stage."""
        return self._found_at[stage][0]

    def position(self, stage: int) -> int:
        """Which slice of the model the stage is: 0 holds the embedding, num_slices - 1 the head."""
        return self._found_at[stage][1]

    def before(self, stage: int) -> int | None:
        """The stage whose output this one takes; None for a first stage."""
        route, at = self._found_at[stage]
        return self.routes[route][at - 1] if at else None

    def after(self, stage: int) -> int | None:
        """The stage that takes this one's output; None for a last stage."""
        route, at = self._found_at[stage]
        return self.routes[route][at + 1] if at + 1 < self.num_slices else None

    def stages_on(self, rank: int) -> tuple[int, ...]:
        """The stages of a rank, by position: the one that its micro-batches meet first comes first."""
        return tuple(sorted((s for s, r in enumerate(self.rank_of) if r == rank), key=self.position))

    @cached_property
    def slices_of_ranks(self) -> tuple[tuple[int, ...], ...]:
        """The slices of the model that each rank holds."""
        return tuple(tuple(map(self.position, self.stages_on(rank))) for rank in range(self.num_ranks))


def loop(num_ranks: int, stages_per_rank: int = 1) -> Placement:
    """One route that goes round the ranks `stages_per_rank` times (Megatron-LM, arXiv 2104.04473, section 2.2)."""
    stages = tuple(range(num_ranks * stages_per_rank))
    return Placement(num_ranks, (stages,), tuple(stage % num_ranks for stage in stages))


def vee(num_ranks: int) -> Placement:
    """One route down the ranks and back up: rank r holds stages r and 2 num_ranks - 1 - r (arXiv 2401.10241, 6)."""
    stages = tuple(range(2 * num_ranks))
    return Placement(num_ranks, (stages,), tuple(min(stage, 2 * num_ranks - 1 - stage) for stage in stages))


def bidirectional(num_ranks: int) -> Placement:
    """Two routes, one from each end, each over its own copy of the model (DeepSeek-V3 report, section 3.2.1).

    Rank r holds stage r of the first route and stage 2 num_ranks - 1 - r of the second: slices r and num_ranks - 1 - r.
    """
    down, up = tuple(range(num_ranks)), tuple(range(num_ranks, 2 * num_ranks))
    return Placement(num_ranks, (down, up), (*down, *reversed(down)))
