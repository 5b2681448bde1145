"""A plan's figures: one object for scripts, one screen for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

from launch.plan import breakdown
from launch.plan.advice import advice
from launch.plan.clock import Totals
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN, KERNELS, PUBLISHED
from launch.plan.outcome import RankMemory, StepTime
from train.track.console import short

WORDS = {"as_written": "as written", "published": "published", "bound": "bound"}
GB = 1e9


def numbers(plan: Plan) -> dict[str, Any]:
    """Everything that the screen says and the page draws, as plain values."""
    mesh = plan.config.parallel
    found: dict[str, Any] = {
        "cluster": plan.cluster.title,
        "num_ranks": mesh.world_size,
        "num_tokens_per_step": plan.num_tokens,
        "num_micro_batches": plan.num_micro_batches,
        "schedule": plan.schedule.name,
        "device_bytes": int(plan.cluster.memory.device_gb * GB),
        "timed_layers": _timed(plan),
        "fits": fits(plan),
        "memory": [rank_numbers(rank) for rank in plan.ranks],
        "memory_over_step": breakdown.memory_over_step(plan),
        "costliest_differences": differences(plan),
        "advice": advice(plan),
    }
    return found | {kernels: column(plan, kernels) for kernels in KERNELS}


def _timed(plan: Plan) -> dict[str, Any]:
    """Whether the times of the code as it is written come from the run's own layers, and why not if they were asked
    for."""
    times, reason = plan.timed
    return {"is_used": times is not None, "took_s": times.took_s if times else 0.0, "reason": reason}


def fits(plan: Plan) -> bool:
    """Whether every rank's memory is within the device's."""
    return max(rank.total for rank in plan.ranks) <= plan.cluster.memory.device_gb * GB


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much not."""
    over = max(rank.total for rank in plan.ranks) / GB - plan.cluster.memory.device_gb
    return "fits" if fits(plan) else f"DOES NOT FIT, by {over:.1f} GB"


def column(plan: Plan, kernels: str) -> dict[str, Any]:
    """The figures of one set of kernels."""
    step = plan.step(kernels)
    return {
        "step_s": step.step_s,
        "parts_s": step.parts_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu(kernels),
        "tokens_per_day": plan.num_tokens / step.step_s * 86_400,
        "gpu_hours": plan.gpu_hours(kernels),
        "mfu_causal": plan.mfu(kernels),
        "mfu_noncausal": plan.mfu(kernels, causal=False),
        "peak_bytes": [rank.total for rank in plan.ranks],
        "pair": " ".join(map(str, step.pair)),
        "pair_s": step.pair_totals.length_s,
        "exposed_share_of_pair": exposed_share(step.pair_totals),
        "host_share_of_pair": step.pair_totals.host_s / step.pair_totals.length_s,
        "launches_per_pair": step.pair_totals.num_kernels + step.pair_totals.num_launches,
        "other_share": step.pair_totals.busy_s["move"] / sum(step.pair_totals.busy_s.values()),
        "end_over_middle": end_over_middle(step),
        "pair_by_part_s": {_words(piece): seconds for piece, seconds in by_piece(plan, step).items()},
        "rank_time_s": breakdown.ranks_time(step),
        "traffic": breakdown.traffic(plan, step),
    }


def exposed_share(totals: Totals) -> float:
    """The share of a stretch of time that the device waits for communication."""
    return sum(totals.exposed_s.values()) / totals.length_s


def end_over_middle(step: StepTime) -> float:
    """Device time of the slower end rank over that of a middle one."""
    busy_s = [sum(totals.busy_s.values()) for totals in step.pipeline.totals]
    return max(busy_s[0], busy_s[-1]) / median(busy_s)


def rank_numbers(rank: RankMemory) -> dict[str, Any]:
    """One rank's memory at its fullest, in bytes."""
    state = rank.state
    return {
        "total": rank.total,
        "weights": state.weights,
        "quantised_weights": rank.quantised,
        "main_grad": state.main_grad,
        "masters": state.masters,
        "moments": state.moments,
        "buffers": state.buffers,
        "ema_on_host": state.ema_on_host,
        "step": rank.step.by_component,
        "reserve": rank.reserve,
        "at": str(rank.step.action),
        "largest": dict(list(rank.step.by_label.items())[:10]),
        "by_micro_batch": {f"{stage}.{number}": size for (stage, number), size in rank.step.by_micro_batch.items()},
    }


def differences(plan: Plan) -> list[dict[str, Any]]:
    """The ten pieces of a pair that cost most beyond what the published kernels take, the costliest first."""
    times: dict[str, dict[tuple[str, str, str], float]] = {}
    for kernels in (AS_WRITTEN, PUBLISHED):
        step = plan.step(kernels)
        times[kernels] = by_piece(plan, step)
    written, published = times[AS_WRITTEN], times[PUBLISHED]
    extra = {piece: written[piece] - published.get(piece, 0.0) for piece in written}
    costliest = sorted(extra, key=lambda piece: -extra[piece])[:10]
    return [
        {
            "piece": _words(piece),
            "as_written_s": written[piece],
            "published_s": published.get(piece, 0.0),
            "difference_s": extra[piece],
        }
        for piece in costliest
        if extra[piece] > 0
    ]


def _words(piece: tuple[str, str, str]) -> str:
    return " ".join(filter(None, piece))


