"""Pipeline bubbles with sleeping stages: measured, beside the formula, the simulator and other frameworks' engines.

    python -m benchmarks.bubble [ranks=4,8 forward_ms=100 rounds=5 micro_batches=0 sides=... out=FILE.svg]

ranks          sizes of the pipeline, one table each; all ranks are processes of this machine.
forward_ms     how long a rank's share of the model sleeps for a forward (F), for a backward to its input (B) and for
               its weights (W) of one micro-batch. Long against a message, so that a schedule is measured and not cores.
micro_batches  of a step; 0 is twice the number of ranks.
sides          names from the table, all by default. `ours ...` is this repository's runtime, links and schedules.
out            a picture: measured against formula.

All times are in units of F. Bubble: length of the step, from the first rank's start to the last one's end, less the
3 F that every rank works for each micro-batch.

formula  the papers'. DeepSpeed's engine takes weight gradients inside its backward: its formula is the simulator's for
         DualPipeV with every B and W made one.
as run   the simulator's for what is really carried out. Ours hands on the input gradient of a full backward before it
         takes the weights', and in a pair of sleeping stages, where nothing communicates, runs the backward first.
         That is why it can lie below a formula, which has a full backward's results leave at its end.

Torch and DeepSpeed take no input gradient at the first stage as shipped; here their first stage's input asks for one,
so that every stage does equal work on all sides. (In torch's ZB-V it is still taken late, with the stage's weights.)
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._ranks import Sleeper, as_words, read_settings, span, total
from benchmarks._sides import Neighbours, take_turns
from launch.ranks import start_ranks
from parallel import process
from parallel.collectives import Steps
from parallel.mesh import ParallelConfig
from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.links import Links, connect
from parallel.pipeline.placement import loop, vee
from parallel.pipeline.record import Recorder
from parallel.pipeline.registry import NAMES, build
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import simulate
from parallel.process import Groups
from parallel.watch import Watch
from train.view.curves import COLORS, FAINT, INK, save

WIDTH = 64  # floats that stages hand on
OURS = tuple(f"ours {name}" for name in NAMES)
TORCHS = {"torch 1f1b": "Schedule1F1B", "torch interleaved_1f1b": "ScheduleInterleaved1F1B"} | {
    "torch zbv": "ScheduleZBVZeroBubble",
    "torch dualpipev": "ScheduleDualPipeV",
}
DEEPSPEED = "deepspeed dualpipev"
SIDES = (*OURS, *TORCHS, DEEPSPEED)
Step = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        ranks: sizes of the pipeline, one after the other.
        forward_ms: of a rank.
        rounds: how often each side runs, in turns.
        micro_batches: of a step; None: twice the ranks.
        sides: which are compared.
        out: a picture of the bars.
    """

    ranks: str = "4,8"
    forward_ms: float = 100.0
    rounds: int = 5
    micro_batches: int | None = None
    sides: str = ",".join(SIDES)
    out: Path | None = None

    def check(self) -> None:
        """ValueError for an unknown side."""
        for name in self.sides.split(","):
            if name not in SIDES:
                raise ValueError(f"sides={name} is not one of {', '.join(SIDES)}")


@dataclass(frozen=True)
class Rig:
    """What every side is made from."""

    groups: Groups
    num_micro_batches: int
    forward_s: float
    sleeper: Sleeper

    @property
    def num_ranks(self) -> int:
        return self.groups.mesh.config.pp

    @property
    def rank(self) -> int:
        return self.groups.mesh.pp_rank

    def schedule(self, side: str) -> Schedule:
        """The list that a side carries out. DeepSpeed never takes a W apart."""
        schedule = build(side.split()[1], self.num_ranks, self.num_micro_batches)
        if side != DEEPSPEED:
            return schedule
        whole = [
            [replace(action, kind="D") if action.kind == "B" else action for action in actions if action.kind != "W"]
            for actions in schedule.ranks
        ]
        return replace(schedule, ranks=tuple(map(tuple, whole)))


def as_run(schedule: Schedule) -> Schedule:
    """Our runtime's order as a list of its own: in a full backward B's result leaves before W starts."""

    def parts(action: Action) -> tuple[Chunk, ...]:
        return (*action.backward.parts, action.forward) if isinstance(action, Pair) else action.parts

    return replace(
        schedule, ranks=tuple(tuple(part for a in actions for part in parts(a)) for actions in schedule.ranks)
    )


