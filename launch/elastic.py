"""The next smaller topology of a run that has lost ranks: as many of those that are left as a legal topology takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from parallel.mesh import ParallelConfig
from train.config import RunConfig


def smaller(config: RunConfig, most_ranks: int, least_ranks: int) -> RunConfig | None:
    """The run over the largest legal topology of `least_ranks` to `most_ranks` ranks; None where there is none.

    All rules are those of `RunConfig.check`, batch sizes included: the batch, its micro-batches and the recipe stay as
    they are, so what changes is who computes which part. Of several topologies of one size, one with the same pipeline
    is taken before one with the same spread of experts, and that before others.
    """
    for num_ranks in range(most_ranks, max(1, least_ranks) - 1, -1):
        for parallel in sorted(_of(num_ranks, config.parallel), key=lambda each: _distance(each, config.parallel)):
            found = replace(config, parallel=parallel)
            try:
                found.check()
            except ValueError:
                continue
            return found
    return None


def _of(num_ranks: int, own: ParallelConfig) -> Iterator[ParallelConfig]:
    """Every way to arrange so many ranks. How tokens come to their experts stays, where there is a way to go."""
    for pp in _divisors(num_ranks):
        for ep in _divisors(num_ranks // pp):
            kept = own.dispatch if own.dispatch != "local" else "flat"
            dispatch = "local" if ep == 1 else kept
            for nodes in {own.nodes, 1}:
                yield replace(own, pp=pp, dp=num_ranks // pp, ep=ep, nodes=nodes, dispatch=dispatch)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _distance(one: ParallelConfig, other: ParallelConfig) -> tuple[float, ...]:
    def apart(a: int, b: int) -> float:
        return max(a, b) / min(a, b)

    return apart(one.pp, other.pp), apart(one.ep, other.ep), apart(one.nodes, other.nodes), one.pp, one.ep
