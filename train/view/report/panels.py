"""Which charts a report has, from the steps of its runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from train.view.curves import column, not_finite, short_rate, short_tokens, smooth
from train.view.report.chart import Chart, Curve, Mark
from train.view.report.runs import Run

NAMES = {"perf/data_wait_s": "data", "perf/bubble_s": "bubble", "perf/exposed_comm_s": "experts' exchange"}
PARTS = {**NAMES, "perf/zero_comm_s": "optimizer's exchange"}


def short(value: float) -> str:
    """A number of an axis."""
    return f"{value:.4g}"


def short_bytes(value: float) -> str:
    """2.5e9 -> 2.5 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"


def tokens_of(run: Run) -> np.ndarray:
    """[steps] tokens at the end of each step."""
    return column(run.steps, "train/consumed_tokens")


# Kinds of events that are marked in a chart: what its legend calls them, and how they look.
MARKED = {
    "resume": ("resumed", "dotted"),
    "save": ("checkpoint", "short"),
    "save_failed": ("checkpoint not written", "short"),
    "end": ("ended by an error", "dashed"),
    "lost": ("lost a rank", "solid"),
}


def charts(runs: Sequence[Run], entropy: float | None = None) -> list[Chart]:
    """All panels over tokens, in the page's order; those that no run has measured are left out."""
    made = [
        _loss(runs, entropy),
        *_by_source(runs),
        _plain(runs, "MTP loss", "nats per token, mean over depths", "train/mtp_loss", short),
        _plain(runs, "Learning rate", "per step", "train/lr", short_rate, from_zero=True),
        _plain(runs, "Gradient norm", "before clipping", "train/grad_norm", short, is_log=True),
        _batch(runs),
        _plain(runs, "MaxVio", "largest load / mean - 1, worst layer", "moe/max_vio", short, from_zero=True),
        _plain(runs, "Smallest load", "share of the mean, worst layer", "moe/min_load", short, from_zero=True),
        _plain(runs, "Balance loss", "sum over layers, 1 each: even", "train/seq_balance_loss", short),
        _plain(runs, "Throughput", "tokens per second, all ranks", "perf/tokens_per_s", short_tokens, from_zero=True),
        _step_time(runs),
        _plain(runs, "MFU", "share of the peak", "perf/mfu", short, from_zero=True),
        _plain(runs, "Peak memory", "the fullest rank", "memory/peak_bytes", short_bytes, from_zero=True),
    ]
    wanted = {"Training and validation loss", "Learning rate", "Gradient norm"}
    return [chart for chart in made if chart.title in wanted or _is_measured(chart)]


def _is_measured(chart: Chart) -> bool:
    return any(np.isfinite(curve.y).any() for curve in chart.curves)


def _loss(runs: Sequence[Run], entropy: float | None) -> Chart:
    curves: list[Curve] = []
    marks: list[Mark] = []
    is_single = len(runs) == 1
    for number, run in enumerate(runs):
        x, loss, valid = tokens_of(run), column(run.steps, "train/loss"), column(run.steps, "valid/loss")
        if len(loss) > 20:
            curves.append(Curve(f"{run.name}: each step", number, x, loss, "faint"))
        curves.append(Curve("training" if is_single else run.name, number, x, smooth(loss)))
        at = np.isfinite(valid)
        if at.any():
            label, color = ("validation", 1) if is_single else (f"{run.name}: validation", number)
            curves.append(Curve(label, number, x[at], valid[at], "dots", color))
        marks += [Mark(each.tokens, f"{run.name} branches off {each.run}", number, "branch") for each in run.branches]
        marks += event_marks(run, number)
        broken = x[not_finite(run.steps, "train/loss")]
        marks += [
            Mark(where, f"{run.name}: loss not finite", number, "loss not finite", is_bad=True) for where in broken
        ]
    level = None if entropy is None else (entropy, f"unigram entropy {entropy:.2f}")
    unit = "nats per token" + ("" if is_single else "; dots: validation")
    return Chart("Training and validation loss", unit, curves, short, wide=True, level=level, marks=marks)


def event_marks(run: Run, number: int) -> list[Mark]:
    """What happened to a run as a job, where it had come to; a mark for each kind at each step, in the legend by kind.

    What happened past the last step of the file, from which a resume cuts off lines, stands at its end.
    """
    x, steps = tokens_of(run), column(run.steps, "step")
    if not len(steps):
        return []
    marks: dict[tuple[str, int], Mark] = {}
    for event in run.events:
        if event.kind not in MARKED or (event.kind == "end" and not event.is_bad):
            continue
        kind, look = MARKED[event.kind]
        at = int(np.searchsorted(steps, event.step, side="right")) - 1
        where = float(x[at]) if at >= 0 else 0.0
        word = f"{run.name}, {event.time[:19].replace('T', ' ')} UTC: {event.sentence}"
        marks[kind, event.step] = Mark(where, word, number, kind, look, event.is_bad)
    return list(marks.values())


def _by_source(runs: Sequence[Run]) -> list[Chart]:
    """The validation loss of every source: of one run in one panel, of several in a panel for each source."""
    curves: dict[str, list[Curve]] = {}
    is_single = len(runs) == 1
    for number, run in enumerate(runs):
        for place, source in enumerate(run.sources):
            valid, x = column(run.steps, f"valid/{source}/loss"), tokens_of(run)
            at = np.isfinite(valid)
            label, color = (source, place) if is_single else (run.name, number)
            curves.setdefault(source, []).append(Curve(label, number, x[at], valid[at], color=color))
    if is_single:
        together = [curve for each in curves.values() for curve in each]
        return [Chart("Validation loss by source", "nats per token", together, short)] if together else []
    return [Chart(f"Validation loss: {source}", "nats per token", each, short) for source, each in curves.items()]


def _plain(
    runs: Sequence[Run],
    title: str,
    unit: str,
    name: str,
    form: Callable[[float], str],
    is_log: bool = False,
    from_zero: bool = False,
) -> Chart:
    curves = [Curve(run.name, number, tokens_of(run), column(run.steps, name)) for number, run in enumerate(runs)]
    return Chart(title, unit, curves, form, is_log=is_log, from_zero=from_zero)


def _batch(runs: Sequence[Run]) -> Chart:
    curves = []
    for number, run in enumerate(runs):
        tokens, step = tokens_of(run), column(run.steps, "step")
        # Where steps were lost between two lines, the tokens between belong to several.
        num_steps = np.diff(step, prepend=0.0)  # 0 of an evaluation before the first step
        with np.errstate(invalid="ignore"):
            sizes = np.diff(tokens, prepend=0.0) / np.where(num_steps > 0, num_steps, np.nan)
        curves.append(Curve(run.name, number, tokens, sizes))
    return Chart("Batch size", "tokens per step", curves, short_tokens, from_zero=True)


def _step_time(runs: Sequence[Run]) -> Chart:
    """Seconds of a step: its parts where there is one run, the whole step of each run where there are several."""
    whole = [
        Curve(run.name, number, tokens_of(run), column(run.steps, "perf/step_s")) for number, run in enumerate(runs)
    ]
    if len(runs) > 1:
        return Chart("Step time", "seconds", whole, short, from_zero=True)
    run, x = runs[0], tokens_of(runs[0])
    parts = [Curve("whole step", 0, x, column(run.steps, "perf/step_s"))]
    for color, (name, word) in enumerate(PARTS.items(), 1):
        values = column(run.steps, name)
        if np.isfinite(values).any():
            parts.append(Curve(f"waits: {word}", 0, x, values, color=color))
    return Chart("Step time", "seconds", parts, short, from_zero=True)