def formula(name: str, num_ranks: int) -> float:
    """A published schedule's bubble in units of F, where F = B = W (sources: the generators in parallel/pipeline)."""
    p = num_ranks
    bubbles = {"1f1b": 3.0 * (p - 1), "interleaved_1f1b": 1.5 * (p - 1), "zb_h1": p - 1.0, "zbv": (p - 1) / 2}
    return (bubbles | {"dualpipe": p - 2.0, "dualpipev": p - 1.0})[name]


class SleepingStage:
    """A stage that the runtime drives and that sleeps."""

    def __init__(self, sleeper: Sleeper, part_s: float) -> None:
        self._sleeper, self._part_s = sleeper, part_s
        self._waiting: set[int] = set()

    def forward(self, micro_batch: int, x: Tensor | None) -> Steps[Tensor]:
        yield from ()
        self._sleeper.sleep(self._part_s)
        return torch.zeros(WIDTH) if x is None else x + 1

    def backward(self, micro_batch: int, dy: Tensor | None) -> Steps[Tensor]:
        yield from ()
        self._sleeper.sleep(self._part_s)
        self._waiting.add(micro_batch)
        return torch.zeros(WIDTH) if dy is None else dy + 1

    def weight_gradients(self, micro_batch: int, share: float = 1.0) -> int:
        if micro_batch in self._waiting:
            self._waiting.remove(micro_batch)
            self._sleeper.sleep(self._part_s)
        return 0


def ours(rig: Rig, side: str, channels: Any) -> Step:
    schedule = rig.schedule(side)
    placement = schedule.placement
    part_s = rig.forward_s * placement.stage_size
    stages = {number: SleepingStage(rig.sleeper, part_s) for number in placement.stages_on(rig.rank)}
    links = Links(rig.rank, channels, torch.float32, torch.device("cpu"))
    runtime = Runtime(rig.rank, stages, links, Recorder(rig.rank, Watch()))
    return lambda: runtime.run(schedule, (WIDTH,))


class _Through(torch.autograd.Function):
    """The identity; its forward and its backward sleep so many seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleeper: Sleeper, forward_s: float, backward_s: float) -> Tensor:
        ctx.sleeper, ctx.backward_s = sleeper, backward_s
        sleeper.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.sleeper.sleep(ctx.backward_s)
        return dy.clone(), None, None, None


class SleepingModule(nn.Module):
    """A sleeping stage for engines that split autograd's graph: one path to the input sleeps B, one to a weight W."""

    def __init__(self, sleeper: Sleeper, part_s: float) -> None:
        super().__init__()
        self.sleeper, self.part_s = sleeper, part_s
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # tokens: equal work at every stage
        through = _Through.apply(x, self.sleeper, self.part_s, self.part_s)
        return through + _Through.apply(self.weight, self.sleeper, 0.0, self.part_s)


def squares(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).pow(2).mean()


def torchs(rig: Rig, side: str) -> Step:
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining.stage import PipelineStage

    placement = rig.schedule(side).placement
    part_s = rig.forward_s * placement.stage_size
    own = sorted(placement.stages_on(rig.rank))
    stages = [
        PipelineStage(SleepingModule(rig.sleeper, part_s), number, placement.num_stages, torch.device("cpu"))
        for number in own
    ]
    kind = getattr(schedules, TORCHS[side])
    held: Any = stages[0] if len(stages) == 1 and placement.stage_size == 1 else stages
    schedule = kind(held, n_microbatches=rig.num_micro_batches, loss_fn=squares)
    x = torch.zeros(rig.num_micro_batches, WIDTH)
    arguments = (x,) if 0 in own else ()
    target = {"target": x} if placement.num_stages - 1 in own else {}
    return lambda: schedule.step(*arguments, **target)


def deepspeeds(rig: Rig) -> Step:
    import deepspeed
    from deepspeed.pipe import DualPipeVModule

    deepspeed.init_distributed("gloo", verbose=False)
    parts = [SleepingModule(rig.sleeper, rig.forward_s / 2) for _ in range(2 * rig.num_ranks)]
    # Stages of equally many layers, whatever their parameters.
    model = DualPipeVModule(parts, num_stages=rig.num_ranks, loss_fn=squares, partition_method="uniform")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rig.num_micro_batches,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    rows: Iterator[tuple[Tensor, Tensor]] = repeat((torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)))
    return lambda: engine.train_batch(rows)


def make(rig: Rig, names: list[str]) -> dict[str, Step]:
    """The sides that this machine has; one line for each that it lacks."""
    placements = loop(rig.num_ranks, 2), vee(rig.num_ranks)  # between them every link of every schedule
    mesh, device = rig.groups.mesh, rig.groups.device
    channels = {channel: group for place in placements for channel, group in connect(place, mesh, device).items()}
    sides: dict[str, Step] = {}
    for name in names:
        try:
            if name in OURS:
                sides[name] = ours(rig, name, channels)
            elif name in TORCHS:
                sides[name] = torchs(rig, name)
            else:
                with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
                    sides[name] = deepspeeds(rig)
        except ImportError as error:
            if rig.rank == 0:
                print(f"{name}: not installed ({error})", flush=True)
    return sides


