"""What our own code costs the host: layers of every kind at sizes whose arithmetic is nothing, timed piece by piece.

A step of a small model on a processor is Python for a good part: modules, functions of autograd, schedules. None of it
depends on how wide a layer is or how long a row. So a job is put together as a run's is, with three layers of each kind
and sizes that no product or pass over memory takes time for, and its steps are timed by the names of its pieces, as the
trace of a plan has them. What a piece takes beside its operations' own times, over the number of its
operations, is the host's time for one operation of such a piece (`call_times`).
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from launch.plan.cluster import Cluster
from launch.plan.events import Calls, Enter, Event, Kernel
from launch.plan.figures import CallTime
from launch.plan.kernels import Rates
from launch.plan.layers import layers_of, small_job
from launch.plan.pieces import REST, Pieces, job_of, one_step
from launch.plan.state import update_events
from launch.plan.world import as_drawn
from train import compose
from train.config import RunConfig
from train.precision.build import settle

PRECISIONS = ("fp32", "bf16", "fp8")
# A step has few micro-batches of few tokens, and experts that get some rows each.
SIZES = (
    *("model=tiny", "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=64"),
    *("model.moe_intermediate_size=32", "train.seq_len=16", "train.micro_batch_size=1", "train.global_batch_size=4"),
    *("zero.engine=native", "run.device=cpu"),
)
# Steps of each precision that are timed, behind those in which memory is found and kernels are made.
NUM_STEPS, NUM_FIRST = 8, 3


@dataclass(frozen=True)
class PieceTime:
    """A piece of our own code at a size of nothing.

    Attributes:
        precision: of the run.
        layer, node, kind: as `events.Enter` has them; `step` for what belongs to none.
        us: of one layer and one micro-batch, or of one step.
    """

    precision: str
    layer: str
    node: str
    kind: str
    us: float


def tiny_run(precision: str) -> RunConfig:
    """The run whose steps are timed."""
    config = small_job(compose.compose([*SIZES, f"precision={precision}"]))
    return replace(config, precision=settle(config.precision, "cpu"))


def step_times(config: RunConfig, num_steps: int, num_first: int = NUM_FIRST) -> dict[Enter, float]:
    """Median seconds of every piece in a step."""
    pieces, found = Pieces(), list[dict[Enter, float]]()
    with job_of(config, pieces) as job:
        for _ in range(num_first + num_steps):
            one_step(job, pieces.enters)
            of_step, micro_batches = pieces.step()
            total: Counter[Enter] = Counter()
            for spent in (of_step, *micro_batches):
                total.update(spent.work_s)
            found.append(dict(total))
    kept = found[num_first:]
    return {enter: statistics.median(step.get(enter, 0.0) for step in kept) for enter in kept[-1]}


def measured_code(precisions: Sequence[str] = PRECISIONS, num_steps: int = NUM_STEPS) -> Iterator[PieceTime]:
    """Our own code's pieces, by precision."""
    for precision in precisions:
        config = tiny_run(precision)
        for enter, seconds in step_times(config, num_steps).items():
            times = _times_in_step(config, enter.layer)
            yield PieceTime(precision, enter.layer, enter.node, enter.kind, 1e6 * seconds / times)


def _times_in_step(config: RunConfig, layer: str) -> int:
    """How often a step goes through the pieces of a kind of layer."""
    if layer in ("step", "optimizer"):
        return 1
    model, train = config.model, config.train
    num_layers = {"dense": model.first_k_dense_replace, "moe": model.num_moe_layers}.get(layer, 1)
    return num_layers * train.global_batch_size // train.micro_batch_size


def call_times(pieces: Sequence[PieceTime], cluster: Cluster) -> list[CallTime]:
    """The host's time for one operation of each piece: what it took beyond its operations' own times, as the cluster
    has those, over the number of operations in the piece's trace. Pieces without operations have none."""
    rates, found = Rates(cluster), []
    for precision in dict.fromkeys(piece.precision for piece in pieces):
        config = tiny_run(precision)
        work, calls = _traced(config, rates)
        for piece in pieces:
            enter = Enter(piece.layer, piece.node, piece.kind)
            if piece.precision == precision and calls[enter]:
                us = max(piece.us - 1e6 * work[enter], 0.0) / calls[enter]
                found.append(CallTime(precision, *_words(enter), us))
    return found


def step_us(pieces: Sequence[PieceTime]) -> float:
    """What every step takes besides its layers and its optimizer."""
    by_precision: Counter[str] = Counter()
    for piece in pieces:
        if piece.layer == "step":
            by_precision[piece.precision] += piece.us  # type: ignore[assignment]
    return float(statistics.median(by_precision.values()))


def _words(enter: Enter) -> tuple[str, str, str]:
    return enter.layer, enter.node, enter.kind


def _traced(config: RunConfig, rates: Rates) -> tuple[Mapping[Enter, float], Mapping[Enter, int]]:
    """Seconds of the operations of each piece of a layer, and how many the host calls there."""
    work: defaultdict[Enter, float] = defaultdict(float)
    calls: Counter[Enter] = Counter()
    layers = layers_of(config, "cpu", as_drawn)
    lists: list[Sequence[Event]] = [update_events(config, 0, "cpu")]
    for passes in layers.passes.values():
        lists += [passes.forward, passes.backward, *passes.weights]
    for events in lists:
        enter = REST
        for event in events:
            if isinstance(event, Enter):
                enter = event
            elif isinstance(event, Calls):
                calls[enter] += event.number
            elif isinstance(event, Kernel):
                work[enter] += rates.seconds(event)
    return work, calls
