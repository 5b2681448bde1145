"""`python -m launch timeline`: what each rank of a pipeline does when, as a picture, a trace and numbers.

    python -m launch timeline pipeline.schedule=dualpipe parallel.pp=8 pipeline.num_micro_batches=20 out=dualpipe.svg
    python -m launch timeline ... cost.f=1 cost.b=1.2 cost.w=0.8 cost.pair=2.5 cost.latency=0.05 json=true

Costs are of 1 / parallel.pp of the model; a pair costs f + b + w unless cost.pair says otherwise. Micro-batches are
those of one pipeline, over all its directions. A file that ends in .json is a trace for ui.perfetto.dev.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from parallel.pipeline.actions import Action, Pair
from parallel.pipeline.events import write_trace
from parallel.pipeline.registry import build
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Costs, Simulation, simulate
from parallel.pipeline.verify import verify
from train.picture_rows import Bar, Rows, Swatch, draw_rows, shades

NEEDED = ("pipeline.schedule", "parallel.pp", "pipeline.num_micro_batches")
COSTS = ("f", "b", "w", "pair", "latency", "early")
KEYS = (*NEEDED, "pipeline.pairs", "pipeline.stages_per_rank", *(f"cost.{name}" for name in COSTS), "out", "json")
SUFFIXES = (".svg", ".png", ".json")
# What each kind is called, and its colours from a rank's first stage (or direction) to its last.
KINDS = {
    "F": ("Forward", "#f6b64b", "#c76f14"),
    "D": ("Backward", "#8fcf8a", "#3b8146"),
    "B": ("Backward for input", "#8adad2", "#1f8a8c"),
    "W": ("Backward for weights", "#9dbdec", "#3a63ad"),
}


def timeline(settings: Sequence[str]) -> int:
    """Simulates the schedule that `key=value` settings name, prints its numbers, draws it. ValueError for bad ones."""
    given = _read(settings)
    schedule = build(
        given["pipeline.schedule"],
        _whole(given, "parallel.pp"),
        _whole(given, "pipeline.num_micro_batches"),
        pairs=_switch(given, "pipeline.pairs", None),
        stages_per_rank=_whole(given, "pipeline.stages_per_rank") if "pipeline.stages_per_rank" in given else None,
    )
    costs = Costs(**{name: _number(given, f"cost.{name}") for name in COSTS if f"cost.{name}" in given})
    as_json = _switch(given, "json", False)
    out = _out(given, as_json is True)
    verify(schedule)
    result = simulate(schedule, costs)
    if out is not None:
        draw(result, out)
    if as_json:
        print(json.dumps(numbers(result)))
    else:
        print(table(result))
        print(f"\n{'trace' if out and out.suffix == '.json' else 'picture'}: {out}")
    return 0


def numbers(result: Simulation) -> dict[str, float | list[float]]:
    """Step, and per rank bubble and peak activations, without the last digits' noise of added times."""
    return {
        "step": _plain(result.step),
        "bubble": [_plain(idle) for idle in result.bubble],
        "peak_activations": [_plain(peak) for peak in result.peak_activations],
    }


def table(result: Simulation) -> str:
    """The same as lines of text."""
    rows = [("rank", "step", "bubble", "of step", "peak activations")]
    for rank, (idle, peak) in enumerate(zip(result.bubble, result.peak_activations, strict=True)):
        rows.append((str(rank), f"{result.step:.6g}", _short(idle), f"{idle / result.step:.1%}", _short(peak)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw(result: Simulation, out: Path) -> None:
    """Writes the step as a picture (.svg, .png) or as a trace (.json)."""
    schedule = result.schedule
    if out.suffix == ".json":
        write_trace(result.events, out, _title(schedule))
        return
    palette = _palette(schedule)
    bars = [
        Bar(event.rank, event.start_s, event.stop_s, *_look(schedule, palette, event.action)) for event in result.events
    ]
    idle = sum(result.bubble) / (len(result.bubble) * result.step)
    rows = Rows(
        title=_title(schedule),
        note=f"one step takes {result.step:.6g}, of which ranks idle {idle:.1%}. {_shades_mean(schedule)}",
        unit="time, in the unit of the costs",
        names=[f"rank {rank}" for rank in range(schedule.placement.num_ranks)],
        columns=("bubble", "peak"),
        entries=[(_short(a), _short(b)) for a, b in zip(result.bubble, result.peak_activations, strict=True)],
    )
    draw_rows(rows, bars, _key(schedule, palette), out)


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


def _shades_mean(schedule: Schedule) -> str:
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


def _palette(schedule: Schedule) -> dict[str, list[str]]:
    count = schedule.placement.num_stages // schedule.placement.num_ranks
    return {kind: shades(light, dark, count) for kind, (_, light, dark) in KINDS.items()}


def _look(schedule: Schedule, palette: dict[str, list[str]], action: Action) -> tuple[tuple[str, ...], tuple[str, ...]]:
    chunks = (action.forward, action.backward) if isinstance(action, Pair) else (action,)
    colors = tuple(palette[chunk.kind][_shade(schedule, chunk.stage)] for chunk in chunks)
    return colors, tuple(str(chunk.micro_batch) for chunk in chunks)


def _key(schedule: Schedule, palette: dict[str, list[str]]) -> list[Swatch]:
    seen = {action.kind for actions in schedule.ranks for action in actions}
    key = [Swatch(title, [palette[kind]]) for kind, (title, _, _) in KINDS.items() if kind in seen]
    if "pair" in seen:
        key.append(Swatch("Forward and backward, overlapped", [palette["F"], palette["D"][::-1]]))
    return key


def _plain(value: float) -> float:
    return float(f"{value:.12g}")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _short(value: float) -> str:
    return f"{round(value, 9):.4g}"


def _read(settings: Sequence[str]) -> dict[str, str]:
    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
            raise ValueError(f"{key} is not a key of the timeline" + (f"; did you mean {near[0]}?" if near else ""))
        if not equals or not value:
            raise ValueError(f"{key} needs a value: {key}=...")
        given[key] = value
    for key in NEEDED:
        if key not in given:
            raise ValueError(f"timeline needs {key}=...")
    return given


def _whole(given: dict[str, str], key: str) -> int:
    try:
        return int(given[key])
    except ValueError:
        raise ValueError(f"{key}={given[key]} must be a whole number") from None


def _number(given: dict[str, str], key: str) -> float:
    try:
        return float(given[key])
    except ValueError:
        raise ValueError(f"{key}={given[key]} must be a number") from None


def _switch(given: dict[str, str], key: str, default: bool | None) -> bool | None:
    words = {"true": True, "false": False}
    text = given.get(key, "").lower()
    if text and text not in words:
        raise ValueError(f"{key}={given[key]} must be true or false")
    return words.get(text, default)


def _out(given: dict[str, str], as_json: bool) -> Path | None:
    if "out" not in given:
        return None if as_json else Path("timeline.svg")
    out = Path(given["out"])
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out={out} must end in {', '.join(SUFFIXES)}")
    return out
