"""`python -m launch schedule`: a recipe's borders as a table, and its four curves over tokens as one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from launch.settings import ScheduleSettings
from train import compose
from train.config import RunConfig
from train.recipe.recipe import Recipe, StepPlan
from train.settings import read
from train.view.curves import COLORS, FAINT, headline, paper, save, short_rate, short_tokens

NUM_POINTS = 1000


def schedule(settings: Sequence[str]) -> int:
    """`python -m launch schedule`: print and draw the recipe of the run that these settings describe."""
    own = [setting for setting in settings if setting.startswith("out=")]
    out = read(ScheduleSettings, own, "schedule").out

    def start(config: RunConfig) -> int:
        print(draw(config.recipe(), out))
        print(f"\npicture: {out}")
        return 0

    return compose.started([setting for setting in settings if setting not in own], start)


def table(schedule: Recipe) -> str:
    """What begins where, as lines of text: tokens, the first step that it holds for, the event; then the run's end."""
    rows = [("tokens", "step", "from here on")]
    for tokens, event in schedule.borders():
        rows.append((short_tokens(tokens), f"{schedule.step_at(tokens):,}", event))
    last = schedule.at(schedule.num_steps - 1)
    rows.append((short_tokens(last.consumed_tokens), f"{schedule.num_steps:,}", "the run ends"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{tokens:>{widths[0]}}  {step:>{widths[1]}}  {event}" for tokens, step, event in rows]
    return "\n".join([*lines, *(f"note: {remark}" for remark in schedule.remarks())])


def _drawn_steps(schedule: Recipe) -> list[int]:
    """Steps spread evenly over the run, and both sides of every border, so that no jump is drawn as a slope."""
    spread = np.linspace(0, schedule.num_steps - 1, NUM_POINTS).astype(int)
    warmed = schedule.lr_scheduler.warmup_steps - 1
    borders = {schedule.step_at(tokens) for tokens, _ in schedule.borders()} | {warmed}
    steps = {int(step) for step in spread} | {step + side for step in borders for side in (-1, 0)}
    return sorted(step for step in steps if 0 <= step < schedule.num_steps)


def draw(schedule: Recipe, out: Path) -> str:
    """Writes the PNG `out` with LR, batch size, bias speed and MTP weight over tokens; returns the table of borders."""
    plans = [schedule.at(step) for step in _drawn_steps(schedule)]
    # Every curve is what the step that starts here does; the end of the last step closes the picture.
    ends = plans[-1].consumed_tokens
    tokens = [schedule.tokens_before(plan.step) for plan in plans] + [ends]
    panels: tuple[tuple[str, Callable[[StepPlan], float], Callable[[float, object], str]], ...] = (
        ("Learning rate", lambda plan: plan.lr, short_rate),
        ("Batch, sequences", lambda plan: plan.num_sequences, lambda value, _: f"{value:,.0f}"),
        ("Router bias, step", lambda plan: plan.bias_update_rate, short_rate),
        ("MTP loss weight", lambda plan: plan.mtp_loss_weight, lambda value, _: f"{value:g}"),
    )
    figure, all_axes = paper((1.7, 1.0, 0.8, 0.8))
    for axes, (title, curve, shown), color in zip(all_axes, panels, COLORS, strict=False):
        values = [curve(plan) for plan in plans]
        values.append(values[-1])
        axes.plot(tokens, values, color=color, linewidth=1.8, drawstyle="steps-post", solid_joinstyle="miter")
        axes.fill_between(tokens, values, color=color, alpha=0.1, linewidth=0, step="post")
        turns = dict.fromkeys(shown(value, None) for value in (values[0], max(values), values[-1]))
        headline(axes, title, " → ".join(turns) if len(turns) > 1 else f"{shown(values[0], None)} throughout")
        top, low = max(values), min(values)
        axes.set_ylim(0, top * 1.08 or 1)
        axes.set_yticks([0.0, low, top] if 0.15 * top < low < 0.85 * top else [0.0, top])
        axes.yaxis.set_major_formatter(shown)
        for border in {border for border, _ in schedule.borders() if border}:
            axes.axvline(border, color=FAINT, linewidth=0.7, linestyle=(0, (2, 3)), zorder=0.5)
    all_axes[-1].set_xlim(0, ends)
    save(figure, out)
    return table(schedule)
