"""`python -m launch timeline`: what each rank of a pipeline does when, as a picture, a trace and numbers.

    python -m launch timeline pipeline.schedule=dualpipe parallel.pp=8 pipeline.num_micro_batches=20 out=dualpipe.svg
    python -m launch timeline ... cost.f=1 cost.b=1.2 cost.w=0.8 cost.pair=2.5 cost.latency=0.05 json=true

Costs are of 1 / parallel.pp of the model; a pair costs f + b + w unless cost.pair says otherwise. Micro-batches are
those of one pipeline, over all its directions. A file that ends in .json is a trace for ui.perfetto.dev.

`events=FILE` names the trace of a real step, as a run with `profile.steps` writes it to traces/ in its folder. The file
says which schedule it was, and where no cost is given the costs are those that it shows:

    python -m launch timeline events=runs/tiny/traces/step-00000012.json                  # recorded under simulated
    python -m launch timeline events=... show=recorded column=1 out=step.png              # of the second pipeline
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.settings import TimelineSettings
from parallel.pipeline.actions import Action, Pair
from parallel.pipeline.events import Event, Timeline, read_trace, write_trace
from parallel.pipeline.measure import check_recorded, exposed_s, idle_s, measured_costs
from parallel.pipeline.registry import build
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Costs, Simulation, simulate
from parallel.pipeline.verify import verify
from train.files import refusing
from train.settings import read
from train.view.rows import Bar, Mark, RowChart, Swatch, draw_rows, shades

EXPOSED = "#c22f2f"
# What each kind is called, and its colours from a rank's first stage (or direction) to its last.
KINDS = {
    "F": ("Forward", "#f6b64b", "#c76f14"),
    "D": ("Backward", "#8fcf8a", "#3b8146"),
    "B": ("Backward for input", "#8adad2", "#1f8a8c"),
    "W": ("Backward for weights", "#9dbdec", "#3a63ad"),
}


def timeline(settings: Sequence[str]) -> int:
    """Simulates the schedule that `key=value` settings or a recorded step name, prints its numbers, draws it.

    ValueError for bad settings.
    """
    given = read(TimelineSettings, settings, "timeline")
    recorded = _recorded(given)
    step = recorded[1] if recorded else ()
    schedule = _schedule(given) if recorded is None or given.has_shape else recorded[0]
    prices = {name: cost for name, cost in asdict(given.cost).items() if cost is not None}
    costs = Costs(**prices)
    out = given.out or (None if given.json else Path("timeline.svg"))
    verify(schedule)
    if step:
        check_recorded(schedule, step)
        if not prices:
            costs = measured_costs(schedule, step)
    result = simulate(schedule, costs)
    if out is not None:
        draw(result, out, step, given.show or "both")
    if given.json:
        print(json.dumps(numbers(result, step)))
    else:
        print(table(result, step))
        print(f"\n{'trace' if out and out.suffix == '.json' else 'picture'}: {out}")
    return 0


def numbers(result: Simulation, recorded: Sequence[Event] = ()) -> dict[str, Any]:
    """Step, and per rank bubble and peak activations, without the last digits' noise of added times.

    With a recorded step also its length, idle times and waits for experts, under `recorded`.
    """
    found = {
        "step": _plain(result.step),
        "bubble": [_plain(idle) for idle in result.bubble],
        "peak_activations": [_plain(peak) for peak in result.peak_activations],
    }
    if not recorded:
        return found
    step, idle = idle_s(recorded, len(result.bubble))
    exposed = exposed_s(recorded, len(result.bubble))
    lists = {"bubble": [_plain(time) for time in idle], "exposed_comm": [_plain(time) for time in exposed]}
    return found | {"recorded": {"step": _plain(step), **lists}}


def table(result: Simulation, recorded: Sequence[Event] = ()) -> str:
    """A simulated pipeline's step, with the recorded one beside it if there is one, as lines of text."""
    rows = [["rank", "step", "bubble", "of step", "peak activations"]]
    for rank, (idle, peak) in enumerate(zip(result.bubble, result.peak_activations, strict=True)):
        rows.append([str(rank), _short(result.step), _short(idle), f"{idle / result.step:.1%}", _short(peak)])
    if recorded:
        step, idles = idle_s(recorded, len(result.bubble))
        rows[0] += ["recorded step", "bubble", "of step", "exposed comm", "of step"]
        for row, idle, exposed in zip(rows[1:], idles, exposed_s(recorded, len(idles)), strict=True):
            row += [_short(step), _short(idle), f"{idle / step:.1%}", _short(exposed), f"{exposed / step:.1%}"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(result: Simulation, out: Path, recorded: Sequence[Event] = (), show: str = "both") -> None:
    """Writes the step as a picture (.svg, .png) or as a trace (.json).

    show: "simulated", "recorded", or "both": the recorded step rank by rank under the simulated one (in a trace, as a
    process of its own). Without a recorded step it is the simulated one.
    """
    show = show if recorded else "simulated"
    steps: dict[str, Sequence[Event]] = {}
    if show != "recorded":
        steps["simulated"] = result.events
    if show != "simulated":
        first_s = min(event.start_s for event in recorded)
        steps["recorded"] = [event.moved(-first_s) for event in recorded]
    if out.suffix == ".json":
        with refusing(f"out={out}"):
            write_trace(Timeline(_title(result.schedule), result.schedule, steps), out)
    else:
        _draw_picture(result, steps, out)


def _draw_picture(result: Simulation, steps: dict[str, Sequence[Event]], out: Path) -> None:
    schedule, num_ranks = result.schedule, result.schedule.placement.num_ranks
    colors = palette(schedule)
    columns = {"simulated": ("bubble", "peak"), "recorded": ("bubble", "exposed")}
    headings = list(dict.fromkeys(name for kind in steps for name in columns[kind]))
    notes, lanes, bars = [], [], []
    for place, (kind, events) in enumerate(steps.items()):
        length, idles = idle_s(events, num_ranks)
        exposed = exposed_s(events, num_ranks)
        notes.append(f"the {kind} step takes {_short(length)}, of which ranks idle {_share(idles, length)}")
        if any(exposed):
            notes[-1] += f" and wait {_share(exposed, length)} for experts"
        for rank in range(num_ranks):
            known = {"bubble": idles[rank], "peak": result.peak_activations[rank], "exposed": exposed[rank]}
            entry = tuple(_short(known[name]) if name in columns[kind] else "" for name in headings)
            lanes.append((rank, place, kind if place else f"rank {rank}", entry))
        for event in events:
            marks = tuple(Mark(wait.start_s, wait.stop_s, EXPOSED) for wait in event.waits if wait.kind == "experts")
            looks = look(schedule, colors, event.action)
            bars.append(Bar(event.rank * len(steps) + place, event.start_s, event.stop_s, *looks, marks))
    lanes.sort()
    key = key_of(schedule, colors)
    if any(bar.marks for bar in bars):
        key.append(Swatch("Waits for experts", [[EXPOSED]]))
    note = f"{'; '.join(notes).capitalize()}. {shades_mean(schedule)}"
    unit = "time, s" if "recorded" in steps else "time, in the unit of the costs"
    names, entries = [name for _, _, name, _ in lanes], [entry for *_, entry in lanes]
    draw_rows(RowChart(_title(schedule), note, unit, names, headings, entries), bars, key, out)


def _share(times: Sequence[float], length: float) -> str:
    return f"{sum(times) / len(times) / length:.1%}"


def _title(schedule: Schedule) -> str:
    num = sum(schedule.num_micro_batches)
    placement = schedule.placement
    words = [_count(placement.num_ranks, "rank"), _count(num, "micro-batch", "micro-batches")]
    if placement.num_stages != placement.num_ranks:
        words.insert(1, f"{placement.num_stages} stages")
    return f"{schedule.name}: {', '.join(words)}"


def _shade(schedule: Schedule, stage: int) -> int:
    """Which of its colours a stage's work has: by direction, or else by the round of the ranks that it is in."""
    placement = schedule.placement
    if len(placement.routes) > 1:
        return placement.route_of(stage)
    return placement.stages_on(placement.rank_of[stage]).index(stage)


def shades_mean(schedule: Schedule) -> str:
    """What light and dark colours mean, as a sentence; nothing where there is one shade."""
    placement = schedule.placement
    if len(placement.routes) > 1:
        ends = [placement.rank_of[route[0]] for route in placement.routes]
        ranges = [schedule.micro_batches(route) for route in range(len(ends))]
        (a, b) = (f"micro-batches {r[0]} to {r[-1]} enter at rank {e}" for r, e in zip(ranges, ends, strict=True))
        return f"Light: {a}; dark: {b}."
    per_rank = placement.num_stages // placement.num_ranks
    if per_rank == 1:
        return ""
    return (
        "Light to dark: a rank's first to last stage."
        if per_rank > 2
        else "Light: a rank's first stage; dark: its second."
    )


def palette(schedule: Schedule) -> dict[str, list[str]]:
    """A colour for each kind of chunk and each stage or direction of a rank."""
    count = schedule.placement.num_stages // schedule.placement.num_ranks
    return {kind: shades(light, dark, count) for kind, (_, light, dark) in KINDS.items()}


def look(schedule: Schedule, colors: dict[str, list[str]], action: Action) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The colours of a bar, and the micro-batches that stand on it: one of each, of a pair two."""
    chunks = (action.forward, action.backward) if isinstance(action, Pair) else (action,)
    found = tuple(colors[chunk.kind][_shade(schedule, chunk.stage)] for chunk in chunks)
    return found, tuple(str(chunk.micro_batch) for chunk in chunks)


def key_of(schedule: Schedule, colors: dict[str, list[str]]) -> list[Swatch]:
    """What the colours of a schedule's bars mean."""
    seen = {action.kind for actions in schedule.ranks for action in actions}
    key = [Swatch(title, [colors[kind]]) for kind, (title, _, _) in KINDS.items() if kind in seen]
    if "pair" in seen:
        key.append(Swatch("Forward and backward, overlapped", [colors["F"], colors["D"][::-1]]))
    return key


def _plain(value: float) -> float:
    return float(f"{value:.12g}")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _short(value: float) -> str:
    return f"{round(value, 9):.4g}"


def _schedule(given: TimelineSettings) -> Schedule:
    asked, pp = given.pipeline, given.parallel.pp
    assert asked.schedule is not None and pp is not None and asked.num_micro_batches is not None
    return build(asked.schedule, pp, asked.num_micro_batches, asked.pairs, asked.stages_per_rank)


def _recorded(given: TimelineSettings) -> tuple[Schedule, Sequence[Event]] | None:
    """The pipeline of a recorded step that `column` names."""
    if given.events is None:
        return None
    file, column = read_trace(given.events), given.column or 0
    pipelines = list(file.pipelines.values())
    if not 0 <= column < len(pipelines):
        raise ValueError(f"column={column}: {given.events} has the columns 0 to {len(pipelines) - 1}")
    if not pipelines[column]:
        raise ValueError(f"column={column} of {given.events} is empty")
    return file.schedule, pipelines[column]
