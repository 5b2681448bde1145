"""The layouts that a search may choose from: every legal one, but for what the settings have fixed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from launch.plan.cluster import Cluster
from parallel import mesh
from parallel.expert import placement
from parallel.mesh import ParallelConfig
from parallel.pipeline import registry
from train import compose
from train.config import RunConfig
from train.model.attention.kinds import LatentSizes
from train.model.config import given
from train.model.recompute_config import RecomputeConfig
from train.precision.config import PrecisionConfig
from train.recipe.ramp import batch_sizes

MICRO_BATCHES = (1, 2, 4, 8)
# What a search varies, beside `recompute` and `precision`.
KEYS = (
    *("parallel.pp", "parallel.dp", "parallel.ep", "parallel.nodes", "parallel.dispatch", "train.micro_batch_size"),
    *("pipeline.schedule", "pipeline.stages_per_rank", "pipeline.pairs", "pipeline.layers"),
)


def space_of(words: Sequence[str], num_ranks: int | None, figures: Cluster) -> Space:
    """The space around the run that these settings describe: what they set themselves is held.

    num_ranks: None for those of the run. ValueError for settings that no layout makes legal, by the first one's rule.
    """
    typed = {word.partition("=")[0].lstrip("+~") for word in words}
    held = {key for key in KEYS if key in typed or key.partition(".")[0] in typed}
    held |= {key for key in ("recompute", "precision") if any(each.partition(".")[0] == key for each in typed)}
    base = _base(words, num_ranks, figures.devices_per_node, held)
    names = ["bf16", "fp8"] + ([base.precision.name] if figures.host.is_device else [])
    precisions: dict[str, PrecisionConfig] = {}
    for name in [] if "precision" in held else names:
        try:
            found = compose.compose([*words, f"precision={name}"]).precision
        except ValueError:  # such as widths that FP8's tiles do not divide
            continue
        precisions[found.name] = found
    num = num_ranks or base.parallel.world_size
    return Space(base, num, figures.devices_per_node, held, list(precisions.values()) or [base.precision])


def _base(words: Sequence[str], num_ranks: int | None, per_node: int, held: Collection[str]) -> RunConfig:
    """The run, over some mesh on which it is legal."""
    first: ValueError | None = None
    depths = [None] if num_ranks is None or "parallel.dp" in held else [None, *_divisors(num_ranks)]
    for pp in depths:
        mesh = [] if pp is None else [f"parallel.dp={(num_ranks or 1) // pp}"]
        mesh += [f"parallel.pp={pp}"] if pp is not None and "parallel.pp" not in held else []
        mesh += (
            [f"parallel.nodes={max(1, (num_ranks or 1) // per_node)}"] if mesh and "parallel.nodes" not in held else []
        )
        try:
            return compose.compose([*words, *mesh])
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


@dataclass(frozen=True)
class Space:
    """What a search varies.

    Attributes:
        base: the run; whatever is not varied is as it is there.
        num_ranks: of the job.
        devices_per_node: that the cluster has.
        held: keys that stay as they are in `base`.
        precisions: those to choose from.
    """

    base: RunConfig
    num_ranks: int
    devices_per_node: int
    held: Collection[str]
    precisions: Sequence[PrecisionConfig]

    def layouts(self) -> Iterator[RunConfig]:
        """All that are legal by the rules of mesh, experts and batch. Whether all rules hold says `RunConfig.check`."""
        for pp, schedule in product(self._choose("parallel.pp", self._depths()), self._schedules()):
            for config in self._meshes(pp, schedule):
                sizes = self._choose("train.micro_batch_size", MICRO_BATCHES)
                for size, recompute, precision in product(sizes, self._recomputes(), self._precisions()):
                    train = replace(config.train, micro_batch_size=size)
                    found = replace(config, train=train, recompute=recompute, precision=precision)
                    if _batches_fit(found):
                        yield found

    def _choose(self, key: str, choices: Sequence[int]) -> Sequence[int]:
        """The choices of a key, or what the run has where it is held."""
        if key not in self.held:
            return choices
        room, _, name = key.partition(".")
        return [getattr(getattr(self.base, room), name)]

    def _depths(self) -> list[int]:
        """Pipelines that give every rank a layer."""
        found = [pp for pp in _divisors(self.num_ranks) if pp <= self.base.model.num_hidden_layers]
        return [pp for pp in found if "parallel.dp" not in self.held or self.num_ranks == pp * self.base.parallel.dp]

    def _schedules(self) -> Sequence[str]:
        return [self.base.pipeline.schedule] if "pipeline.schedule" in self.held else registry.NAMES

    def _meshes(self, pp: int, schedule: str) -> Iterator[RunConfig]:
        base, dp = self.base, self.num_ranks // pp
        if self.num_ranks % pp or (pp == 1 and "pipeline.schedule" not in self.held and schedule != "1f1b"):
            return  # with one rank all schedules are the same
        pipeline = base.pipeline
        pipeline = replace(pipeline, schedule=schedule)
        if "pipeline.stages_per_rank" not in self.held:
            pipeline = replace(pipeline, stages_per_rank=None)
        if "pipeline.pairs" not in self.held:
            pipeline = replace(pipeline, pairs=None)
        if "pipeline.layers" not in self.held:
            pipeline = replace(pipeline, layers=None)
        if schedule == "dualpipe":
            pipeline = replace(pipeline, short_steps="1f1b")  # otherwise a ramp of the batch rules it out
        for ep in self._choose("parallel.ep", self._experts_over(dp)):
            nodes = base.parallel.nodes if "parallel.nodes" in self.held else max(1, self.num_ranks // self._per_node)
            for dispatch in self._dispatches(ep, nodes):
                parallel = ParallelConfig(pp, dp, ep, nodes, dispatch)
                found = replace(base, parallel=parallel, pipeline=pipeline)
                if _is_mesh(found):
                    yield found

    @property
    def _per_node(self) -> int:
        return min(self.devices_per_node, self.num_ranks)

    def _experts_over(self, dp: int) -> list[int]:
        num_experts = self.base.model.n_routed_experts or 0
        return [ep for ep in _divisors(dp) if ep == 1 or (num_experts and num_experts % ep == 0)]

    def _dispatches(self, ep: int, nodes: int) -> Sequence[str]:
        if "parallel.dispatch" in self.held:
            return [self.base.parallel.dispatch]
        if ep == 1:
            return ["local"]
        return ["two_hop", "flat"] if nodes > 1 and ep > self.num_ranks // nodes else ["flat"]

    def _recomputes(self) -> list[RecomputeConfig]:
        """Nothing, what the paper recomputes, and beside it experts' first product or whole nodes."""
        if "recompute" in self.held:
            return [self.base.recompute]
        model = self.base.model
        norms = RecomputeConfig(norm=True, mla_up_proj=isinstance(model.attention_sizes, LatentSizes))
        nodes = ["attention", "experts"] if model.num_routers else []
        if not model.n_routed_experts or model.first_k_dense_replace:
            nodes.append("dense")
        chosen = [[name] for name in nodes if name != "dense"] + [nodes]
        hidden = [replace(norms, experts_up_proj=True)] if model.num_routers else []
        return [RecomputeConfig(), norms, *hidden, *(replace(norms, nodes=each) for each in chosen)]

    def _precisions(self) -> Sequence[PrecisionConfig]:
        return [self.base.precision] if "precision" in self.held else self.precisions


