"""The timeline of one pipeline's step: all of it, and stretches in which micro-batches can be read."""

from __future__ import annotations

from statistics import mean

from launch import timeline
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.outcome import StepTime
from launch.plan.page.words import axis, duration
from train.view.report.document import escaped
from train.view.report.lanes import draw_lanes, lanes_key
from train.view.rows import Bar, Swatch

# How many of a middle rank's actions, at their mean length, a stretch shows; a step that is not much longer is shown
# as a whole.
_ACTIONS, _MOST = 26, 40
OPTIMIZER = "#8b97a0"


def timeline_section(plan: Plan) -> str:
    """What each rank of a pipeline does when, with the kernels that our code calls; nothing for a run without one."""
    if plan.config.parallel.pp == 1:
        return ""
    step, schedule = plan.step(AS_WRITTEN), plan.schedule
    names = [f"rank {rank}" for rank in range(plan.config.parallel.pp)]
    bars, said = _bars(plan, step)
    key = [*timeline.key_of(schedule, timeline.palette(schedule)), Swatch("Optimizer", [[OPTIMIZER]])]
    key.append(Swatch("Idle", [["var(--grid)"]]))
    note = f"Numbers are micro-batches. {timeline.shades_mean(schedule)}"
    middle = [event for event in step.pipeline.simulation.events if event.rank == len(names) // 2]
    length_s = _ACTIONS * mean(event.busy_s for event in middle)
    parts = [
        f"<h2>One pipeline's step <small>{schedule.name}, as written: {duration(step.step_s)}, of which ranks wait for "
        f"each other {step.parts_s['bubble'] / step.step_s:.1%}</small></h2>",
        f'<p class="note">{escaped(note)}</p>{lanes_key(key)}',
    ]
    if step.step_s <= length_s * _MOST / _ACTIONS:
        parts.append(draw_lanes(names, bars, (0.0, step.step_s), axis(step.step_s), said=said))
    else:
        parts.append(draw_lanes(names, bars, (0.0, step.step_s), axis(step.step_s), has_texts=False))
        start_s = (step.pipeline.simulation.step - length_s) / 2
        for title, first_s in (
            ("The beginning", 0.0),
            ("A stretch of the middle", start_s),
            ("The end", step.step_s - length_s),
        ):
            window = first_s, first_s + length_s
            parts.append(f"<h3>{title} <small>seconds {window[0]:.4g} to {window[1]:.4g}</small></h3>")
            parts.append(draw_lanes(names, bars, window, axis(length_s), said=said))
    return f'{"".join(parts[:1])}<section class="panel free">{"".join(parts[1:])}</section>'


def _bars(plan: Plan, step: StepTime) -> tuple[list[Bar], list[str]]:
    """A bar for every action and every optimizer, and what is said of each."""
    colors, simulation = timeline.palette(plan.schedule), step.pipeline.simulation
    bars, said = [], []
    for event in simulation.events:
        bars.append(Bar(event.rank, event.start_s, event.stop_s, *timeline.look(plan.schedule, colors, event.action)))
        said.append(f"rank {event.rank}, {event.start_s:.4g} to {event.stop_s:.4g} s: {event.action.words}")
    for rank in range(plan.config.parallel.pp):
        bars.append(Bar(rank, simulation.step, step.step_s, (OPTIMIZER,), ("optimizer",)))
        said.append(f"rank {rank}, {simulation.step:.4g} to {step.step_s:.4g} s: the optimizer")
    return bars, said
