"""What a plan comes to: a pipeline rank's memory, and a step in one set of kernels."""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan import memory
from launch.plan.clock import Totals
from launch.plan.state import StateBytes
from launch.plan.step import ActionCosts, PipelineStep
from parallel.pipeline.actions import Action


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank's memory at its fullest, in bytes.

    Attributes:
        state: what lies there between steps.
        quantised: copies of weights in another format.
        step: what the step itself holds at its peak.
        reserve: context, communicators and what an allocator cannot give out.
    """

    state: StateBytes
    quantised: int
    step: memory.Peak
    reserve: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.state.on_device + self.quantised + self.step.num_bytes + self.reserve


@dataclass(frozen=True)
class StepTime:
    """A step in one set of kernels. Seconds, but for what says otherwise.

    Attributes:
        pipeline: the schedule, simulated.
        updates: of each pipeline rank's optimizer, from the last backward to new weights everywhere.
        rest_s: sums over ranks and reports, where the host is the device and has nothing else to do meanwhile.
        ranks_s: what the device of each pipeline rank works, from which waits for neighbours are left out.
        pair: a pair of forward and backward of a middle rank; of a schedule without pairs the actions, one by one, that
            take one micro-batch through one of its stages and back.
        pair_totals: what happens in it.
    """

    kernels: str
    costs: ActionCosts
    pipeline: PipelineStep
    updates: tuple[Totals, ...]
    rest_s: float
    ranks_s: tuple[float, ...]
    pair: tuple[Action, ...]
    pair_totals: Totals

    @property
    def has_pairs(self) -> bool:
        """Whether forward and backward run together."""
        return self.pair[0].kind == "pair"

    @property
    def optimizer_s(self) -> float:
        """What the slowest optimizer of a pipeline takes."""
        return max(totals.length_s for totals in self.updates)

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.pipeline.simulation.step + self.rest_of_step_s

    @property
    def rest_of_step_s(self) -> float:
        """What a step takes behind its pipeline, which does not depend on the number of micro-batches."""
        return self.optimizer_s + self.rest_s

    @property
    def parts_s(self) -> dict[str, float]:
        """By the names of the published table (arXiv 2505.09343, Table 4): means over ranks, which add up to a step.
        What a step takes besides is the optimizer's."""
        return {**self.pipeline.parts_s, "optimizer": self.rest_of_step_s}