def by_piece(plan: Plan, step: StepTime) -> dict[tuple[str, str, str], float]:
    """(layer, node, pass) -> seconds of the device in a pair of a middle rank, and what it waits for by group."""
    found: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for action in step.pair:
        for piece, seconds in step.costs.pieces(action):
            found[piece] += seconds
    for group, seconds in step.pair_totals.exposed_s.items():
        found["waits for", group, "exchange"] += seconds
    if step.pair_totals.host_s:
        found["waits for", "the host", ""] += step.pair_totals.host_s
    return dict(found)


def screen(plan: Plan) -> str:
    """One screen."""
    better = ["", *advice(plan)]
    return "\n".join([*heading(plan), "", *_memory(plan), "", *_times(plan), "", *_work(plan), *better]).rstrip()


def heading(plan: Plan) -> list[str]:
    """What is planned, on what, in two lines."""
    mesh, train, schedule = plan.config.parallel, plan.config.train, plan.schedule.name
    experts = f"experts over {mesh.ep} ({mesh.dispatch}, {_count(mesh.nodes_per_ep_group, 'machine')}), "
    return [
        f"{plan.cluster.title}: {_count(mesh.world_size, 'rank')} = pp {mesh.pp} x dp {mesh.dp}, "
        f"{experts if plan.config.model.n_routed_experts else ''}{schedule}",
        f"{plan.config.precision.name}, {plan.num_micro_batches} micro-batches of {train.micro_batch_size} x "
        f"{train.seq_len} tokens, {short(plan.num_tokens)} tokens a step",
        *_how_timed(plan),
    ]


def _how_timed(plan: Plan) -> list[str]:
    """For people, where it is a question."""
    times, reason = plan.timed
    return (
        [f"the run's own layers, timed here for {times.took_s:.1f} s, say how long it takes"]
        if times
        else ([f"{reason}; what was measured of this machine says how long it takes"] if reason else [])
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _memory(plan: Plan) -> list[str]:
    worst = breakdown.fullest_rank(plan)
    rank, device = plan.ranks[worst], plan.cluster.memory.device_gb
    place = f"on pipeline rank {worst}, in {rank.step.action}"
    always = breakdown.components(rank)
    reserve = always.pop("reserve")
    parts = {**always, **rank.step.by_component, "reserve": reserve}
    lines = [f"memory  {verdict(plan)}: {rank.total / GB:.1f} of {device:.1f} GB {place}"]
    lines += [f"        {name:<22}{size / GB:7.2f} GB" for name, size in parts.items() if size >= 0.005 * GB]
    alive = sorted(rank.step.by_micro_batch.items(), key=lambda each: -each[1])
    lines.append(
        f"        {len(alive)} micro-batches are alive then; the largest hold "
        + ", ".join(f"{number} on stage {stage} {size / GB:.2f}" for (stage, number), size in alive[:3])
        + " GB"
    )
    largest = list(rank.step.by_label.items())[:3]
    lines.append("        largest tensors: " + "; ".join(f"{label} {size / GB:.2f} GB" for label, size in largest))
    return lines


def _times(plan: Plan) -> list[str]:
    columns = {kernels: column(plan, kernels) for kernels in KERNELS}
    rows = time_rows(columns)
    width = max(len(name) for name, _ in rows)
    lines = [f"time    {'':<{width}}" + "".join(f"{WORDS[kernels]:>12}" for kernels in KERNELS)]
    lines += [f"        {name:<{width}}" + "".join(f"{row[kernels]:>12}" for kernels in KERNELS) for name, row in rows]
    launches = columns[AS_WRITTEN]["launches_per_pair"]
    return [*lines, f"        {launches:,} launches in such a pair"]


def time_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, str]]]:
    """The figures of the three sets, by kernels, as rows of text."""
    unit, scale, digits = ("s", 1.0, 1) if columns[AS_WRITTEN]["step_s"] >= 1 else ("ms", 1e3, 3)
    rows: list[tuple[str, Mapping[str, str]]] = [
        (f"step, {unit}", {name: f"{scale * each['step_s']:.3f}" for name, each in columns.items()})
    ]
    for part in columns[AS_WRITTEN]["parts_s"]:
        rows.append((f"  {part}", {name: f"{scale * each['parts_s'][part]:.3f}" for name, each in columns.items()}))
    rows += [
        ("tokens/s per device", {name: f"{each['tokens_per_s_per_gpu']:,.0f}" for name, each in columns.items()}),
        ("device hours of the run", {name: short(each["gpu_hours"]) for name, each in columns.items()}),
        ("MFU, causal", {name: f"{each['mfu_causal']:.1%}" for name, each in columns.items()}),
        ("MFU, not causal", {name: f"{each['mfu_noncausal']:.1%}" for name, each in columns.items()}),
        ("a middle rank's pair, ms", {name: f"{1e3 * each['pair_s']:.{digits}f}" for name, each in columns.items()}),
        ("  waits for exchanges", {name: f"{each['exposed_share_of_pair']:.1%}" for name, each in columns.items()}),
        ("  waits for its host", {name: f"{each['host_share_of_pair']:.1%}" for name, each in columns.items()}),
        ("  neither product nor attention", {name: f"{each['other_share']:.1%}" for name, each in columns.items()}),
        ("end ranks over middle ones", {name: f"{each['end_over_middle']:.2f}" for name, each in columns.items()}),
    ]
    return rows


def _work(plan: Plan) -> list[str]:
    lines = ["what costs most beside the published kernels, in such a pair:"]
    for each in differences(plan):
        lines.append(
            f"        {each['piece']:<34}{1e3 * each['as_written_s']:8.2f} ms for {1e3 * each['published_s']:.2f}"
        )
    return lines
