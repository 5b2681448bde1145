"""Where a plan's memory, time and traffic go, as plain values: what the page draws, and scripts read."""

from __future__ import annotations

from collections import Counter
from typing import Any

from launch.plan.clock import Totals
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.outcome import RankMemory, StepTime
from parallel.pipeline.order import messages

LINK = "link"


def components(rank: RankMemory) -> dict[str, int]:
    """What lies on a rank through the whole step, in bytes, by component."""
    state = rank.state
    found = {
        "reserve": rank.reserve,
        "weights": state.weights + rank.quantised,
        "main_grad": state.main_grad,
        "masters and moments": state.masters + state.moments,
        "router biases": state.buffers,
    }
    return {name: size for name, size in found.items() if size}


def fullest_rank(plan: Plan) -> int:
    """The pipeline rank whose memory is fullest."""
    return max(range(len(plan.ranks)), key=lambda rank: plan.ranks[rank].total)


def memory_over_step(plan: Plan) -> dict[str, Any]:
    """The fullest rank's memory, action by action as it works as written.

    `during` and `after` have, by component, the bytes at the fullest moment of each action and behind it; what lies
    there through the whole step is in `always`. Times in seconds from the step's start; `peak_at` is the number of the
    action with the peak.
    """
    rank = fullest_rank(plan)
    memory = plan.ranks[rank]
    events = [event for event in plan.step(AS_WRITTEN).pipeline.simulation.events if event.rank == rank]
    series = memory.step.series
    # In the order in which they come up, so that neighbours in a picture stay neighbours.
    names = list(dict.fromkeys(name for held in series for name in (*held.fullest, *held.after)))
    return {
        "rank": rank,
        "peak_at": plan.schedule.ranks[rank].index(memory.step.action),
        "actions": [str(event.action) for event in events],
        "start_s": [event.start_s for event in events],
        "stop_s": [event.stop_s for event in events],
        "always": components(memory),
        "during": {name: [held.fullest.get(name, 0) for held in series] for name in names},
        "after": {name: [held.after.get(name, 0) for held in series] for name in names},
    }


def ranks_time(step: StepTime) -> list[dict[str, float]]:
    """What each pipeline rank does in a step, in seconds that add up to it."""
    simulation = step.pipeline.simulation
    return [
        {
            "products": totals.busy_s["product"],
            "attention": totals.busy_s["attention"],
            "passes over memory": totals.busy_s["move"],
            "waits for exchanges": sum(totals.exposed_s.values()),
            "waits for its host": totals.host_s,
            "waits for neighbours": idle_s,
            "optimizer": step.parts_s["optimizer"],
        }
        for totals, idle_s in zip(step.pipeline.totals, simulation.bubble, strict=True)
    ]


def traffic(plan: Plan, step: StepTime) -> list[dict[str, Any]]:
    """By level of the network: what a rank sends in a step, what a token sends on its way through the whole pipeline
    and back, how long the busiest rank's messages take, and how long its device waits for them.

    Mean bytes over ranks of the pipeline; a level without any is left out. Neighbours' waits are in the bubble.
    """
    ranks = [_with_update(*both) for both in zip(step.pipeline.totals, step.updates, strict=True)]
    for channel, sent in messages(plan.schedule).items():
        ranks[channel.source].sent_bytes[LINK] += len(sent) * plan.boundary_bytes
        ranks[channel.source].network_s[LINK] += len(sent) * step.costs.latency
    whole = sum((totals.sent_bytes for totals in ranks), Counter[str]())
    num_tokens = plan.num_tokens / plan.config.parallel.dp
    return [
        {
            "level": level,
            "sent_bytes_per_rank": size / len(ranks),
            "sent_bytes_per_token": size / num_tokens,
            "network_s": max(totals.network_s[level] for totals in ranks),
            "exposed_s": max(totals.exposed_s[level] for totals in ranks),
        }
        for level, size in whole.most_common()
        if size
    ]


def _with_update(work: Totals, update: Totals) -> Totals:
    both = Totals()
    both.add(work)
    both.add(update)
    return both
