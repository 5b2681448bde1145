"""Schedules of all kinds and sizes, and a toy pipeline that runs lists with real (integer) gradients: the verifier's
slow twin, which knows nothing of its rules."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator

from parallel.pipeline.actions import Chunk
from parallel.pipeline.registry import NAMES, build, build_forward
from parallel.pipeline.schedule import Schedule

PRIME = 2_147_483_647


def legal_cases(
    ranks: tuple[int, ...], rounds: tuple[int, ...] = (2, 3)
) -> list[tuple[str, int, int, bool | None, int]]:
    """(name, ranks, micro-batches, pairs, stages per rank) of every legal combination for these sizes."""
    found = []
    for name in NAMES:
        for num_ranks in ranks:
            for pairs in (None, True, False):
                for stages in (2, 3) if name == "interleaved_1f1b" else (0,):
                    for rounds_ in rounds:
                        case = (name, num_ranks, rounds_ * num_ranks, pairs, stages)
                        try:
                            make(case)
                        except ValueError:
                            continue
                        found.append(case)
    return found


def make(case: tuple[str, int, int, bool | None, int]) -> Schedule:
    name, num_ranks, num_micro_batches, pairs, stages = case
    return build(name, num_ranks, num_micro_batches, pairs, stages or None)


def make_forward(case: tuple[str, int, int, bool | None, int]) -> Schedule:
    name, num_ranks, num_micro_batches, _, stages = case
    return build_forward(name, num_ranks, num_micro_batches, stages or None)


class Toy:
    """Slice k maps x to (k + 2) x^2 + c_k, the loss of micro-batch i is (i + 3) y^2, all modulo a prime.

    Squares make every gradient depend on the saved activations of its own micro-batch, labels on the micro-batch.
    """

    @staticmethod
    def forward(position: int, x: int) -> int:
        return ((position + 2) * x * x + 7 * position + 1) % PRIME

    @staticmethod
    def input_gradient(position: int, x: int, dy: int) -> int:
        return 2 * (position + 2) * x * dy % PRIME

    @staticmethod
    def weight_gradient(x: int, dy: int) -> int:
        return x * x * dy % PRIME

    @staticmethod
    def loss_gradient(micro_batch: int, y: int) -> int:
        return 2 * (micro_batch + 3) * y % PRIME


def plain(schedule: Schedule) -> dict[int, int]:
    """Weight gradients per stage, one micro-batch after the other, without any pipeline."""
    sums: dict[int, int] = defaultdict(int)
    for route, stages in enumerate(schedule.placement.routes):
        for micro_batch in schedule.micro_batches(route):
            inputs = [micro_batch + 5]
            for position in range(len(stages)):
                inputs.append(Toy.forward(position, inputs[-1]))
            gradient = Toy.loss_gradient(micro_batch, inputs[-1])
            for position in reversed(range(len(stages))):
                stage = stages[position]
                sums[stage] = (sums[stage] + Toy.weight_gradient(inputs[position], gradient)) % PRIME
                gradient = Toy.input_gradient(position, inputs[position], gradient)
    return sums


class ToyPipeline:
    """Ranks that follow their lists, over untagged queues between ranks: one for activations, one for gradients.

    A message carries its stage and micro-batch only so that a wrong delivery is noticed even where numbers agree.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.placement = schedule, schedule.placement
        self.queues: dict[tuple[int, int, str], deque[tuple[int, int, int]]] = defaultdict(deque)
        self.local: dict[Chunk, int] = {}
        self.saved: dict[tuple[int, int], int] = {}
        self.handles: dict[tuple[int, int], tuple[int, int]] = {}
        self.sums: dict[int, int] = defaultdict(int)
        self.ran: set[Chunk] = set()

    def run(self) -> bool:
        """Whether the lists run to their end and give every stage the gradients that it has without a pipeline."""
        schedule = self.schedule
        try:
            turns = [iter(self._rank(rank)) for rank in range(len(schedule.ranks))]
            over = [False] * len(turns)
            moved = True
            while moved and not all(over):
                moved = False
                for rank, turn in enumerate(turns):
                    if not over[rank]:
                        step = next(turn, "over")
                        over[rank] = step == "over"
                        moved |= step != "waiting"
            leftovers = any(self.queues.values()) or self.local or self.saved or self.handles
            return all(over) and not leftovers and self.sums == plain(schedule)
        except LookupError:
            return False

    def _rank(self, rank: int) -> Iterator[str]:
        for action in self.schedule.ranks[rank]:
            inputs = {}
            for part in action.parts:
                if self.placement.rank_of[part.stage] != rank or part in self.ran:
                    raise LookupError(part)
                self.ran.add(part)
                # All inputs before any work, as a pair that is launched at once would need them.
                while part.kind != "W" and part not in inputs:
                    value = self._receive(rank, part)
                    if value is None:
                        yield "waiting"
                    else:
                        inputs[part] = value
            for part in action.parts:
                self._do(rank, part, inputs.get(part, 0))
            yield "moved"

    def _receive(self, rank: int, part: Chunk) -> int | None:
        number = part.micro_batch
        ahead = part.kind == "F"
        neighbour = self.placement.before(part.stage) if ahead else self.placement.after(part.stage)
        if neighbour is None:
            if number not in self.schedule.micro_batches(self.placement.route_of(part.stage)):
                raise LookupError(part)
            return number + 5 if ahead else self.local.pop(Chunk("D", part.stage, number))
        owner = self.placement.rank_of[neighbour]
        if owner == rank:
            return self.local.pop(Chunk(part.kind, part.stage, number), None)
        queue = self.queues[owner, rank, part.kind]
        if not queue:
            return None
        stage, micro_batch, value = queue.popleft()
        if (stage, micro_batch) != (part.stage, number):
            raise LookupError(part)
        return value

    def _do(self, rank: int, part: Chunk, value: int) -> None:
        key, position = (part.stage, part.micro_batch), self.placement.position(part.stage)
        if part.kind == "F":
            self.saved[key] = value
            y = Toy.forward(position, value)
            target = self.placement.after(part.stage)
            if target is None:
                self.local[Chunk("D", *key)] = Toy.loss_gradient(part.micro_batch, y)
            else:
                self._send(rank, "F", target, part.micro_batch, y)
        elif part.kind == "B":
            x = self.saved.pop(key)
            self.handles[key] = (x, value)
            target = self.placement.before(part.stage)
            if target is not None:
                self._send(rank, "B", target, part.micro_batch, Toy.input_gradient(position, x, value))
        else:
            self.sums[part.stage] = (self.sums[part.stage] + Toy.weight_gradient(*self.handles.pop(key))) % PRIME

    def _send(self, rank: int, kind: str, stage: int, micro_batch: int, value: int) -> None:
        owner = self.placement.rank_of[stage]
        if owner == rank:
            self.local[Chunk(kind, stage, micro_batch)] = value
        else:
            self.queues[rank, owner, kind].append((stage, micro_batch, value))
