"""`python -m launch plan search`: the best layouts of a run on so many devices.

All legal layouts are guessed, in less than a millisecond each (`guess.py`); those that promise most are planned as
`plan` does it, in as many processes as there are cores. What is said of a layout is its plan's: guesses choose what is
planned, and say which setting would free most memory.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from launch.plan.cluster import Cluster
from launch.plan.guess import Guess, Guesses
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.layers import Kept
from launch.plan.layout import Layout, relief, settings
from launch.plan.outcome import StepTime
from launch.plan.space import Space, is_legal
from launch.plan.world import MakeRouting
from train.config import RunConfig

# Layouts that are planned at once, sets of layers that are traced for them at most, and how often that is done.
NUM_PLANNED, NUM_TRACED, NUM_ROUNDS = 14, 4, 3
# What a guess of memory may be too high by: the plan then says whether it fits.
SLACK = 1.03
GB = 1e9


@dataclass(frozen=True)
class Planned:
    """A layout and what its plan says.

    Attributes:
        step_s: as written.
        parts_s: of a step, as a mean over the ranks of a pipeline; they add up to it.
        tokens_per_s_per_gpu, mfu_causal: of the full batch.
        num_bytes, rank: of the fullest pipeline rank, and which one that is.
    """

    config: RunConfig
    step_s: float
    parts_s: Mapping[str, float]
    tokens_per_s_per_gpu: float
    mfu_causal: float
    num_bytes: int
    rank: int


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        best: what fits, the quickest first.
        too_large: what does not fit: the quickest that would beat the best, or, where nothing fits, what lacks least.
        guesses: of all legal layouts.
    """

    best: list[Planned]
    too_large: list[Planned]
    guesses: Mapping[Layout, Guess] = field(repr=False)


def search(
    space: Space, figures: Cluster, make_routing: MakeRouting, num_best: int, num_processes: int | None = None
) -> Found:
    """Guesses every layout and plans those that promise most.

    make_routing: travels to other processes. num_processes: None for as many as there are cores.
    ValueError where no layout is legal.
    """
    layouts = list(space.layouts())
    if not layouts:
        raise ValueError(
            f"gpus={space.num_ranks} has no legal layout: pipelines, experts, nodes of {space.devices_per_node} and "
            f"batches of {space.base.train.global_batch_size} sequences do not divide into each other, with what the "
            "settings fix"
        )
    device_bytes = figures.memory.device_gb * GB
    with _at_once(num_processes or len(os.sched_getaffinity(0))) as at_once:
        traced = [Plan(config, figures, make_routing=make_routing) for config in _to_trace(layouts)]
        _say(f"{len(layouts):,} legal layouts; {len(traced)} sets of layers are traced to guess them")
        kept: Kept = {}
        for each in at_once(_trace, [(plan.config, figures, make_routing) for plan in traced]):
            kept.update(each)
        plans = [Plan(each.config, figures, make_routing=make_routing, kept=kept) for each in traced]
        guesses = _guessed(layouts, plans)
        order = sorted(layouts, key=lambda each: _promise(guesses[Layout.of(each)], device_bytes))
        found: list[Planned] = []
        for _ in range(NUM_ROUNDS):
            chosen, order = _chosen(order)
            _say(f"{sum(map(len, chosen))} of them are planned")
            for some in at_once(_plan, [(each, figures, make_routing, kept) for each in chosen]):
                found += some
            if not order or sum(each.num_bytes <= device_bytes for each in found) >= num_best:
                break
    return _ranked(found, guesses, device_bytes, num_best)


