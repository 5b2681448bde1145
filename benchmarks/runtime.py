"""What the pipeline's runtime costs on the host: a step through it against a plain loop over the same modules.

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python -m benchmarks.runtime [rounds=21 micro_batches=8 model=tiny ...]

Both sides are the tiny model in one process on one thread, with the same weights and tokens, gradients in `main_grad`.
"plain" is a loop over the micro-batches: forward as one autograd graph, then backward, weight gradients at once. "ours"
is what `python -m train` runs: the runtime carries out F and D of each micro-batch, the stage writes its forward as
steps on Segments, the backward walks them in reverse, weight gradients wait to be taken. "ours, pairs" runs each D with
the next F. "ours, N stages" cuts the model into N stages of this one process, which hand on through its links.

Processor seconds of the process, sides in turns. Two tables: one at the step's own size, where (ours - plain) also
holds what the order of the work does to caches; and one at `few_tokens` per sequence, one sequence, where next to
nothing is left but the host's own work, which does not depend on the number of tokens. Its cost per step, as a share of
the step at its own size, is the figure. `profile=ours` profiles a side instead, at few tokens.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks._ranks import as_words, read_settings
from benchmarks._sides import Neighbours, cpu, median_ms, take_turns
from parallel.expert.dispatch import LocalDispatch
from parallel.pipeline import registry
from parallel.pipeline.links import Links
from parallel.pipeline.one_f_one_b import interleaved_1f1b
from parallel.pipeline.placement import loop
from parallel.pipeline.record import Recorder
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.segments import Segments
from parallel.watch import Watch
from train.compose import compose
from train.config import RunConfig
from train.model.init import init_weights
from train.model.kernels import Kernels
from train.model.loss import LossTerms
from train.model.parts import Parts
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.grads import Sink, attach_main_grads, run_now
from train.precision.torch_engine import TorchEngine
from train.split import split
from train.stage import Stage, WeightGradients

Step = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Attributes:
        rounds: how often each side runs, in turns.
        model: a file of configs/model.
        seq_len: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        micro_batches: of a step.
        stages: of the side with several.
        few_tokens: tokens of a sequence where the runtime itself is what takes time.
        profile: a side that is profiled instead.
    """

    rounds: int = 21
    model: str = "tiny"
    seq_len: int = 256
    micro_batch_size: int = 2
    micro_batches: int = 8
    stages: int = 4
    few_tokens: int = 8
    profile: str | None = None


def build_model(config: RunConfig, sink: Sink, parts: Parts) -> Transformer:
    dispatch = LocalDispatch(config.model.n_routed_experts)
    with torch.device("meta"):
        model = Transformer(config.model, dispatch, everywhere(TorchEngine()), Kernels(), sink, parts)
    init_weights(model, config.train.seed, torch.float32, torch.device("cpu"))
    return model


class Comparison:
    """One step's tokens, and the ways to run it."""

    def __init__(self, config: RunConfig, num_micro_batches: int) -> None:
        self.config, self.num_micro_batches = config, num_micro_batches
        shape = (num_micro_batches, config.train.micro_batch_size, config.train.seq_len + 1)
        drawn = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(config.model.vocab_size, shape, generator=drawn)
        num_tokens = self.tokens[..., 1:].numel()
        self.terms = LossTerms(1 / num_tokens, 0.3 / num_tokens, 1e-4 / shape[0] / shape[1])

    def plain(self) -> tuple[Step, list[Transformer]]:
        model = build_model(self.config, run_now, Parts.all(self.config.model))
        attach_main_grads(model)

        def step() -> None:
            for tokens in self.tokens:
                model(tokens, self.terms).total.backward()

        return step, [model]

    def ours(self, schedule: Schedule) -> tuple[Step, list[Transformer]]:
        placement, stages = schedule.placement, {}
        slices = split(self.config.model, placement.slices_of_ranks, self.config.train.seq_len)
        for number in placement.stages_on(0):
            sink = WeightGradients()
            stages[number] = Stage(build_model(self.config, sink, slices[placement.position(number)]), sink, Segments)
        for stage in stages.values():
            attach_main_grads(stage.model)
        links = Links(0, {}, torch.float32, torch.device("cpu"))
        runtime = Runtime(0, stages, links, Recorder(0, Watch()))
        train, hidden = self.config.train, self.config.model.hidden_size

        def step() -> None:
            for stage in stages.values():
                stage.begin(lambda micro_batch: self.tokens[micro_batch], self.terms)
            runtime.run(schedule, (train.micro_batch_size, train.seq_len, hidden))

        return step, [stage.model for stage in stages.values()]


