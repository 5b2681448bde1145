"""What a layout needs and how long its step takes, roughly and at once, to choose which ones are worth a plan.

The layers of one layout are traced for each precision and for recomputing little and much. Another's are scaled from
there: compute and activations with the tokens of a micro-batch, weights with the ranks that share them, exchanges with
the rows that leave a rank. A plan of its own then says what is right.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from launch.plan.communicators import link_groups, num_groups
from launch.plan.events import Calls, Enter, Event, Kernel, Launch, LayerPasses, Memory
from launch.plan.exchange import EXCHANGE
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.layers import small_job
from launch.plan.memory import book
from launch.plan.price import Pricing, priced
from launch.plan.routing import Routing
from launch.plan.state import Numels, numels_by_kind
from launch.plan.step import ActionCosts, layers_of_parts
from launch.plan.world import placement_of
from parallel.mesh import Mesh
from parallel.pipeline.actions import Chunk, Pair
from parallel.pipeline.order import messages
from parallel.pipeline.placement import loop
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import Costs, simulate
from train.assemble import DTYPES
from train.config import RunConfig
from train.precision.grads import wide_dtype

# A schedule is simulated with at most so many micro-batches per rank: more of them repeat its middle.
_ROUNDS = 2


@dataclass(frozen=True)
class Pass:
    """A pass through one layer.

    Attributes:
        seconds: node -> what its kernels take, and of a host that is the device what it needs to call them.
        num_issued: kernels and communications.
    """

    seconds: Mapping[str, float]
    num_issued: int


@dataclass(frozen=True)
class LayerFigures:
    """One kind of layer, of one micro-batch of the traced layout.

    Attributes:
        passes: `F`, `B`, `W`.
        kept_bytes: node -> what lies there from its forward to its backward.
        waiting_bytes: what lies there from its backward to its weight gradients.
        moment_bytes: the most that any of its passes needs besides, for the time of the pass.
        quantised_bytes: copies of its weights in another format.
    """

    passes: Mapping[str, Pass]
    kept_bytes: Counter[str]
    waiting_bytes: int
    moment_bytes: int
    quantised_bytes: int


def figures_of(layer: LayerPasses, quantised_bytes: int, pricing: Pricing) -> LayerFigures:
    """What a traced layer comes to."""
    weights = [event for each in layer.weights for event in each]
    lists: dict[str, Sequence[Event]] = {"F": layer.forward, "B": layer.backward, "W": weights}
    kept: Counter[str] = Counter()
    node = ""
    for event in layer.forward:
        if isinstance(event, Enter):
            node = event.node
        elif isinstance(event, Memory):
            kept[node] += event.num_bytes
    forward, backward = book(layer.forward), book(layer.backward)
    moment = max(forward.peak_bytes - max(0, sum(kept.values())), backward.peak_bytes)
    passes = {kind: _pass(events, pricing) for kind, events in lists.items()}
    waiting = sum(kept.values()) + sum(backward.net_bytes.values())
    return LayerFigures(passes, kept, waiting, moment, quantised_bytes)


def _pass(events: Sequence[Event], pricing: Pricing) -> Pass:
    seconds: defaultdict[str, float] = defaultdict(float)
    node, num = "", 0
    for event, each_s in pricing.events(events):
        if isinstance(event, Enter):
            node = event.node
        elif isinstance(event, Kernel):
            seconds[node] += each_s
            num += 1
        elif isinstance(event, Calls):
            seconds[node] += each_s
        elif isinstance(event, Launch):
            num += 1
    return Pass(seconds, num)


@dataclass(frozen=True)
class Guess:
    """What one layout comes to.

    Attributes:
        config: the run that has it.
        step_s: its step, as written.
        num_bytes: of the rank that needs most.
    """

    config: RunConfig
    step_s: float
    num_bytes: float


@dataclass
class Guesses:
    """Guesses what layouts of one run come to, from some of them that are traced.

    Attributes:
        traced: (precision, whether much is recomputed) -> the plan whose layers are scaled.
    """

    traced: Mapping[tuple[str, bool], Plan]
    _figures: dict[tuple[str, bool], dict[str, LayerFigures]] = field(default_factory=dict)
    _shows: dict[tuple[tuple[str, bool], str], float] = field(default_factory=dict)
    _numels: Numels | None = None
    idle: dict[tuple[object, ...], float] = field(default_factory=dict)
    _schedules: dict[tuple[object, ...], Schedule] = field(default_factory=dict)
    _alive: dict[tuple[object, ...], list[tuple[set[tuple[int, ...]], int]]] = field(default_factory=dict)
    _kinds: dict[tuple[object, ...], list[tuple[str, ...]]] = field(default_factory=dict)

    @staticmethod
    def key(config: RunConfig) -> tuple[str, bool]:
        """What layouts share whose layers are scaled from the same trace."""
        return config.precision.name, config.recompute.norm or config.recompute.mla_up_proj

    def of(self, config: RunConfig) -> Guess:
        """A layout. ValueError for a schedule that cannot be."""
        key = self.key(config)
        return _One(self, self.traced[key], self.figures(key), config).guess()

    def figures(self, key: tuple[str, bool]) -> dict[str, LayerFigures]:
        """Each kind of layer as it was traced."""
        if key not in self._figures:
            traced, pricing = self.traced[key].layers, self.traced[key].pricing(AS_WRITTEN, False)
            self._figures[key] = {
                kind: figures_of(layer, traced.quantised_bytes[kind], pricing) for kind, layer in traced.passes.items()
            }
        return self._figures[key]

    def shows(self, config: RunConfig, kind: str) -> float:
        """The share of a kind of layer's exchanges that a pair of a forward and a backward does not hide, as in the
        traced layout."""
        key = self.key(config)
        if (key, kind) not in self._shows:
            plan = self.traced[key]
            pricing = (plan.pricing(AS_WRITTEN, beside) for beside in (False, True))
            alone, beside = (priced(plan.layers.passes, each) for each in pricing)
            costs = ActionCosts(loop(1), [("stage", kind)], alone, beside, plan.host(AS_WRITTEN), 0.0)
            exposed_s = costs.cost(Pair(Chunk("F", 0, 0), Chunk("D", 0, 1))).totals.exposed_s
            wire_s = 2 * _One(self, plan, self.figures(key), plan.config).wire_s * _num_routers(kind, plan.config)
            self._shows[key, kind] = sum(exposed_s.values()) / wire_s if wire_s else 0.0
        return self._shows[key, kind]

    def numels(self) -> Numels:
        """Elements of each kind of layer."""
        if self._numels is None:
            self._numels = numels_by_kind(small_job(next(iter(self.traced.values())).config))
        return self._numels

    def kinds(self, config: RunConfig) -> list[tuple[str, ...]]:
        """The kinds of the layers of each slice."""
        key = config.placement.slices_of_ranks, config.precision.name, tuple(config.pipeline.layers or ())
        if key not in self._kinds:
            self._kinds[key] = [layers_of_parts(each, config.model.first_k_dense_replace) for each in config.slices]
        return self._kinds[key]

    def alive(self, config: RunConfig, schedule: Schedule) -> list[tuple[set[tuple[int, ...]], int]]:
        """How many micro-batches of each of a rank's stages wait for their backward at once, and for their weight
        gradients, at any time, and the number of its links; of every rank."""
        key = config.pipeline.schedule, config.parallel.pp, schedule.num_micro_batches
        if key not in self._alive:
            links = Counter(rank for channel in messages(schedule) for rank in channel[:2])
            self._alive[key] = [(_alive(schedule, rank), links[rank]) for rank in range(config.parallel.pp)]
        return self._alive[key]

    def schedule(self, config: RunConfig, num: int) -> Schedule:
        """The schedule of so many micro-batches."""
        key = config.pipeline.schedule, config.pipeline.stages_per_rank, config.parallel.pp, num
        if key not in self._schedules:
            self._schedules[key] = config.schedule(num)
        return self._schedules[key]


@dataclass
class _One:
    all: Guesses
    plan: Plan
    layers: Mapping[str, LayerFigures]
    config: RunConfig

    def guess(self) -> Guess:
        pp = self.config.parallel.pp
        num = _count(self.config)
        few = min(num, _ROUNDS * pp)
        schedule = self.all.schedule(self.config, few)
        return Guess(self.config, self._step_s(schedule, num, few), self._num_bytes(schedule))

    # --- time

    def _step_s(self, schedule: Schedule, num: int, few: int) -> float:
        """The fullest rank's work, and what a step of this depth and order idles besides."""
        slices, placement, pp = self.all.kinds(self.config), schedule.placement, self.config.parallel.pp
        stage_s, pairs_s = [self._stage_s(kinds) for kinds in slices], self._pair_s(slices)
        has_pairs = any(action.kind == "pair" for actions in schedule.ranks for action in actions)
        busy_s = [0.0] * pp
        for stage in range(placement.num_stages):
            position = placement.position(stage)
            each_s = pairs_s[position] if has_pairs else sum(stage_s[position])
            busy_s[placement.rank_of[stage]] += each_s / len(placement.routes)
        key = self.config.pipeline.schedule, pp, few
        if key not in self.all.idle:
            f, b, w = ([each[index] for each in stage_s] for index in range(3))
            costs = Costs(f, b, w, pair=sum(pairs_s) / pp)
            # How many micro-batches of the fullest rank's work the first and the last ones take besides.
            self.all.idle[key] = simulate(schedule, costs).step / max(busy_s) - few
        return (num + self.all.idle[key]) * max(busy_s)

    def _stage_s(self, kinds: Sequence[str]) -> tuple[float, float, float]:
        found = [0.0, 0.0, 0.0]
        for kind in kinds:
            passes = self.layers[kind].passes
            wire_s = self.wire_s * _num_routers(kind, self.config)
            for place, name in enumerate("FBW"):
                found[place] += self._pass_s(kind, passes[name]) + (wire_s if name != "W" else 0.0)
            found[1] += self._again_s(kind)
        return found[0], found[1], found[2]

    def _pair_s(self, slices: Sequence[Sequence[str]]) -> list[float]:
        """Seconds of a forward beside a backward, of each slice."""
        found = []
        for kinds in slices:
            total_s = 0.0
            for kind in kinds:
                compute_s = sum(self._pass_s(kind, each) for each in self.layers[kind].passes.values())
                wire_s = 2 * self.wire_s * _num_routers(kind, self.config)
                shows_s = self.all.shows(self.config, kind) * wire_s
                total_s += max(compute_s + self._again_s(kind) + shows_s, wire_s)
            found.append(total_s)
        return found

    def _pass_s(self, kind: str, one: Pass) -> float:
        issue_s = self.plan.host(AS_WRITTEN).issue_s
        return max(sum(one.seconds.values()) * self._ratio, one.num_issued * issue_s)

    def _again_s(self, kind: str) -> float:
        """What a backward computes again of whole nodes."""
        forward, model = self.layers[kind].passes["F"].seconds, self.config.model
        again_s = sum(forward.get(node, 0.0) for node in _nodes_again(kind, self.config))
        routed = model.num_experts_per_tok or 0
        # Of the three matrices of an expert the first product has two.
        share = 2 / 3 * routed / (routed + (model.n_shared_experts or 0)) if routed else 0.0
        return (again_s + self._hidden_times * share * forward.get("experts", 0.0)) * self._ratio

    @property
    def _hidden_times(self) -> int:
        """How many times more than the traced layout this one makes SwiGLU's input of routed experts again."""
        return self.config.recompute.experts_up_proj - self.plan.config.recompute.experts_up_proj

    @property
    def _ratio(self) -> float:
        """Tokens of a micro-batch over those of the traced one."""
        mine, traced = self.config.train, self.plan.config.train
        return mine.micro_batch_size * mine.seq_len / (traced.micro_batch_size * traced.seq_len)

    @cached_property
    def wire_s(self) -> float:
        """Rows on their way to experts and back, one layer."""
        if self.config.parallel.ep == 1:
            return 0.0
        pricing = Plan(self.config, self.plan.cluster, self.plan.rates).pricing(AS_WRITTEN, False)
        launches = _exchanges(self.config)
        return 2 * sum(seconds for _, seconds in pricing.events(launches))

    # --- memory

    def _num_bytes(self, schedule: Schedule) -> float:
        slices, placement = self.all.kinds(self.config), schedule.placement
        kept = [sum(self._kept_bytes(kind) for kind in kinds) for kinds in slices]
        waiting = [sum(self.layers[kind].waiting_bytes for kind in kinds) * self._ratio for kinds in slices]
        moment = max(self.layers[kind].moment_bytes for kinds in slices for kind in kinds) * self._ratio
        most = 0.0
        figures = self.plan.cluster.memory
        for rank, (counts, num_links) in enumerate(self.all.alive(self.config, schedule)):
            places = [placement.position(stage) for stage in placement.stages_on(rank)]
            sizes = [size for place in places for size in (kept[place], waiting[place])]
            peak = max(sum(num * size for num, size in zip(each, sizes, strict=True)) for each in counts)
            held = peak + self._state_bytes([kind for place in places for kind in slices[place]])
            links = link_groups(num_links, self.plan.device)
            most = max(most, held / (1 - figures.fragmentation_share) + links * figures.communicator_gb * 1e9)
        fixed_gb = figures.context_gb + num_groups(self.config, self.plan.device) * figures.communicator_gb
        return most + moment / (1 - figures.fragmentation_share) + fixed_gb * 1e9

    def _kept_bytes(self, kind: str) -> float:
        again = _nodes_again(kind, self.config)
        kept = self.layers[kind].kept_bytes
        own = sum(size for node, size in kept.items() if node not in again) * self._ratio
        found = own + sum(self._border_bytes(node) for node in again)
        return found if "experts" in again else found - self._hidden_times * self._hidden_bytes(kind)

    def _hidden_bytes(self, kind: str) -> float:
        """SwiGLU's input of routed experts, as it is kept."""
        train, model, precision = self.config.train, self.config.model, self.config.precision
        element_bytes: float = DTYPES[precision.name].itemsize
        if precision.is_fp8("experts.down_proj"):
            element_bytes = 1 + 4 / 128  # a scale in float32 for every 128 codes
        rows = train.micro_batch_size * train.seq_len * (model.num_experts_per_tok or 0)
        return rows * 2 * (model.moe_intermediate_size or 0) * element_bytes * _num_routers(kind, self.config)

    def _border_bytes(self, node: str) -> float:
        """What lies at the borders of a node whose inside is computed again: its input, and of attention the sum that
        it is added to, of experts what they hand to the combine."""
        train, model = self.config.train, self.config.model
        rows = {"dense": 1, "attention": 2, "experts": 1 + (model.num_experts_per_tok or 0)}[node]
        row_bytes = model.hidden_size * DTYPES[self.config.precision.name].itemsize
        return rows * train.micro_batch_size * train.seq_len * row_bytes

    def _state_bytes(self, kinds: Sequence[str]) -> float:
        config, numels = self.config, self.all.numels()
        dtype = DTYPES[config.precision.name]
        wide = wide_dtype(dtype).itemsize
        master = 0 if dtype.itemsize == wide else wide
        moment = 2 if config.optimizer.moments_dtype == "bf16" else wide
        mesh, copies = config.parallel, 2 if config.mirrored else 1
        found = 0.0
        for kind in kinds:
            everywhere, experts = numels.get(kind, (0, 0))
            own = everywhere + experts / mesh.ep
            shard = everywhere / (mesh.dp * copies) + experts / (mesh.dp * copies)
            found += own * (dtype.itemsize + wide) + shard * (master + 2 * moment)
            traced = everywhere + experts / self.plan.config.parallel.ep
            found += self.layers[kind].quantised_bytes * own / traced if traced else 0
        return found


