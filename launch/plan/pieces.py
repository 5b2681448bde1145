"""A real job's steps, timed by the names of their pieces, as the trace of a plan has them.

A job is put together as a run's is, over the ranks that have been started, with values and without files. Whoever
listens to the names of its pieces books the time of each, and what a piece waits for other ranks apart.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from launch.plan.events import Enter
from launch.plan.names import Listener, Piece, tapes
from launch.plan.world import FakeRows, nothing
from parallel import process
from parallel.pipeline.segments import Name
from parallel.watch import Watch
from train import loop
from train.assemble import Files, put_together
from train.config import RunConfig
from train.data.rows.ahead import AtOnce
from train.job import Job
from train.recipe.balance import update_bias
from train.tally import reduce
from train.track.gauges import StepTimer

BEGIN, REST = Enter("step", "begin", "U"), Enter("step", "rest", "U")
ZERO_GRAD, UPDATE = Enter("optimizer", "zero_grad", "U"), Enter("optimizer", "update", "U")
# The pieces that belong to no micro-batch.
OF_STEP = {"step", "optimizer"}
# Words of a text come as often as 1 over their rank (Zipf's law); ranks begin here, as no token is most of a text.
FIRST_WORD = 4


@dataclass
class Spent:
    """Seconds by piece: of its own work, of the processor's for it, and of waits for other ranks.

    A processor's seconds are those of all threads of the process, and leave out what other programs take away.
    """

    work_s: defaultdict[Enter, float] = field(default_factory=lambda: defaultdict(float))
    processor_s: defaultdict[Enter, float] = field(default_factory=lambda: defaultdict(float))
    waits_s: defaultdict[Enter, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def all_s(self) -> float:
        """The sum over all pieces, in seconds."""
        return sum(self.work_s.values()) + sum(self.waits_s.values())


class Pieces:
    """Hears of pieces as they begin, and books the time on the one before; of waits, on the one that is in them.

    As `record.Recorder`, it can be asked for the piece that it is in.
    """

    def __init__(self) -> None:
        self.piece = Piece(Name("step", 0, "begin"), "U", 0, 0)
        self.num_turns = 0
        self._at_s, self._processor_at_s = time.perf_counter(), time.process_time()
        self._micro_batches: list[Spent] = []
        self._of_step = Spent()

    def begins(self, name: Name, kind: str, turn: int | None = None) -> None:
        """What was going on is over. A forward behind anything else is another micro-batch's."""
        self._book()
        if kind == "F" and self.piece.kind != "F":
            self._micro_batches.append(Spent())
        self.piece = Piece(name, kind, 0, 0)

    def enters(self, enter: Enter) -> None:
        """A piece begins that is of no layer."""
        self.begins(Name(enter.layer, 0, enter.node), enter.kind)

    def waited(self, _: str, start_s: float, stop_s: float) -> None:
        """A wait for other ranks is over, on the clock of `Watch`, which is this one's."""
        self._book(stop_s - start_s)

    def listen(self, watch: Watch) -> None:
        """Hear of a rank's waits too."""
        before = watch.listener

        def heard(kind: str, start_s: float, stop_s: float) -> None:
            if before is not None:
                before(kind, start_s, stop_s)
            self.waited(kind, start_s, stop_s)

        watch.listener = heard

    def _book(self, waited_s: float = 0.0) -> None:
        now_s, processor_now_s, name = time.perf_counter(), time.process_time(), self.piece.name
        spent = self._of_step if name.layer in OF_STEP or not self._micro_batches else self._micro_batches[-1]
        enter = Enter(name.layer, name.node or name.layer, self.piece.kind)
        spent.work_s[enter] += now_s - self._at_s - waited_s
        spent.processor_s[enter] += processor_now_s - self._processor_at_s
        spent.waits_s[enter] += waited_s
        self._at_s, self._processor_at_s = now_s, processor_now_s

    def step(self) -> tuple[Spent, list[Spent]]:
        """What was spent since the last call: on the step itself, and on each of its micro-batches."""
        self._book()
        found = self._of_step, self._micro_batches
        self._of_step, self._micro_batches = Spent(), []
        return found


class _Tokens(FakeRows):
    """Rows of tokens that are drawn, as often as words of a text are."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        super().__init__(seq_len)
        self._often = 1.0 / (torch.arange(vocab_size) + FIRST_WORD)

    def rows(self, first: int, count: int) -> Tensor:
        drawn = torch.multinomial(self._often, count * (self._seq_len + 1), replacement=True)
        return drawn.view(count, self._seq_len + 1)


@contextmanager
def job_of(config: RunConfig, pieces: Listener | None = None) -> Iterator[Job]:
    """A job with values over the ranks that have been started, which tells `pieces` what it begins; it has no files."""
    groups = process.start(config.parallel, "cpu", config.mirrored, config.shared_ends)
    rows = _Tokens(config.train.seq_len, config.model.vocab_size)
    files = Files(train_rows=rows, validation=nothing(), prompts=None, checkpoints=nothing(), reader=AtOnce)
    yield put_together(config, groups, files, tapes=None if pieces is None else tapes(pieces))
    process.stop(groups)


def one_step(job: Job, enters: Callable[[Enter], object] = lambda _: None) -> None:
    """A step as `loop.run` has it, without reports. enters: hears of what belongs to no micro-batch."""
    enters(BEGIN)
    plan = job.recipe.at(job.step)
    terms = loop.loss_terms(job, plan)
    enters(ZERO_GRAD)
    tally = loop.accumulate(job, plan, terms, StepTimer())
    enters(UPDATE)
    job.update(plan.lr)
    enters(REST)
    reduce(job, plan, tally, False)
    for model in job.models:
        update_bias(model, tally.load, plan.bias_update_rate)
    job.step += 1
