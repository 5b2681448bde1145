"""Pairs interleaved against the same list taken apart, over an emulated network: pp 2 x ep 2, one rank per node.

    python -m benchmarks.overlap [rate=100mbit ratios=0.67,1 rounds=3 schedules=dualpipev,dualpipe ...]
    python -m benchmarks.overlap model [rounds=3 rate=100mbit]

The first form needs what `python -m benchmarks.emulate check` asks for. Its stages are layers of attention | dispatch |
experts | combine over a real dispatch, stage, runtime and links; only the computing sleeps, so that two cores are
enough for four ranks. `ratios` are communication over computing: the all-to-alls of a micro-batch, measured alone, over
its F + B + W. Pairs and the list apart take turns in one run.

pair    one stage over the expert group, without a pipeline: the steady state. Time per micro-batch of the step with
        pairs (each backward beside the next forward), taken apart, and with an exchange that costs nothing.
step    whole steps of a schedule over two pipeline ranks; its fill and drain have no pairs.

gain    step apart / step with pairs. The list apart already hides something: weight gradients are taken while a
        communication is on its way.
hidden  1 - (step - step without communication) / (time of the all-to-alls alone): the share that nobody waited for.
        "by pairs" is (apart - pairs) / (time of the all-to-alls alone), what interleaving has added to it.

`model` is the tiny model through the job that `python -m train` runs: pairs on and off, flat and two hops, over the
emulated network (where this machine can) and over loopback. As measured: there computing takes cores, and four ranks
share those of one machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks._ranks import Sleeper, as_words, read_settings, slowest, span, total
from benchmarks._sides import Neighbours, median_ms, speedup, take_turns
from benchmarks.dispatch import NUM_CHOSEN, NUM_EXPERTS, route
from benchmarks.emulate import Lab, able
from launch.ranks import start_ranks
from parallel import process
from parallel.expert.build import build as build_dispatch
from parallel.expert.dispatch import Dispatch, LocalDispatch
from parallel.mesh import ParallelConfig
from parallel.pipeline import registry
from parallel.pipeline.links import Links, connect
from parallel.pipeline.record import Recorder
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.segments import Segments
from parallel.process import Groups
from parallel.watch import Watch
from train.assemble import assemble
from train.compose import compose
from train.data.prepare.one_source import prepare
from train.job import Job
from train.loop import accumulate, loss_terms
from train.model.loss import LossTerms
from train.model.moe import Journey
from train.model.parts import Parts
from train.model.tape import Steps, Tape
from train.model.transformer import Transformer
from train.precision.grads import Sink
from train.stage import Stage, WeightGradients
from train.track.gauges import StepTimer

PP, EP, LINK_WIDTH = 2, 2, 16
NOTHING = LossTerms(1.0, 0.0, 0.0)
SOURCE = Path(sysconfig.get_paths()["stdlib"]) / "email"  # a little text, for the real model
DTYPE = torch.bfloat16


class _Work(torch.autograd.Function):
    """The identity; forward and backward sleep `part_s` each, and leave weight gradients of two matrices that sleep as
    long together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleep: Callable[..., None], sink: Sink) -> Tensor:
        ctx.sleep, ctx.sink = sleep, sink
        sleep()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.sleep()
        for _ in range(2):
            ctx.sink(partial(ctx.sleep, 0.5))
        return dy, None, None


