"""What our own code costs the host: layers of every kind at sizes whose arithmetic is nothing, timed piece by piece.

A step of a small model on a processor is Python for a good part: modules, functions of autograd, schedules. None of it
depends on how wide a layer is or how long a row. So a job is put together as a run's is, with three layers of each kind
and sizes that no product or pass over memory takes time for, and its steps are timed by the names of its pieces, as the
trace of a plan has them. What a piece takes beside its operations' own times, over the number of its
operations, is the host's time for one operation of such a piece (`call_times`).
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from launch.plan.cluster import Cluster
from launch.plan.events import Calls, Enter, Event, Kernel
from launch.plan.figures import CallTime
from launch.plan.kernels import Rates
from launch.plan.layers import layers_of, small_job
from launch.plan.names import Listener, Piece, tapes
from launch.plan.state import update_events
from launch.plan.world import FakeRows, as_drawn, nothing
from parallel import process
from parallel.pipeline.segments import Name
from train import compose, loop
from train.assemble import Files, put_together
from train.config import RunConfig
from train.data.rows.ahead import AtOnce
from train.job import Job
from train.precision.build import settle
from train.recipe.balance import update_bias
from train.tally import reduce
from train.track.gauges import StepTimer

PRECISIONS = ("fp32", "bf16", "fp8")
# A step has few micro-batches of few tokens, and experts that get some rows each.
SIZES = (
    *("model=tiny", "model.vocab_size=512", "model.hidden_size=64", "model.intermediate_size=64"),
    *("model.moe_intermediate_size=32", "train.seq_len=16", "train.micro_batch_size=1", "train.global_batch_size=4"),
    *("zero.engine=native", "run.device=cpu"),
)
# Steps of each precision that are timed, behind those in which memory is found and kernels are made.
NUM_STEPS, NUM_FIRST = 8, 3
BEGIN, REST = Enter("step", "begin", "U"), Enter("step", "rest", "U")
ZERO_GRAD, UPDATE = Enter("optimizer", "zero_grad", "U"), Enter("optimizer", "update", "U")


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


class _Pieces:
    """Hears of pieces as they begin, and books the time on the one before. As `record.Recorder`, it can be asked for
    the piece that it is in."""

    def __init__(self) -> None:
        self.seconds: defaultdict[Enter, float] = defaultdict(float)
        self.piece = Piece(Name("step", 0, "begin"), "U", 0, 0)
        self.num_turns = 0
        self._at_s = time.perf_counter()

    def begins(self, name: Name, kind: str, turn: int | None = None) -> None:
        """What was going on is over."""
        self._book()
        self.piece = Piece(name, kind, 0, 0)

    def _book(self) -> None:
        now_s = time.perf_counter()
        name = self.piece.name
        self.seconds[Enter(name.layer, name.node or name.layer, self.piece.kind)] += now_s - self._at_s
        self._at_s = now_s

    def step(self) -> dict[Enter, float]:
        """Seconds of each piece since the last call."""
        self._book()
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


class _Tokens(FakeRows):
    """Rows of tokens that are drawn."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len)
        self._vocab_size = vocab_size

    def rows(self, first: int, count: int) -> Tensor:
        return torch.randint(2, self._vocab_size, (count, self._seq_len + 1))


@contextmanager
def job_of(config: RunConfig, pieces: Listener | None = None) -> Iterator[Job]:
    """A job with values over the ranks that have been started, which tells `pieces` what it begins; it has no files."""
    groups = process.start(config.parallel, "cpu", config.mirrored, config.shared_ends)
    rows = _Tokens(config.train.seq_len, config.model.vocab_size)
    files = Files(train_rows=rows, validation=nothing(), prompts=None, checkpoints=nothing(), reader=AtOnce)
    yield put_together(config, groups, files, tapes=None if pieces is None else tapes(pieces))
    process.stop(groups)


def one_step(job: Job, begins: Callable[[Enter], object] = lambda _: None) -> None:
    """A step as `loop.run` has it, without reports. begins: hears of the optimizer's piece, and of what follows it."""
    plan = job.recipe.at(job.step)
    terms = loop.loss_terms(job, plan)
    tally = loop.accumulate(job, plan, terms, StepTimer())
    begins(UPDATE)
    job.update(plan.lr)
    begins(REST)
    reduce(job, plan, tally, False)
    for model in job.models:
        update_bias(model, tally.load, plan.bias_update_rate)
    job.step += 1


def step_times(config: RunConfig, num_steps: int, num_first: int = NUM_FIRST) -> dict[Enter, float]:
    """Median seconds of every piece in a step."""
    pieces, found = _Pieces(), []

    def begins(enter: Enter) -> None:
        pieces.begins(Name(enter.layer, 0, enter.node), enter.kind)

    with job_of(config, pieces) as job:
        for _ in range(num_first + num_steps):
            begins(BEGIN)
            one_step(job, begins)
            found.append(pieces.step())
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