def report(rig: Rig, seconds: dict[str, list[float]], late_s: float) -> list[dict[str, Any]]:
    """Print the table of one size; its rows."""
    work = 3 * rig.num_micro_batches
    bubbles = {name: [taken / rig.forward_s - work for taken in rounds] for name, rounds in seconds.items()}
    print(f"{rig.num_ranks} ranks, {rig.num_micro_batches} micro-batches, work {work} F; bubbles in units of F")
    head = f"{'':24s}{'formula':>8s}{'as run':>11s}{'measured':>10s}{'best':>7s}{'spread':>8s}"
    print(f"{head}{'above formula':>15s}{'above torch':>13s}")
    rows = []
    for name, measured in bubbles.items():
        schedule = rig.schedule(name)
        run = max(simulate(as_run(schedule) if name in OURS else schedule).bubble)
        due = run if name == DEEPSPEED else formula(name.split()[1], rig.num_ranks)
        middle, spread = statistics.median(measured), max(measured) - min(measured)
        theirs = bubbles.get(f"torch {name.split()[1]}") if name in OURS else None
        above = statistics.median(a - b for a, b in zip(measured, theirs, strict=True)) if theirs else None
        print(
            f"{name:24s}{due:8.1f}{run:11.1f}{middle:10.2f}{min(measured):7.2f}{spread:8.2f}{middle - due:15.2f}"
            f"{'' if above is None else format(above, '13.2f')}"
        )
        rows.append({"ranks": rig.num_ranks, "name": name, "due": due, "measured": middle})
    per_step = late_s * 6 * rig.num_micro_batches / rig.forward_s
    print(
        f"sleeps end {late_s * 1e3:.2f} ms late on average: {per_step / 2:.2f} F in a step of one stage per rank, "
        f"{per_step:.2f} F with two",
        flush=True,
    )
    return rows


def on_a_rank(settings: Settings) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    num_ranks = int(os.environ["WORLD_SIZE"])
    groups = process.start(ParallelConfig(pp=num_ranks, dispatch="local"))
    num_micro_batches = settings.micro_batches or 2 * num_ranks
    rig = Rig(groups, num_micro_batches, settings.forward_ms / 1e3, Sleeper())
    sides = make(rig, settings.sides.split(","))
    seconds = take_turns(sides, settings.rounds, clock=span)
    late_s = total(rig.sleeper.mean_late_s()) / num_ranks
    if groups.mesh.rank == 0:
        rows = report(rig, seconds, late_s)
        if settings.out:
            draw(rows, settings.out.with_suffix(f".{num_ranks}.svg"))
    process.stop(groups)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Bars of what was measured, from the formula's mark on; one line per side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.9 + 0.32 * len(rows)), dpi=160, layout="constrained")
    figure.set_facecolor("white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, row in enumerate(rows):
        whose = 0 if row["name"] in OURS else 1 if row["name"] in TORCHS else 2
        axes.barh(index, row["measured"], height=0.62, color=COLORS[whose])
        axes.plot([row["due"]] * 2, [index - 0.42, index + 0.42], color=INK, linewidth=1.6)
        axes.annotate(
            f"{row['measured']:.1f}", (max(row["measured"], row["due"]), index), (5, 0), va="center", fontsize=8.5,
            textcoords="offset points", color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.set_xlabel("bubble in forwards of a rank; the line is the formula", fontsize=9, color=INK)
    axes.set_title(f"Bubble over {rows[0]['ranks']} ranks", loc="left", fontsize=10.5, fontweight="bold", color=INK)
    save(figure, out)


def main(arguments: list[str]) -> int:
    part, settings = read_settings(Settings, arguments, "benchmarks.bubble")
    if part:
        on_a_rank(settings)
        return 0
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = as_words(settings)
    print("settings: " + " ".join(given), flush=True)
    for num_ranks in map(int, settings.ranks.split(",")):
        with tempfile.TemporaryDirectory() as logs, Neighbours() as neighbours:
            command = [sys.executable, "-m", "benchmarks.bubble", "rank", *given]
            ended = start_ranks(command, num_ranks, Path(logs))
            if ended.code:
                print(ended.reason, *(log.read_text() for log in Path(logs).glob("*.log")), sep="\n")
                return ended.code
        print(f"({neighbours}; {settings.rounds} rounds in turns)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
