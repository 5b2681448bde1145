"""The report: one or several runs as one HTML page, which needs no network and is whole without its script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from train.files import replacing
from train.track.planned import sentence
from train.view.curves import column, short_tokens
from train.view.report import heatmap
from train.view.report.chart import draw, ticks
from train.view.report.document import document, escaped, facts, folded, table
from train.view.report.panels import charts, short_bytes, tokens_of
from train.view.report.runs import Run

# Differ between any two runs, and say nothing about their numbers.
_PLACES = ("run.name", "run.dir", "track.name", "track.group", "checkpoint.dir")


def write_report(runs: Sequence[Run], out: Path, entropy: float | None = None) -> None:
    """Writes the page `out`, aside and then in place. `entropy`: of the validation text's unigrams, in nats."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, durable=False) as aside:
        aside.write_text(page(_told_apart(runs), entropy), encoding="utf-8")


def page(runs: Sequence[Run], entropy: float | None = None) -> str:
    """The whole page. Well-formed XML as well as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    x_end = max((float(tokens_of(run)[-1]) for run in runs if run.steps), default=1.0)
    made = [replace(chart, has_key=len(runs) == 1) for chart in charts(runs, entropy)]
    panels = "".join(draw(chart, short_tokens, x_end) for chart in made)
    body = [f"<h1>{escaped(title)}</h1>"]
    body += [_facts(runs[0])] if len(runs) == 1 else [_toggles(runs), _table_of_runs(runs), _differences(runs)]
    body.append('<h2>Over tokens</h2><div class="panels">' + panels + "</div>")
    body += [_ancestry(run) for run in runs]
    body += [_samples(run, number, len(runs) > 1) for number, run in enumerate(runs)]
    body += [_heatmaps(run, number, len(runs) > 1) for number, run in enumerate(runs)]
    body += [_events(run) for run in runs]
    body += [_checkpoints(run) for run in runs]
    body += [_settings(run) for run in runs]
    toggles = "".join(f"body:has(#run{n}:not(:checked)) .run{n}{{display:none}}" for n in range(len(runs)))
    return document(title, "".join(body), toggles)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name by their folders."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _last(run: Run, name: str) -> float:
    values = column(run.steps, name)
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan


def _best(run: Run) -> float:
    values = column(run.steps, "valid/loss")
    return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan


def _median(run: Run, name: str) -> float:
    values = column(run.steps, name)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _numbers(run: Run) -> list[tuple[str, str]]:
    """What a reader wants first."""
    seconds = float(np.nansum(column(run.steps, "perf/step_s")))
    made = [
        ("steps", str(int(run.steps[-1]["step"])) if run.steps else "0"),
        ("tokens", short_tokens(_last(run, "train/consumed_tokens")) if run.steps else "0"),
        ("training loss", f"{_last(run, 'train/loss'):.4f}"),
        ("validation loss", f"{_last(run, 'valid/loss'):.4f}"),
        ("best validation", f"{_best(run):.4f}"),
        ("tokens per second", short_tokens(_median(run, "perf/tokens_per_s"))),
        ("time in steps", f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.0f} s"),
        ("peak memory", short_bytes(_last(run, "memory/peak_bytes"))),
        ("MaxVio", f"{_last(run, 'moe/max_vio'):.2f}"),
    ]
    return [(name, value if "nan" not in value else "-") for name, value in made]


def _facts(run: Run) -> str:
    kind = ' class="bad"' if run.trouble else ""
    known = [(name, value) for name, value in _numbers(run) if value != "-"]
    resumed = f"; resumed after step {', '.join(map(str, run.resumed))}" if run.resumed else ""
    begun = f"; branched off {run.branches[-1].run} after step {run.branches[-1].step}" if run.branches else ""
    said = escaped(run.standing + begun + resumed)
    plan = f"<br/>{escaped(planned)}" if (planned := sentence(run.since_resumed)) else ""
    return f'<p class="note"><span{kind}>{said}</span>{plan}</p>{facts(known)}'


def _toggles(runs: Sequence[Run]) -> str:
    boxes = "".join(
        f'<label class="c{number % 8}"><input type="checkbox" id="run{number}" checked="checked"/> <i></i>'
        f"{escaped(run.name)}</label>"
        for number, run in enumerate(runs)
    )
    return f'<div class="runs">{boxes}</div>'


def _table_of_runs(runs: Sequence[Run]) -> str:
    header = ["run", *(name for name, _ in _numbers(runs[0])), "how it stands"]
    return table(header, [[run.name, *(value for _, value in _numbers(run)), run.standing] for run in runs])


def _differences(runs: Sequence[Run]) -> str:
    """The settings in which the runs differ, one column per run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in _PLACES)
    rows = []
    for key in keys:
        values = [_as_text(run.settings.get(key, "")) for run in runs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return '<h2>Settings that differ</h2><p class="none">none</p>'
    return "<h2>Settings that differ</h2>" + table(["setting", *(run.name for run in runs)], rows)


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _ancestry(run: Run) -> str:
    """The runs that a branch goes on from, and what was changed at each border; nothing for a run that is none."""
    if not run.branches:
        return ""
    rows = []
    for branch in run.branches:
        where = [f"{branch.run}, after step {branch.step}", short_tokens(branch.tokens)]
        for key, was, now in branch.changes or [("nothing", "", "")]:
            rows.append([*where, key, _as_text(was), _as_text(now)])
            where = ["", ""]
    header = ["branches off", "tokens", "setting", "was", "is"]
    return f"<h2>Ancestry of {escaped(run.name)}</h2>" + table(header, rows)


def _heatmaps(run: Run, number: int, is_one_of_many: bool) -> str:
    """Per layer, the load of every expert over time; nothing for a run without."""
    if not run.loads or not run.loads[0].loads:
        return ""
    x_end = float(run.loads[-1].tokens)
    maps = []
    for layer in range(len(run.loads[0].loads)):
        _, shares = heatmap.relative(run.loads, layer)
        vio = float(shares.max(axis=0)[-1]) - 1
        places = "".join(
            f'<span class="x" style="left:{at / x_end:.2%}">{short_tokens(at)}</span>' for at in ticks(0, x_end, 3)
        )
        name = _layer_name(run, layer)
        maps.append(
            f'<section class="panel"><h3>{name} <small>{len(shares)} experts, MaxVio at the end {vio:.2f}</small></h3>'
            f'<div class="box"><img src="{heatmap.picture(shares)}" alt="expert loads of {name}"/>'
            f'<span class="y" style="top:4%">0</span><span class="y" style="top:96%">{len(shares) - 1}</span>'
            f"{places}</div></section>"
        )
    colors = ",".join(f"rgb({r},{g},{b})" for r, g, b in heatmap.palette()[:-1:22])
    ramp = (
        '<div class="ramp">1/4 of the mean or less <span class="scale" style="background:linear-gradient(90deg,'
        f'{colors})"></span> 4 times the mean or more <span class="swatch"></span> no token</div>'
    )
    head = f"Expert load per layer{': ' + escaped(run.name) if is_one_of_many else ''}"
    what = "rows are experts, columns steps over tokens"
    text = f'{ramp}<div class="maps">{"".join(maps)}</div>'
    if is_one_of_many:
        return f'<div class="run{number}"><details><summary>{head}</summary>{text}</details></div>'
    return f"<h2>{head} <small>{what}</small></h2>{text}"


def _layer_name(run: Run, router: int) -> str:
    """Routers stand in the order of their layers; those past the main model belong to MTP."""
    layer, layers = run.first_dense + router, run.settings.get("model.num_hidden_layers")
    if layers is not None and layer >= layers:
        return f"MTP depth {layer - layers + 1}"
    return f"layer {layer}"


def _samples(run: Run, number: int, is_one_of_many: bool) -> str:
    """What the model made of each prompt, the newest text first; nothing for a run without."""
    if not run.samples:
        return ""
    last, *earlier = reversed(run.samples)
    head = f"Samples after step {last.step}{': ' + escaped(run.name) if is_one_of_many else ''}"
    text = table(["prompt", "goes on"], [[each.prompt, each.text] for each in last.samples], kind="samples")
    rows = [[str(at.step), each.prompt, each.text] for at in earlier for each in at.samples]
    before = folded("Earlier samples", ["step", "prompt", "goes on"], rows, kind="samples") if rows else ""
    if is_one_of_many:
        return f'<div class="run{number}"><details><summary>{head}</summary>{text}{before}</details></div>'
    return f"<h2>{head}</h2>{text}{before}"


def _events(run: Run) -> str:
    """What happened to the run as a job, in order; nothing for a run without."""
    rows = [[event.time[:19].replace("T", " "), str(event.step), event.kind, event.sentence] for event in run.events]
    return folded(f"Events of {run.name}", ["UTC", "step", "event", "what happened"], rows) if rows else ""


def _checkpoints(run: Run) -> str:
    rows = [[name, short_bytes(size)] for name, size in run.checkpoints]
    if not rows:
        return ""
    return folded(f"Checkpoints of {run.name}", ["folder", "size"], rows)


def _settings(run: Run) -> str:
    rows = [[key, _as_text(value)] for key, value in run.settings.items()]
    if not rows:
        return ""
    return folded(f"All settings of {run.name}", ["setting", "value"], rows)