class SleepingModel:
    """What a `Stage` drives in place of a Transformer: MoE layers whose attention and experts sleep.

    Stages hand on [tokens, LINK_WIDTH], a narrow tensor: what is measured here is the all-to-all.
    """

    training, reads_tokens = True, False

    def __init__(self, parts: Parts, dispatch: Dispatch, routing: Tensor, hidden: int, sink: Sink) -> None:
        """routing: experts of each token, [T, K]. `part_s` is how long F, B and W of one half of a layer sleep."""
        self.parts, self._dispatch, self._routing, self._hidden = parts, dispatch, routing, hidden
        self._sink, self.sleeper, self.part_s = sink, Sleeper(), 0.0

    def _sleep(self, share: float = 1.0) -> None:
        self.sleeper.sleep(share * self.part_s)

    def steps(self, tokens: Any, x: Tensor | None, terms: LossTerms, tape: Tape) -> Steps[tuple[Tensor | None, None]]:
        if x is None:
            x = tape.compute(lambda: torch.zeros(len(self._routing), LINK_WIDTH, dtype=DTYPE))
        for _ in self.parts.layers:
            own, weights, residual = tape.compute(self._attend, x, node="attention")
            journey = Journey(self._dispatch, self._routing)
            rows, row_weights = yield from tape.communicate(journey.out, own, weights, node="dispatch")
            rows = tape.compute(self._experts, rows, row_weights, node="experts")
            (combined,) = yield from tape.communicate(journey.home, rows, node="combine")
            x = tape.compute(lambda residual, combined: residual + combined[:, :LINK_WIDTH], residual, combined)
        if not self.parts.head:
            return x, None
        loss = tape.compute(lambda x: x.float().mean(), x)
        tape.loss(loss, terms.main)
        return None, None

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = _Work.apply(x, self._sleep, self._sink)
        weights = x[:, :NUM_CHOSEN].float().sigmoid()
        return x.repeat(1, self._hidden // LINK_WIDTH), weights, x.clone()

    def _experts(self, rows: Tensor, row_weights: Tensor) -> Tensor:
        return _Work.apply(rows * row_weights.unsqueeze(1).to(rows.dtype), self._sleep, self._sink)


@dataclass(frozen=True)
class Side:
    """A list over the stages that carry it out."""

    schedule: Schedule
    runtime: Runtime
    stages: Mapping[int, Stage]
    shape: tuple[int, int]

    def step(self) -> None:
        for stage in self.stages.values():
            stage.begin(lambda _: torch.empty(0), NOTHING)
        self.runtime.run(self.schedule, self.shape)

    def set_compute(self, part_s: float) -> None:
        for stage in self.stages.values():
            cast(SleepingModel, stage.model).part_s = part_s


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        rate: of each machine's link, as `tc` writes it.
        ratios: computing over communicating, as many as there are rows.
        rounds: how often each side runs, in turns.
        schedules: whose steps are measured beside a pair.
        micro_batches: of a step.
        layers: of a stage.
        tokens: of a micro-batch.
        hidden: width of a token.
        dispatch: `flat` or `two_hop`.
        folder: where the tiny model's text and run lie; made and removed by the benchmark itself.
    """

    rate: str = "100mbit"
    ratios: str = "0.67,1"
    rounds: int = 3
    schedules: str = "dualpipev,dualpipe"
    micro_batches: int = 8
    layers: int = 2
    tokens: int = 256
    hidden: int = 1024
    dispatch: str = "two_hop"
    folder: str | None = None


@dataclass(frozen=True)
class Rig:
    """What all sides are made from."""

    groups: Groups
    settings: Settings

    def side(self, schedule: Schedule, dispatch: Dispatch, rank: int, channels: Any) -> Side:
        placement = schedule.placement
        routing = route(self.settings.tokens, EP, self.groups.mesh.rank)
        stages = {}
        for number in placement.stages_on(rank):
            at, sink = placement.position(number), WeightGradients()
            parts = Parts(at == 0, tuple(range(self.settings.layers)), at == placement.num_slices - 1, mtp=False)
            model = SleepingModel(parts, dispatch, routing, self.settings.hidden, sink)
            stages[number] = Stage(cast(Transformer, model), sink, Segments)
        links = Links(rank, channels, DTYPE, torch.device("cpu"))
        runtime = Runtime(rank, stages, links, Recorder(rank, Watch()))
        return Side(schedule, runtime, stages, (self.settings.tokens, LINK_WIDTH))

    def sides(self, schedule: Schedule, rank: int, channels: Any) -> dict[str, Side]:
        """With pairs, apart, and with pairs over an exchange that costs nothing."""
        dispatch = build_dispatch(NUM_EXPERTS, self.groups)
        return {
            "pairs": self.side(schedule, dispatch, rank, channels),
            "apart": self.side(schedule.apart(), dispatch, rank, channels),
            "free": self.side(schedule, LocalDispatch(NUM_EXPERTS), rank, channels),
        }


def exchange_s(rig: Rig, alone: Side) -> float:
    """Seconds that the all-to-alls of one micro-batch take in one stage, nothing else going on, all ranks at once."""
    alone.set_compute(0.0)
    return statistics.median(slowest(alone.step) for _ in range(7))


def compare(rig: Rig, what: str, sides: dict[str, Side], exchanged_s: float, ratio: float) -> None:
    """One row of the table. exchanged_s: the all-to-alls of a micro-batch in one stage, alone."""
    part_s = exchanged_s / ratio / (6 * rig.settings.layers)
    for side in sides.values():
        side.set_compute(part_s)
    seconds = take_turns({name: side.step for name, side in sides.items()}, rig.settings.rounds, clock=span)
    if rig.groups.mesh.rank:
        return
    pairs, apart, free = (statistics.median(seconds[name]) for name in ("pairs", "apart", "free"))
    list_ = sides["pairs"].schedule.ranks[0]
    num_chunks = sum(part.kind == "F" for action in list_ for part in action.parts)
    share = sum(action.kind == "pair" for action in list_) / num_chunks
    communicated = exchanged_s * num_chunks
    print(
        f"{what:12s}{ratio:6.2f}{exchanged_s * 1e3:9.0f}{share:8.0%}{apart:9.2f}{pairs:8.2f}{free:8.2f}   "
        f"{speedup(seconds, 'pairs', 'apart')!s:22s}{1 - (apart - free) / communicated:7.0%}"
        f"{1 - (pairs - free) / communicated:7.0%}{(apart - pairs) / communicated:10.0%}",
        flush=True,
    )


def with_sleeping_layers(rig: Rig) -> None:
    one = registry.build("1f1b", 1, rig.settings.micro_batches, pairs=True)
    alone = rig.side(registry.build("1f1b", 1, 1), build_dispatch(NUM_EXPERTS, rig.groups), 0, {})
    pair_sides = rig.sides(one, 0, {})
    step_sides = {}
    for name in rig.settings.schedules.split(","):
        schedule = registry.build(name, PP, rig.settings.micro_batches, pairs=True)
        links = connect(schedule.placement, rig.groups.mesh, rig.groups.device)
        step_sides[name] = rig.sides(schedule, rig.groups.mesh.pp_rank, links)
    if rig.groups.mesh.rank == 0:
        print(
            f"{'':12s}{'ratio':>6s}{'a2a ms':>9s}{'paired':>8s}{'apart s':>9s}{'pairs':>8s}{'free':>8s}   {'gain':22s}"
            f"{'hidden: apart, pairs, by pairs':>24s}"
        )
    for ratio in map(float, rig.settings.ratios.split(",")):
        compare(rig, "pair", pair_sides, exchange_s(rig, alone), ratio)
        for name, sides in step_sides.items():
            compare(rig, name, sides, exchange_s(rig, alone), ratio)
    models = [cast(SleepingModel, stage.model) for side in pair_sides.values() for stage in side.stages.values()]
    late_s = total(statistics.fmean(late for model in models for late in model.sleeper.late_s)) / (PP * EP)
    if rig.groups.mesh.rank == 0:
        by_stage_ms = late_s * 8e3 * rig.settings.layers
        print(f"sleeps end {late_s * 1e3:.2f} ms late: {by_stage_ms:.1f} ms per stage and micro-batch")
        print("paired: share of a rank's forwards that run beside a backward. free: an exchange that costs nothing")
        print("hidden: 1 - (step - free) / all-to-alls alone. by pairs: (apart - pairs) / all-to-alls alone")


def tiny(settings: Settings, dispatch: str) -> list[str]:
    """The settings of `python -m train` that the real model runs with."""
    return [
        *(f"parallel.pp={PP}", f"parallel.dp={EP}", f"parallel.ep={EP}", f"parallel.nodes={PP * EP}"),
        f"parallel.dispatch={dispatch}",
        *("pipeline.schedule=dualpipev", "train.micro_batch_size=1", "train.global_batch_size=16"),
        *("run.device=cpu", "run.num_threads=1", "track.wandb=disabled", "zero.engine=native", "checkpoint.interval=0"),
        *(f"data.source={SOURCE}", f"data.dir={settings.folder}/tokens", f"run.dir={settings.folder}/run"),
        "data.valid_fraction=0.2",
    ]


def train_step(job: Job, pairs: bool) -> None:
    """Forward, backward and update of the first step."""
    job.config = replace(job.config, pipeline=replace(job.config.pipeline, pairs=pairs))
    plan = job.recipe.at(0)
    accumulate(job, plan, loss_terms(job, plan), StepTimer())
    job.optimizer.step(plan.lr)
    job.optimizer.settle()


def with_the_tiny_model(settings: Settings) -> None:
    held, sides, sent = [], {}, {}
    for dispatch in ("two_hop", "flat"):
        config = compose(tiny(settings, dispatch))
        held.append(process.start(config.parallel, "cpu", config.mirrored, config.shared_ends))
        job = assemble(config, held[-1])
        train_step(job, True)
        sent[dispatch] = total(job.dispatch.take_internode_bytes())
        for pairs in (True, False):
            sides[f"{dispatch} pairs={str(pairs).lower()}"] = partial(train_step, job, pairs)
    seconds = take_turns(sides, settings.rounds, clock=span)
    if held[0].mesh.rank == 0:
        columns = f"{'ms':>8s}{'best':>8s}  {'against flat pairs=false':26s}{'pairs on against off':26s}"
        print(f"{'':22s}{columns}{'MB to nodes':>12s}")
        for name, taken in seconds.items():
            dispatch = name.split()[0]
            pairs = speedup(seconds, name, f"{dispatch} pairs=false") if name.endswith("true") else ""
            print(
                f"{name:22s}{median_ms(taken):8.0f}{min(taken) * 1e3:8.0f}  "
                f"{speedup(seconds, name, 'flat pairs=false')!s:26s}{pairs!s:26s}{sent[dispatch] / 1e6:12.1f}"
            )
    for groups in reversed(held):
        process.stop(groups)


def on_a_rank(part: str, settings: Settings) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if part == "model_rank":
        with_the_tiny_model(settings)
        return
    groups = process.start(ParallelConfig(pp=PP, dp=EP, ep=EP, nodes=PP * EP, dispatch=settings.dispatch))
    with_sleeping_layers(Rig(groups, settings))
    process.stop(groups)


def over_the_network(command: list[str], settings: Settings) -> bool:
    """Run a command on one rank per node and print what rank 0 prints; whether it went well."""
    with Lab(PP * EP, settings.rate) as lab:
        result = lab.run(command, timeout_s=3600)
    print(result.outputs[0].rstrip() if result.ok else "\n".join(result.outputs), flush=True)
    return result.ok


def over_loopback(command: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as logs:
        ended = start_ranks(command, PP * EP, Path(logs))
        if ended.code:
            print(ended.reason, *(log.read_text() for log in Path(logs).glob("*.log")), sep="\n")
        return not ended.code


def compare_on_the_tiny_model(settings: Settings) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, folder=folder)
        prepare(compose(tiny(settings, "flat")).data, say=lambda line: None)
        given = as_words(settings)
        command = [sys.executable, "-m", "benchmarks.overlap", "model_rank", *given]
        if reason := able():
            print(f"no emulated network: {reason}")
        else:
            print(f"tiny model, 4 nodes of one rank, links of {settings.rate}", flush=True)
            if not over_the_network(command, settings):
                return False
        print("tiny model, loopback", flush=True)
        return over_loopback(command)


def main(arguments: list[str]) -> int:
    part, settings = read_settings(Settings, arguments, "benchmarks.overlap")
    if part not in ("", "model"):
        on_a_rank(part, settings)
        return 0
    reason = able()
    if reason and not part:
        raise SystemExit(f"this machine cannot emulate a cluster: {reason}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # names of hosts do not resolve in a namespace; never mind
    given = as_words(settings)
    print("settings: " + " ".join(given), flush=True)
    with Neighbours() as neighbours:
        if part == "model":
            went_well = compare_on_the_tiny_model(settings)
        else:
            went_well = over_the_network([sys.executable, "-m", "benchmarks.overlap", "sleeping", *given], settings)
    print(f"({neighbours}; {settings.rounds} rounds in turns)", flush=True)
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
