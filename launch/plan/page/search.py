"""What a search has found, as a page: every legal layout by its memory and its speed, and the best in a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.plan.cluster import Cluster
from launch.plan.layout import settings
from launch.plan.page.write import check_can_write, write_files
from launch.plan.search import COLUMNS, GB, Found, Planned, cells, lacks
from train.flops import parameter_counts
from train.track.console import short
from train.view.report.chart import Chart, Curve, Mark, draw
from train.view.report.document import document, escaped, table

# What a folder gets.
PAGE, FIGURES = "search.html", "search.json"
# What needs more than so many devices' memory is not on the picture, whose other points would lie in a corner.
MOST_DEVICES = 2.0
# The colours of guesses, of plans that fit and of those that do not, by number.
GUESSED, FITS, TOO_LARGE = 5, 2, 4


def check_can_write_search(out: Path) -> None:
    """ValueError, in a sentence, unless page and figures can be written. A search is no single picture."""
    if out.suffix not in ("", ".html"):
        raise ValueError(
            f"out={out}: plan search writes a page: it must end in .html, or be a folder, without an ending"
        )
    check_can_write(out, (PAGE, FIGURES))


def write_search(found: Found, figures: Cluster, numbers: Mapping[str, Any], out: Path) -> Path:
    """Writes the page, and the object of `json=true` beside it; the path of the page.

    numbers: `search.numbers`. ValueError where they cannot be written.
    """
    return write_files(out, (PAGE, FIGURES), page_of(found, figures), json.dumps(numbers, indent=1) + "\n")


def page_of(found: Found, figures: Cluster) -> str:
    """The whole page."""
    shown = found.best or found.too_large
    title = _title(shown[0])
    body = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="note">{escaped(figures.title)}, {figures.memory.device_gb:g} GB a device: {len(found.guesses):,} '
        f"legal layouts, all guessed, of which the best were planned</p>",
        _scatter(found, figures),
    ]
    if found.best:
        words = " ".join(settings(found.best[0].config))
        body += [
            "<h2>The best</h2>",
            _table(found.best),
            f"<p>the first one's settings: <code>{escaped(words)}</code></p>",
        ]
    if found.too_large:
        heading = "Quicker, but too large" if found.best else "Nothing fits: what lacks least"
        lines = "".join(f"<li>{escaped(lacks(each, found, figures))}</li>" for each in found.too_large)
        body += [f"<h2>{heading}</h2>", _table(found.too_large), f"<ul>{lines}</ul>"]
    return document(f"Search: {title}", "".join(body))


def _title(first: Planned) -> str:
    counts, num = parameter_counts(first.config.model), first.config.parallel.world_size
    return f"Layouts of {short(counts.total)} parameters on {num:,} device{'s' if num > 1 else ''}"


def _table(some: Sequence[Planned]) -> str:
    header = [heading for heading, _ in COLUMNS]
    body = table([*header, "slower than the line above by"], list(cells(some)), kind="sizes")
    return f'<section class="panel free">{body}</section>'


def _scatter(found: Found, figures: Cluster) -> str:
    device_gb = figures.memory.device_gb
    guesses = [each for each in found.guesses.values() if each.num_bytes / GB <= MOST_DEVICES * device_gb]
    left_out = len(found.guesses) - len(guesses)
    points = [
        (each.num_bytes / GB, each.config.train.global_batch_size * each.config.train.seq_len / each.step_s)
        for each in guesses
    ]
    num = (found.best or found.too_large)[0].config.parallel.world_size
    curves = [Curve("guessed", 0, *_columns([(x, y / num) for x, y in points]), style="cloud", color=GUESSED)]
    for name, some, color in (("planned", found.best, FITS), ("planned, too large", found.too_large, TOO_LARGE)):
        planned = [(each.num_bytes / GB, each.tokens_per_s_per_gpu) for each in some]
        if planned:
            curves.append(Curve(name, 0, *_columns(planned), style="dots", color=color))
    unit = "tokens/s per device over the fullest rank's memory"
    if left_out:
        unit += f"; {left_out:,} that need more than {MOST_DEVICES:g} devices' memory are left out"
    mark = Mark(device_gb, f"a device has {device_gb:g} GB", 0, kind="memory of a device", is_bad=True)
    chart = Chart(
        "Every legal layout",
        unit,
        curves,
        lambda value: f"{value:,.0f}",
        from_zero=True,
        wide=True,
        marks=[mark],
        across="GB",
    )
    end = max([device_gb, *(float(curve.x.max()) for curve in curves if len(curve.x))])
    return f'<div class="panels">{draw(chart, lambda value: f"{value:.4g} GB", end)}</div>'


def _columns(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(points, dtype=float).reshape(-1, 2)
    return both[:, 0], both[:, 1]
