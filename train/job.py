"""A rank's part of a run: what it holds, and what it can be asked for. Put together by `assemble`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parallel.expert.dispatch import Dispatch
from parallel.host import Host
from parallel.pipeline.events import Timeline, write_trace
from parallel.pipeline.measure import bubble_s
from parallel.pipeline.record import Recorder, Times
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule
from parallel.process import Groups
from parallel.shards import ParamInfo, stacked_experts
from parallel.watch import Watch
from parallel.zero.optimizer import StepResult, ZeroOptimizer
from train import environment
from train.checkpoint.saver import Checkpoints
from train.config import RunConfig
from train.data.rows.ahead import Reader as RowReader
from train.data.rows.blend import Stream
from train.data.rows.valid import Validation
from train.files import in_words
from train.model.transformer import LossTerms, Transformer
from train.prompts import Prompts
from train.recipe.ema import Ema
from train.recipe.recipe import Recipe, StepPlan
from train.stage import Reader, Stage
from train.track.gauges import peak_memory_bytes
from train.track.patience import Patience
from train.track.planned import planned
from train.track.sinks import tell
from train.track.vector import Metrics, Rows

EMBEDDING = "embed_tokens.weight"

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Job:
    """Everything that a rank needs to train, and how far it has come."""

    config: RunConfig
    groups: Groups
    recipe: Recipe
    stages: dict[int, Stage]  # by number in the pipeline's placement
    runtime: Runtime
    readers: dict[int, Reader]  # the same slices, as they read texts
    reading: Runtime
    recorder: Recorder
    dispatch: Dispatch
    optimizer: ZeroOptimizer
    ema: Ema | None
    train_rows: Stream
    reader: RowReader  # through which a step's rows are read
    validation: Validation
    prompts: Prompts | None
    patience: Patience
    checkpoints: Checkpoints
    metrics: Metrics
    flops_per_token: float
    one_machine: bool  # all ranks' clocks are one
    wandb_id: str | None = None
    step: int = 0  # finished steps

    @property
    def device(self) -> torch.device:
        return self.groups.device

    @property
    def host(self) -> Host:
        """The border to the device: where numbers are read, and counted."""
        return self.groups.host

    @property
    def watch(self) -> Watch:
        """Through which this rank waits for others, and says what it does."""
        return self.groups.watch

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run: console, metrics, pictures."""
        return self.groups.mesh.rank == 0

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def is_done(self) -> bool:
        """Whether no step is left: the recipe is at its end, or the validation loss has not improved for too long."""
        return self.step >= self.recipe.num_steps or self.patience.is_exhausted

    @property
    def models(self) -> list[Transformer]:
        """The slices of the model that this rank holds."""
        return [stage.model for stage in self.stages.values()]

    def begin(self, what: str) -> None:
        """From here on the watch knows that this rank is in `what`, which starts with the pipeline."""
        self.watch.during = what
        self.watch.do("start of the pipeline")

    def forward_backward(self, tokens: Callable[[int], Tensor], terms: LossTerms, num_micro_batches: int) -> None:
        """All of a step's micro-batches through the pipeline; gradients add up in `main_grad`, findings in the stages.

        Gradients of slices that are done with are being summed over their replicas when this returns.

        tokens: micro-batch (0 to num_micro_batches - 1) to its rows [B, S + 1].
        """
        schedule, num_sequences = self.config.schedule(num_micro_batches), self.config.train.micro_batch_size
        self._run(schedule, tokens, terms, num_sequences, self.optimizer.complete)

    def forward_backward_alone(self, rows: Tensor, terms: LossTerms) -> None:
        """One micro-batch by itself, stage after stage and back."""
        self._run(self.config.schedule_alone(), lambda _: rows, terms, len(rows))

    @torch.no_grad()
    def forward(self, tokens: Callable[[int], Tensor], num_micro_batches: int) -> None:
        """Micro-batches of one sequence through the pipeline, forward only, in evaluation mode."""
        with self._evaluating():
            self._run(self.config.forward_schedule(num_micro_batches), tokens, LossTerms(1.0, 0.0, 0.0), 1)

    @torch.no_grad()
    def read(self, texts: Callable[[int], Tensor], num_texts: int, length: int) -> dict[int, Tensor]:
        """Texts [1, length] through the pipeline; the normed states [1, length, hidden] of those that end here."""
        found: dict[int, Tensor] = {}
        for reader in self.readers.values():
            reader.begin(texts, found)
        with self._evaluating():
            self.reading.run(self.config.forward_schedule(num_texts), (1, length, self.config.model.hidden_size))
        return found

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """In evaluation mode nothing is kept for a backward, and no load is counted."""
        for model in self.models:
            model.eval()
        yield
        for model in self.models:
            model.train()

    def forget_exchanges(self) -> None:
        """What the dispatch has counted since it was last asked is of no step."""
        self.dispatch.take_internode_bytes()
        self.dispatch.take_node_visits()

    def _run(
        self,
        schedule: Schedule,
        tokens: Callable[[int], Tensor],
        terms: LossTerms,
        num_sequences: int,
        complete: Callable[[int], None] | None = None,
    ) -> None:
        for stage in self.stages.values():
            stage.begin(tokens, terms)
        shape = (num_sequences, self.config.train.seq_len, self.config.model.hidden_size)
        self.runtime.run(schedule, shape, complete)

    def update(self, lr: float) -> StepResult:
        """One optimizer step; the moving average takes in its weights beside what comes next."""
        self.watch.do("optimizer")
        if self.ema is not None:
            self.ema.wait()
        result = self.optimizer.step(lr)
        if self.ema is not None and result.finite:
            self.ema.start()
        self.watch.do("after the optimizer")
        return result

    def micro_batches(self, plan: StepPlan) -> Iterator[tuple[int, int]]:
        """(position of the first sequence, number of sequences) of each of this rank's micro-batches of a step.

        A step's sequences are dealt out in runs, one per data-parallel rank, so that a batch is a function of
        (seed, step) and never of the topology.
        """
        mesh, count = self.groups.mesh, self.config.train.micro_batch_size
        share = plan.num_sequences // mesh.config.dp
        first = plan.first_sequence + mesh.dp_rank * share
        return ((position, count) for position in range(first, first + share, count))

    def read_ahead(self, plan: StepPlan) -> None:
        """Begin to read what this rank needs of a step, if anything, in the background."""
        if any(model.reads_tokens for model in self.models):
            self.reader.want(list(self.micro_batches(plan)))

    def num_targets(self, plan: StepPlan) -> int:
        """Predicted tokens of a step over all ranks, known to each of them before it."""
        return self.train_rows.num_targets(plan.first_sequence, plan.num_sequences)

    def no_load(self) -> Tensor:
        """Zeros [num_routers, n_routed_experts] to count tokens into."""
        shape = (self.config.model.num_routers, self.config.model.n_routed_experts)
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def gather(self, numbers: Tensor) -> Tensor:
        """numbers [n] of every rank, in rank order: [ranks, n]."""
        return self.groups.world.all_gather(numbers, self.watch, "numbers", "numbers from {peers}")

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Integers summed over all ranks, exact in any order."""
        return self.groups.world.sum(counts, self.watch, "numbers", "counts from {peers}")

    def any_rank(self, says_so: bool) -> bool:
        """Whether any rank says so; all call it together."""
        count = self.sum_counts(self.host.put(torch.tensor([int(says_so)])))
        return bool(self.host.read("stop", count)[0][0])

    def to_first(self, thing: Any) -> list[Any]:
        """On rank 0 one small object of every rank, in rank order; elsewhere nothing. Not for the hot path."""
        self.checkpoints.settle()
        return self.groups.checkpoint.to_first(thing, self.watch)

    def from_first(self, thing: T) -> T:
        """Rank 0's small object, on all ranks."""
        self.checkpoints.settle()
        return self.groups.checkpoint.from_first(thing, self.watch)

    def gather_objects(self, thing: T) -> list[T]:
        """One small object of every rank, in rank order, on all ranks: for the end of a run."""
        return self.from_first(self.to_first(thing))

    def meet(self) -> None:
        """Call where all ranks have just left an exchange: clocks of different machines are compared from here on."""
        if not self.one_machine:
            self.recorder.meet()

    def measured(self) -> dict[str, Tensor | float]:
        """What this rank has measured in the step beside its losses, by metric. To be asked once in a step.

        Waits are measured where host and device are one.
        """
        visits, num_tokens = self.dispatch.take_node_visits()
        num_bytes = self.dispatch.take_internode_bytes()
        found: dict[str, Tensor | float] = {"memory/peak_bytes": peak_memory_bytes(self.device)}
        if self.config.model.num_routers:
            found |= {"moe/nodes_per_token": visits, "moe/routed_tokens": num_tokens, "moe/internode_bytes": num_bytes}
        if not self.host.runs_ahead:
            found |= {f"pipeline/{name}": time_s for name, time_s in asdict(self.recorder.times()).items()}
            found["perf/exposed_comm_s"] = self.recorder.waited_s("experts")
            found["perf/zero_comm_s"] = self.recorder.waited_s("optimizer")
        return found

    def planned(self) -> dict[str, float]:
        """What the launcher has planned of this run, as metrics of rank 0's; where it could not, that is told."""
        figures, reason = planned(environment.plan_file()) if self.is_main else ({}, "")
        if reason:
            tell(f"the plan of this run is not whole: {reason}")
        return figures

    def bubble(self, rows: Rows) -> dict[str, float]:
        """The bubble, which all ranks' times make together; nothing where none has measured its own."""
        columns = {field.name: self.metrics.column(rows, f"pipeline/{field.name}") for field in fields(Times)}
        times = [Times(**dict(zip(columns, own, strict=True))) for own in zip(*columns.values(), strict=True)]
        return {"perf/bubble_s": bubble_s(times, self.config.parallel.dp)} if times else {}

    def write_timeline(self, num_micro_batches: int) -> None:
        """Gather the events of the step just finished, of which each rank had so many, into one file of rank 0's."""
        everyone = self.to_first(self.recorder.events)
        if self.is_main:
            dp = self.config.parallel.dp
            first_s = min(event.start_s for events in everyone for event in events)
            pipelines = {
                f"pipeline {column}": [event.moved(-first_s) for events in everyone[column::dp] for event in events]
                for column in range(dp)
            }
            schedule = self.config.schedule(num_micro_batches)
            timeline = Timeline(f"{self.config.run.name}, step {self.step}, {schedule.name}", schedule, pipelines)
            path = self.folder / "traces" / f"step-{self.step:08d}.json"
            try:
                write_trace(timeline, path)
            except OSError as error:
                log.warning("%s could not be written: %s; the run goes on without it", path, in_words(error))
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)


def held(
    models: Iterable[Transformer], positions: Sequence[int] = (), num_slices: int = 1
) -> list[tuple[ParamInfo, nn.Parameter]]:
    """Every parameter of this rank once, with its place in the global tensor of its name.

    positions: which slices of the model these are, of `num_slices`; without them nothing is said of it.
    """
    found: dict[str, tuple[ParamInfo, nn.Parameter]] = {}
    for number, model in enumerate(models):
        for name, param in model.named_parameters():
            shape = tuple(param.shape)
            slices = tuple(positions[number : number + 1])
            if model.is_expert(name):
                info = stacked_experts(name, shape, model.config.n_routed_experts, model.first_expert)
            else:
                info = ParamInfo(name, shape, replicas="embedding" if name == EMBEDDING else "dense")
            if slices and name == EMBEDDING:
                # Prediction depths use it in the last slice, on whatever rank, and one sum joins all replicas.
                slices = (0, num_slices - 1) if model.config.num_nextn_predict_layers and num_slices > 1 else (0,)
            info = replace(info, matrix=model.matrix_shape(name), slices=slices)
            # Slices that share the embedding hold the same tensor.
            found.setdefault(name, (info, param))
    return list(found.values())