def is_legal(config: RunConfig) -> bool:
    """Whether all rules of a run hold."""
    try:
        config.check()
    except ValueError:
        return False
    return True


def _is_mesh(config: RunConfig) -> bool:
    model = config.model
    try:
        mesh.check(config.parallel, config.mirrored)
        if model.n_routed_experts:
            placement.check(config.parallel, model.n_routed_experts, given(model.n_group))
        return config.placement.num_slices <= model.num_hidden_layers
    except ValueError:
        return False


def _batches_fit(config: RunConfig) -> bool:
    """Whether steps are whole numbers of micro-batches, and the first and the full one what the schedule takes."""
    per_round = config.parallel.dp * config.train.micro_batch_size
    sizes = batch_sizes(config.train)
    if any(size % per_round for size in sizes):
        return False
    pipeline, pp = config.pipeline, config.parallel.pp
    counts = [size // per_round for size in (*sizes[:2], sizes[-1])]
    if config.mirrored:  # shorter ones are one way, as `short_steps` says
        counts = [num for num in counts[:-1] if num >= 2 * pp] + counts[-1:]
    return all(_is_possible(pipeline.schedule, pp, num, pipeline.pairs, pipeline.stages_per_rank) for num in counts)


@cache
def _is_possible(name: str, pp: int, num: int, pairs: bool | None, stages_per_rank: int | None) -> bool:
    try:
        registry.build(name, pp, num, pairs, stages_per_rank)
    except ValueError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