def _alive(schedule: Schedule, rank: int) -> set[tuple[int, ...]]:
    """(stage 0's between forward and backward, between backward and weight gradients, stage 1's ...), each time at
    which no other one has as many of all."""
    stages = schedule.placement.stages_on(rank)
    now = {(stage, state): 0 for stage in stages for state in "FB"}
    found = set()
    for action in schedule.ranks[rank]:
        for part in action.parts:
            now[part.stage, "F"] += {"F": 1, "B": -1, "W": 0}[part.kind]
            now[part.stage, "B"] += {"F": 0, "B": 1, "W": -1}[part.kind]
            if part.kind == "F":
                found.add(tuple(now.values()))
        found.add(tuple(now.values()))
    return {each for each in found if not any(each != other and all(map(int.__le__, each, other)) for other in found)}


def _count(config: RunConfig) -> int:
    return config.train.global_batch_size // config.parallel.dp // config.train.micro_batch_size


def _num_routers(kind: str, config: RunConfig) -> int:
    """Layers with experts in a kind."""
    if not config.model.n_routed_experts:
        return 0
    return {"moe": 1, "mtp": config.model.num_nextn_predict_layers}.get(kind, 0)


def _nodes_again(kind: str, config: RunConfig) -> list[str]:
    """Nodes of a layer that keep only their inputs."""
    own = {"dense": ("dense",), "moe": ("attention", "experts"), "mtp": ("attention", "experts")}.get(kind, ())
    return [node for node in own if node in config.recompute.nodes]


def _exchanges(config: RunConfig) -> list[Launch]:
    """A dispatch as messages, when routers are in balance."""
    train, model = config.train, config.model
    place = placement_of(config, Mesh(config.parallel, 0, config.mirrored, config.shared_ends))
    routing = Routing.balanced(model, place, train.micro_batch_size * train.seq_len)
    row = model.hidden_size * DTYPES[config.precision.name].itemsize
    own, each = place.num_local_experts, place.experts_per_node
    ranks = [routing.copies(rank * own, own) * row for rank in range(1, place.ep)]
    if config.parallel.dispatch != "two_hop":
        return [Launch(0, EXCHANGE, "ep", place.ep, sum(ranks), sum(ranks))]
    rail = sum(routing.copies(node * each, each) * row for node in range(1, place.num_nodes))
    node = sum(ranks[: place.ranks_per_node - 1]) * place.num_nodes
    hops = [("rail", place.num_nodes, rail), ("node", place.ranks_per_node, node)]
    return [Launch(at, EXCHANGE, group, num, size, size) for at, (group, num, size) in enumerate(hops) if num > 1]