def _ranked(found: Sequence[Planned], guesses: Mapping[Layout, Guess], device_bytes: float, num_best: int) -> Found:
    by_time = sorted(found, key=lambda each: each.step_s)
    fits = [each for each in by_time if each.num_bytes <= device_bytes]
    large = [each for each in by_time if each.num_bytes > device_bytes]
    if fits:
        large = [each for each in large if each.step_s < fits[0].step_s]
    else:
        large.sort(key=lambda each: each.num_bytes)
    return Found(fits[:num_best], large[:3], guesses)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _at_once(num_processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` over processes."""
    if num_processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _one_thread) as pool:
        yield pool.map


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- guesses


def _to_trace(layouts: Sequence[RunConfig]) -> list[RunConfig]:
    """For each precision, and for recomputing little and much: the layout with the smallest micro-batch and the fewest
    experts on a rank, which is traced the soonest."""
    chosen: dict[tuple[str, bool], RunConfig] = {}
    for config in layouts:
        if not config.recompute.nodes or len(layouts) == 1:
            key = Guesses.key(config)
            if key not in chosen or _smallness(config) < _smallness(chosen[key]):
                chosen[key] = config
    for config in layouts:  # whose nodes are fixed by the settings
        chosen.setdefault(Guesses.key(config), config)
    return list(chosen.values())


def _smallness(config: RunConfig) -> tuple[int, int, bool]:
    return config.train.micro_batch_size, -config.parallel.ep, config.parallel.dispatch != "two_hop"


def _trace(task: tuple[RunConfig, Cluster, MakeRouting]) -> Kept:
    config, figures, make_routing = task
    kept: Kept = {}
    _ = Plan(config, figures, make_routing=make_routing, kept=kept).layers
    return kept


def _guessed(layouts: Sequence[RunConfig], traced: Sequence[Plan]) -> dict[Layout, Guess]:
    guesses = Guesses({Guesses.key(plan.config): plan for plan in traced})
    return {Layout.of(config): guesses.of(config) for config in layouts}


def _promise(guess: Guess, device_bytes: float) -> tuple[bool, float]:
    """What fits comes first, the quickest of it before the others; what does not by how much it lacks."""
    fits = guess.num_bytes <= device_bytes * SLACK
    return not fits, guess.step_s if fits else guess.num_bytes


# --- plans


def _chosen(order: Sequence[RunConfig]) -> tuple[list[list[RunConfig]], list[RunConfig]]:
    """The first legal layouts in groups that have the same layers, and what is left for later."""
    groups: dict[tuple[object, ...], list[RunConfig]] = {}
    rest: list[RunConfig] = []
    num = 0
    for config in order:
        key = Layout.of(config)[1:3] + Layout.of(config)[4:]
        if num == NUM_PLANNED or (key not in groups and len(groups) == NUM_TRACED):
            rest.append(config)
        elif is_legal(config):
            groups.setdefault(key, []).append(config)
            num += 1
    return list(groups.values()), rest


def _plan(task: tuple[Sequence[RunConfig], Cluster, MakeRouting, Kept]) -> list[Planned]:
    """Plans of layouts that have the same layers."""
    configs, figures, make_routing, kept = task
    plans = [Plan(config, figures, make_routing=make_routing, kept=kept) for config in configs]
    return [planned(plan) for plan in plans]


def planned(plan: Plan) -> Planned:
    """What a search keeps of a plan."""
    step = plan.step(AS_WRITTEN)
    totals = [rank.total for rank in plan.ranks]
    most = max(totals)
    tokens_per_s = plan.tokens_per_s_per_gpu(AS_WRITTEN)
    return Planned(
        plan.config, step.step_s, parts_s(step), tokens_per_s, plan.mfu(AS_WRITTEN), most, totals.index(most)
    )


def parts_s(step: StepTime) -> dict[str, float]:
    """Where a step goes, in the mean over the ranks of a pipeline."""
    totals = step.pipeline.totals
    mean = {
        "products": [each.busy_s["product"] for each in totals],
        "attention": [each.busy_s["attention"] for each in totals],
        "passes over memory": [each.busy_s["move"] for each in totals],
        "waiting for exchanges": [sum(each.exposed_s.values()) for each in totals],
        "waiting for the host": [each.host_s for each in totals],
    }
    found = {name: sum(each) / len(totals) for name, each in mean.items()}
    return found | {"bubble": step.parts_s["bubble"], "optimizer": step.parts_s["optimizer"]}


# --- words


def reason(loser: Planned, winner: Planned) -> str:
    """Why one layout is slower than another: what it spends more on, as far as that makes up the difference."""
    lost_s = loser.step_s - winner.step_s
    more = sorted(((loser.parts_s[name] - winner.parts_s[name], name) for name in winner.parts_s), reverse=True)
    said, explained_s = [], 0.0
    for seconds, name in more[:2]:
        if seconds > 0 and explained_s < 0.8 * lost_s:
            said.append(f"{name} {loser.parts_s[name]:.3g} s for {winner.parts_s[name]:.3g}")
            explained_s += seconds
    return ", ".join(said)


def table(found: Found, figures: Cluster) -> str:
    """The best layouts, a line each, with the reason why each loses to the one above it; then what does not fit."""
    device_gb = figures.memory.device_gb
    lines = ["recompute: n norm, u mla_up_proj, e experts_up_proj, and whole nodes"]
    if found.best:
        lines += [_HEADER, *_rows(found.best), "", "the first one's settings:"]
        lines += [" ".join(settings(found.best[0].config))]
    else:
        lines += [f"nothing fits in {device_gb:g} GB; what lacks least:", _HEADER, *_rows(found.too_large)]
    if found.best and found.too_large:
        lines += ["", "quicker, but too large:", *_rows(found.too_large)]
    lines += [lacks(each, found, figures) for each in found.too_large]
    return "\n".join(lines)


# Headings of the table's columns, and how wide they are in text: below 0 from the left.
COLUMNS = (
    *(("pp", 4), ("dp", 6), ("ep", 5), ("dispatch", -10), ("schedule", -18), ("batch", 5), ("recompute", -16)),
    *(("precision", -11), ("step, s", 8), ("tokens/s", 10), ("MFU", 7), ("GB", 7)),
)
# What is recomputed, in a few letters.
_LETTERS = {"norm": "n", "mla_up_proj": "u", "experts_up_proj": "e"}
_LETTERS |= {"attention": "attn", "experts": "exp", "dense": "dense"}


def cells(some: Sequence[Planned]) -> Iterator[list[str]]:
    """A line of the table for each: its columns, and why it is slower than the line above."""
    for place, each in enumerate(some):
        layout = Layout.of(each.config)
        why = ""
        if place and each.step_s > some[place - 1].step_s:
            why = f"{each.step_s / some[place - 1].step_s - 1:.1%}: {reason(each, some[place - 1])}"
        again = "+".join(_LETTERS[name] for name in layout.recompute.split("+") if name) or "none"
        places = [layout.pp, each.config.parallel.dp, layout.ep, layout.dispatch, layout.schedule]
        how = [layout.micro_batch_size, again, layout.precision]
        figures = [f"{each.step_s:.3f}", f"{each.tokens_per_s_per_gpu:,.0f}", f"{each.mfu_causal:.1%}"]
        yield [*map(str, [*places, *how]), *figures, f"{each.num_bytes / GB:.1f}", why]


def _line(row: Sequence[str]) -> str:
    """A row of the table as text."""
    *columns, why = row
    text = ""
    for cell, (_, width) in zip(columns, COLUMNS, strict=True):
        text += f" {cell:<{-width - 1}}" if width < 0 else f"{cell:>{width}}"
    return f"{text}  {why}".rstrip()


def _rows(some: Sequence[Planned]) -> Iterator[str]:
    return map(_line, cells(some))


_HEADER = _line([*(heading for heading, _ in COLUMNS), "slower than the line above by"])


def lacks(each: Planned, found: Found, figures: Cluster) -> str:
    """What a layout lacks that does not fit, and the one setting that frees most."""
    freed = relief(each.config, found.guesses.values())
    over = each.num_bytes / GB - figures.memory.device_gb
    key = f"{freed[0]} frees most, about {freed[1] / GB:.1f} GB" if freed else "no single setting frees any"
    return f"{_short(each)} lacks {over:.1f} GB on pipeline rank {each.rank}: {key}"


def _short(each: Planned) -> str:
    layout = Layout.of(each.config)
    return (
        f"pp {layout.pp}, ep {layout.ep}, {layout.schedule}, {layout.precision}, recompute {layout.recompute or 'none'}"
    )


def numbers(found: Found, figures: Cluster) -> dict[str, object]:
    """What a search has found, as one object for scripts."""

    def row(each: Planned) -> dict[str, object]:
        return {
            "settings": settings(each.config),
            "layout": Layout.of(each.config)._asdict() | {"dp": each.config.parallel.dp},
            "step_s": each.step_s,
            "parts_s": dict(each.parts_s),
            "tokens_per_s_per_gpu": each.tokens_per_s_per_gpu,
            "mfu_causal": each.mfu_causal,
            "peak_bytes": each.num_bytes,
            "lacks_bytes": max(0, int(each.num_bytes - figures.memory.device_gb * GB)),
        }

    best = [row(each) for each in found.best]
    for place in range(1, len(best)):
        best[place]["loses_by"] = reason(found.best[place], found.best[place - 1])
    large = []
    for each in found.too_large:
        freed = relief(each.config, found.guesses.values())
        large.append(row(each) | ({"frees_most": freed[0], "freed_bytes": int(freed[1])} if freed else {}))
    return {"num_layouts": len(found.guesses), "best": best, "too_large": large}
