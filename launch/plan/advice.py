"""What would be better than a plan, in sentences: from what the plan has traced, so that it costs a moment."""

from __future__ import annotations

from collections.abc import Sequence

from launch.plan.guess import Guess, Guesses
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.layout import Layout, change, relief
from launch.plan.space import Space, is_legal
from launch.plan.step import ActionCosts
from parallel.pipeline.actions import Chunk
from parallel.pipeline.placement import loop
from train.split import even

MOST = 2
# Below these, advice is not worth the words.
LEAST_GAIN, LEAST_GUESSED_GAIN = 0.01, 0.05
GB = 1e9


def advice(plan: Plan) -> list[str]:
    """At most two sentences: what makes it fit, what evens its stages, which one change promises most."""
    guesses = _near(plan)
    lacks = max(rank.total for rank in plan.ranks) / GB - plan.cluster.memory.device_gb
    found = [_memory(plan, guesses, lacks)] if lacks > 0 else []
    found += [_even(plan)] if plan.config.placement.num_slices > 1 and plan.config.pipeline.layers is None else []
    found += [_quicker(plan, guesses)] if lacks <= 0 else []
    return [each for each in found if each][:MOST]


def _near(plan: Plan) -> list[Guess]:
    """Guesses of the layouts that differ in one thing, and whose layers can be scaled from those of the plan."""
    config, held = plan.config, {"precision", "parallel.nodes"}
    space = Space(config, config.parallel.world_size, plan.cluster.devices_per_node, held, [config.precision])
    own, key = Layout.of(config), Guesses.key(config)
    near = [each for each in space.layouts() if len(own.differs(Layout.of(each))) <= 1 and Guesses.key(each) == key]
    guesses = Guesses({key: plan})
    others = [guesses.of(each) for each in near if Layout.of(each) != own]
    return [guesses.of(config), *others]


def _memory(plan: Plan, guesses: Sequence[Guess], lacks_gb: float) -> str:
    freed = relief(plan.config, guesses)
    moments = max(rank.state.moments for rank in plan.ranks) / 2
    if plan.config.optimizer.moments_dtype != "bf16" and moments > (freed[1] if freed else 0.0):
        freed = "optimizer.moments_dtype=bf16", moments
    if freed is None:
        return f"It lacks {lacks_gb:.1f} GB, and no single setting frees any."
    enough = "" if freed[1] / GB >= lacks_gb else ", which alone is not enough"
    return (
        f"It lacks {lacks_gb:.1f} GB: of single settings {freed[0]} frees most, about {freed[1] / GB:.0f} GB{enough}."
    )


def _even(plan: Plan) -> str:
    """Another number of layers on each stage, where that makes the step shorter and keeps it in memory."""
    layers, step = evened(plan), plan.step(AS_WRITTEN)
    better = plan.with_layers(layers)
    # The optimizer's part is left as it is: another split hardly changes it, and would have to be traced.
    step_s = better.pipeline(AS_WRITTEN)[1].simulation.step + step.rest_of_step_s
    if step_s > (1 - LEAST_GAIN) * step.step_s:
        return ""
    most, device = max(rank.total for rank in better.ranks), plan.cluster.memory.device_gb * GB
    if most > max(device, max(rank.total for rank in plan.ranks)):
        return ""
    busy_s = step.ranks_s
    times = max(busy_s) / (sum(busy_s) / len(busy_s))
    words = f"pipeline.layers={str(layers).replace(' ', '')}"
    return (
        f"The slowest rank of a pipeline works {times:.2f} times the mean: {words} evens it, for a step of "
        f"{step_s:.3f} s."
    )


def _quicker(plan: Plan, guesses: Sequence[Guess]) -> str:
    """The one change that promises most of what fits, by guesses; theirs of the plan itself is the measure."""
    own, *others = guesses
    device_bytes = plan.cluster.memory.device_gb * GB
    fits = [each for each in others if each.num_bytes <= device_bytes]
    best = min(fits, key=lambda each: each.step_s, default=own)
    if best.step_s > (1 - LEAST_GUESSED_GAIN) * own.step_s or not is_legal(best.config):
        return ""
    return (
        f"Of single changes {change(plan.config, best.config)} promises most: a step about "
        f"{1 - best.step_s / own.step_s:.0%} shorter, by a guess that a plan can confirm."
    )


# --- layers for each stage


def evened(plan: Plan) -> list[int]:
    """Layers for each slice of the model, as a run balances them, by the plan's own times."""
    config, kind_s = plan.config, kind_seconds(plan, AS_WRITTEN)
    model = config.model
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    kinds = ["dense"] * dense + ["moe"] * (model.num_hidden_layers - dense)
    layers_s = tuple(kind_s[kind] for kind in kinds)
    first_s, last_s = kind_s["embedding"], kind_s["head"] + kind_s.get("mtp", 0.0)
    return list(even(layers_s, first_s, last_s, config.placement.slices_of_ranks))


def kind_seconds(plan: Plan, kernels: str) -> dict[str, float]:
    """What a micro-batch takes in each kind of layer, exchanges left out where pairs hide them."""
    costs, kinds = plan.step(kernels).costs, plan.layers.passes
    has_pairs = plan.step(kernels).has_pairs
    found = {}
    for kind in kinds:
        alone = ActionCosts(loop(1), [(kind,)], costs.alone, costs.beside, costs.host, 0.0)
        totals = [alone.cost(Chunk(each, 0, 0)).totals for each in "FD"]
        found[kind] = sum(sum(each.busy_s.values()) if has_pairs else each.length_s for each in totals)
    return found
