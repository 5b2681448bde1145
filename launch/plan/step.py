"""A pipeline's step out of traced layers: what every action of its schedule takes, and then the schedule itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from launch.plan.clock import Clock, Host, Priced, Totals
from launch.plan.events import Enter, Kernel
from launch.plan.replay import Passes, ReplayedStage, run_alone
from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.events import Event as ActionEvent
from parallel.pipeline.overlap import overlap_of
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Simulation, simulate
from train.model.parts import Parts

# The name of each kind of action in the published table of a step (arXiv 2505.09343, Table 4).
PARTS = {"F": "1F", "B": "1B", "D": "1B", "W": "1W", "pair": "1F1B"}
# The passes that each kind of chunk is made of.
PASSES = {"F": "F", "B": "B", "W": "W", "D": "BW"}
# An action is carried out so often, and the last but one counts: there the host has come to be as far ahead as it is in
# the middle of a step, and weight gradients are left to the next action, as they were by the one before.
_ROUNDS = 4


def layers_of_parts(parts: Parts, first_k_dense_replace: int) -> tuple[str, ...]:
    """The kinds of the layers that a slice of the model holds, in order, as the trace names them; the first is what all
    layers of a stage share."""
    kinds = ["stage"] + ["embedding"] * parts.embedding
    kinds += ["dense" if index < first_k_dense_replace else "moe" for index in parts.layers]
    kinds += ["head"] * parts.head + ["mtp"] * parts.mtp
    return tuple(kinds)


@dataclass(frozen=True)
class ActionCost:
    """One action by itself, in the middle of a step.

    Attributes:
        seconds: from its start, with its inputs there, to its end.
        leads_s: how long before the end the result of its F and of its B leave.
        totals: what happens meanwhile.
    """

    seconds: float
    leads_s: Mapping[str, float]
    totals: Totals


class _ToClock:
    """Plays stretches of priced events to a clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def play(self, stretch: Priced, scope: tuple[int, int, int]) -> None:
        for event, seconds in zip(stretch.events, stretch.seconds, strict=True):
            self._clock.see(event, seconds, scope)


@dataclass
class ActionCosts:
    """What the actions of a pipeline take, each kind measured once; as `simulate.Prices`.

    Attributes:
        slices: the kinds of the layers of each slice of the model.
        alone: each kind of layer, priced for actions that wait for their own communication.
        beside: the same for pairs, which compute beside each other's communication.
        latency: from a chunk's sending its result until the neighbour has it, in seconds.
    """

    placement: Placement
    slices: Sequence[tuple[str, ...]]
    alone: Mapping[str, Passes[Priced]]
    beside: Mapping[str, Passes[Priced]]
    host: Host
    latency: float
    _found: dict[tuple[str, ...], ActionCost] = field(default_factory=dict)

    def durations(self, placement: Placement) -> Callable[[Action], float]:
        return lambda action: self.cost(action).seconds

    def lead(self, placement: Placement, event: ActionEvent, part: Chunk) -> float:
        return self.cost(event.action).leads_s[part.kind]

    def cost(self, action: Action) -> ActionCost:
        """An action's cost. Actions over like slices cost the same."""
        key = (action.kind, *(",".join(self._kinds(part.stage)) for part in _chunks(action)))
        if key not in self._found:
            self._found[key] = self._measure(action)
        return self._found[key]

    def pieces(self, action: Action) -> list[tuple[tuple[str, str, str], float]]:
        """(layer, node, pass) and seconds of every kernel of an action, waits left out."""
        layers = self.beside if isinstance(action, Pair) else self.alone
        found = []
        for part in _chunks(action):
            for kind in self._kinds(part.stage):
                passes = layers[kind]
                weights = [each for left in passes.weights for each in left]
                lists = {"F": passes.forward, "B": passes.backward, "W": weights}
                for name in PASSES[part.kind]:
                    found += _kernels(lists[name])
        return found

    def _kinds(self, stage: int) -> tuple[str, ...]:
        return self.slices[self.placement.position(stage)]

    def _measure(self, action: Action) -> ActionCost:
        return self.play(action, Clock(self.host))[0]

    def play(self, action: Action, clock: Clock) -> tuple[ActionCost, float]:
        """Carry an action out by a new clock, as in the middle of a step; its cost, and when it was over."""
        player = _ToClock(clock)
        layers = self.beside if isinstance(action, Pair) else self.alone
        stages = {
            part.stage: ReplayedStage(part.stage, [layers[kind] for kind in self._kinds(part.stage)], player)
            for part in _chunks(action)
        }
        started_s, sent_s = 0.0, dict[str, float]()
        found: list[tuple[ActionCost, float]] = []

        def ended(done: Action) -> None:
            nonlocal started_s
            leads_s = {kind: clock.compute_s - at_s for kind, at_s in sent_s.items()}
            found.append((ActionCost(clock.compute_s - started_s, leads_s, clock.totals), clock.compute_s))
            started_s, clock.totals = clock.compute_s, Totals()
            sent_s.clear()

        rank = self.placement.rank_of[_chunks(action)[0].stage]
        run_alone(
            self.placement,
            rank,
            [each for turn in range(_ROUNDS) for each in _round(action, turn)],
            stages,
            overlap_of(not self.host.is_device),
            lambda part: sent_s.__setitem__(part.kind, clock.compute_s),
            ended,
        )
        return found[-1 - len(_round(action, 0))]


def _kernels(stretches: Sequence[Priced]) -> list[tuple[tuple[str, str, str], float]]:
    found, piece = [], ("", "", "")
    for stretch in stretches:
        for event, seconds in zip(stretch.events, stretch.seconds, strict=True):
            if isinstance(event, Enter):
                piece = (event.layer, event.node, event.kind)
            elif isinstance(event, Kernel):
                found.append((piece, seconds))
    return found


def _chunks(action: Action) -> tuple[Chunk, ...]:
    return (action.forward, action.backward) if isinstance(action, Pair) else (action,)


def _round(action: Action, turn: int) -> list[Action]:
    """The action for micro-batches of its own, behind what it needs to have something to do."""
    first = 2 * turn
    if isinstance(action, Pair):
        return [Pair(Chunk("F", action.forward.stage, first), Chunk("D", action.backward.stage, first + 1))]
    own = Chunk(action.kind, action.stage, first)
    return [Chunk("B", action.stage, first), own] if action.kind == "W" else [own]


@dataclass(frozen=True)
class PipelineStep:
    """A simulated step of one pipeline, before the optimizer's part.

    Attributes:
        parts_s: by the published table's names, the mean over ranks; they and the bubble make up the step.
        totals: of each rank.
    """

    simulation: Simulation
    parts_s: dict[str, float]
    totals: tuple[Totals, ...]


def run_schedule(schedule: Schedule, costs: ActionCosts) -> PipelineStep:
    """The step of a schedule whose actions cost this."""
    simulation = simulate(schedule, costs)
    num_ranks = schedule.placement.num_ranks
    parts_s = dict.fromkeys(("1F", "1B", "1W", "1F1B"), 0.0)
    totals = tuple(Totals() for _ in range(num_ranks))
    for event in simulation.events:
        cost = costs.cost(event.action)
        parts_s[PARTS[event.action.kind]] += cost.seconds / num_ranks
        totals[event.rank].add(cost.totals)
    parts_s["bubble"] = sum(simulation.bubble) / num_ranks
    return PipelineStep(simulation, parts_s, totals)
