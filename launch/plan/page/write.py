"""A plan in files: one HTML page, which needs no network, with its figures as JSON beside it; or a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.plan import answer
from launch.plan.answer import WORDS
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN, KERNELS
from launch.plan.page.memory import memory_section
from launch.plan.page.picture import draw_plan
from launch.plan.page.time import action_of, differences_section, inside, node_rows, step_rows, time_section
from launch.plan.page.timeline import timeline_section
from launch.plan.page.traffic import traffic_section
from launch.plan.page.words import duration
from train import compose
from train.files import check_takes_files, refusing, replacing
from train.flops import parameter_counts
from train.track.console import short
from train.view.report.bars import draw_bars
from train.view.report.document import document, escaped, facts, table

# What a folder gets.
NAMES = ("plan.html", "plan.json")
PICTURES = (".svg", ".png")


def files_of(out: Path, names: tuple[str, str] = NAMES) -> tuple[Path, ...]:
    """What is written for `out`: a picture alone; the page and the figures; or both of these into a folder, by `names`
    there."""
    if out.suffix in PICTURES:
        return (out,)
    return (out, out.with_suffix(".json")) if out.suffix == ".html" else tuple(out / name for name in names)


def check_can_write(out: Path, names: tuple[str, str] = NAMES) -> None:
    """ValueError, in a sentence, unless all files can be written. Leaves nothing behind."""
    files = files_of(out, names)
    with refusing(f"out={out}"):
        check_takes_files(files[0].parent)
    for path in files:
        if path.is_dir():
            raise ValueError(f"out={out} cannot be written: {path} is a folder")


def write(plan: Plan, figures: Mapping[str, Any], out: Path) -> Path:
    """Writes page and figures, or a picture, each aside and then in place; the path of the first.

    figures: `answer.numbers` of the plan. ValueError where they cannot be written.
    """
    if out.suffix in PICTURES:
        with refusing(f"out={out}"):
            draw_plan(f"{_title(plan)}: {answer.verdict(plan)}", action_of(plan), figures, out)
        return out
    return write_files(out, NAMES, page_of(plan, figures), json.dumps(figures, indent=1) + "\n")


def write_files(out: Path, names: tuple[str, str], page: str, figures: str) -> Path:
    """A page and its figures, each aside and then in place; the path of the page. ValueError as `write`."""
    first, second = files_of(out, names)
    with refusing(f"out={out}"):
        first.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((second, figures), (first, page)):
            with replacing(path, durable=False) as aside:
                aside.write_text(text, encoding="utf-8")
    return first


def page_of(plan: Plan, figures: Mapping[str, Any]) -> str:
    """The whole page. What does not apply to the plan, such as a timeline without a pipeline, is not on it."""
    sections = [
        _heading(plan, figures),
        differences_section(plan, figures),
        memory_section(plan, figures),
        timeline_section(plan),
        time_section(plan, figures),
        traffic_section(figures),
        f"<details><summary>All settings of the run</summary><pre>{escaped(compose.text(plan.config))}</pre></details>",
    ]
    return document(f"Plan: {_title(plan)}", "".join(sections))


def _title(plan: Plan) -> str:
    counts = parameter_counts(plan.config.model)
    active = f", {short(counts.activated)} active," if plan.config.model.n_routed_experts else ""
    num_ranks = plan.config.parallel.world_size
    return f"{short(counts.total)} parameters{active} on {num_ranks:,} device{'s' if num_ranks > 1 else ''}"


def _heading(plan: Plan, figures: Mapping[str, Any]) -> str:
    written = figures[AS_WRITTEN]
    fullest = max(written["peak_bytes"])
    kind = "" if figures["fits"] else ' class="bad"'
    what = "<br/>".join(map(escaped, answer.heading(plan)))
    columns = {kernels: figures[kernels] for kernels in KERNELS}
    rows = [[name, *(row[kernels] for kernels in KERNELS)] for name, row in answer.time_rows(columns)]
    sets = table(["", *WORDS.values()], rows, kind="figures")
    return (
        f"<h1>{escaped(_title(plan))}: <span{kind}>{answer.verdict(plan)}</span></h1>"
        f'<p class="note">{what}</p>'
        + facts(
            [
                ("fullest rank", f"{fullest / answer.GB:.1f} of {plan.cluster.memory.device_gb:.1f} GB"),
                ("step, as written", duration(written["step_s"])),
                ("tokens/s per device", f"{written['tokens_per_s_per_gpu']:,.0f}"),
                ("MFU, causal", f"{written['mfu_causal']:.1%}"),
                ("device hours of the run", short(written["gpu_hours"])),
            ]
        )
        + "".join(f"<p>{escaped(sentence)}</p>" for sentence in figures["advice"])
        + "<h2>Three sets of kernels <small>the same trace, machine and schedule with the kernels that our code calls, "
        "with DeepSeek's, and with all that the hardware allows</small></h2>"
        f'<div class="panels"><section class="panel free">{sets}</section>{_bars(plan, figures)}</div>'
    )


def _bars(plan: Plan, figures: Mapping[str, Any]) -> str:
    return (
        '<section class="panel free"><h3>The step by its parts <small>mean over ranks; 1F1B is forward and backward '
        f"overlapped</small></h3>{draw_bars(step_rows(figures), ['step'])}"
        f"<h3>By node <small>{inside(plan)}</small></h3>{draw_bars(node_rows(figures), ['together'])}</section>"
    )