def gradients(models: list[Transformer]) -> dict[str, Tensor]:
    """What has been added to `main_grad`, by name; slices that both embed tokens add up."""
    found: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            found[name] = found.get(name, 0) + parameter.main_grad
    return found


def check_same(want: dict[str, Tensor], models: list[Transformer], side: str) -> None:
    """A side that computes another gradient is not worth timing."""
    for name, gradient in gradients(models).items():
        off = float((gradient - want[name]).norm() / want[name].norm().clamp(min=1e-12))
        if not off < 1e-4:  # fp32 sums in another order, one step
            raise SystemExit(f"{side} computes another gradient of {name}: {off:.1e} away")


def report(seconds: dict[str, list[float]], num_actions: dict[str, int], step_s: float) -> None:
    """A table; step_s: the plain step that costs are a share of."""
    plain = seconds["plain"]
    print(f"{'':18s}{'ms':>8s}{'actions':>9s}{'us per action':>15s}{'share of the step [quartiles]':>33s}")
    print(f"{'plain':18s}{median_ms(plain):8.1f}")
    for name, num in num_actions.items():
        costs = [ours - base for ours, base in zip(seconds[name], plain, strict=True)]
        low, middle, high = statistics.quantiles(costs, n=4, method="inclusive") if len(costs) > 1 else costs * 3
        print(
            f"{name:18s}{median_ms(seconds[name]):8.1f}{num:9d}{middle / num * 1e6:15.0f}"
            f"{middle / step_s:13.1%} [{low / step_s:.1%}..{high / step_s:.1%}]",
            flush=True,
        )


def sides_of(config: RunConfig, schedules: dict[str, Schedule]) -> dict[str, Step]:
    """Every side, having shown that it computes the same gradients."""
    comparison = Comparison(config, sum(schedules["ours"].num_micro_batches))
    plain, models = comparison.plain()
    plain()
    want, sides = gradients(models), {"plain": plain}
    for name, order in schedules.items():
        sides[name], models = comparison.ours(order)
        sides[name]()
        check_same(want, models, name)
    return sides


def main(arguments: list[str]) -> None:
    _, settings = read_settings(Settings, arguments, "benchmarks.runtime")
    torch.set_num_threads(1)
    print("settings: " + " ".join(as_words(settings)), flush=True)
    config = compose([f"model={settings.model}", f"train.seq_len={settings.seq_len}"])
    few = replace(config, train=replace(config.train, seq_len=settings.few_tokens, micro_batch_size=1))
    config = replace(config, train=replace(config.train, micro_batch_size=settings.micro_batch_size))
    num, num_stages = settings.micro_batches, settings.stages
    schedules = {
        "ours": registry.build("1f1b", 1, num),
        "ours, pairs": registry.build("1f1b", 1, num, pairs=True),
        f"ours, {num_stages} stages": interleaved_1f1b(loop(1, num_stages), num),
    }
    num_actions = {name: len(order.ranks[0]) for name, order in schedules.items()}
    if settings.profile:
        profile(sides_of(few, schedules)[settings.profile])
        return
    step_s = 0.0
    for size in (config, few):
        with Neighbours() as neighbours:
            seconds = take_turns(sides_of(size, schedules), settings.rounds, clock=cpu)
        step_s = step_s or statistics.median(seconds["plain"])
        print(f"{num} micro-batches of {size.train.micro_batch_size} x {size.train.seq_len} tokens")
        report(seconds, num_actions, step_s)
        print(f"({neighbours}; {settings.rounds} rounds in turns, cpu clock)")


def profile(step: Step) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as profiler:
        for _ in range(3):
            step()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(32)


if __name__ == "__main__":
    main(sys.argv[1:])
