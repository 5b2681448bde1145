"""A run on a cluster, planned: its memory once, and its step in each of the three sets of kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from launch.plan import memory
from launch.plan.clock import Clock, Host, Totals
from launch.plan.cluster import Cluster
from launch.plan.communicators import link_groups, num_groups
from launch.plan.events import Event, Launch
from launch.plan.hidden import Room, exposed, rooms
from launch.plan.kernels import AS_WRITTEN, Rates
from launch.plan.layers import Kept, Layers, layers_of
from launch.plan.outcome import RankMemory, StepTime
from launch.plan.own_layers import OwnTimes, Timed, few_layers
from launch.plan.own_scales import OwnScales, all_of, scales_of
from launch.plan.price import Pricing, priced
from launch.plan.replay import Passes, passes_of
from launch.plan.state import StateBytes, exchanged_sets, state_bytes, update_events
from launch.plan.step import ActionCosts, PipelineStep, layers_of_parts, run_schedule
from launch.plan.world import MakeRouting, as_drawn, balanced
from parallel.pipeline.actions import Action, Chunk, Pair
from parallel.pipeline.links import NUM_POSTED
from parallel.pipeline.order import Channel, Message, messages
from parallel.pipeline.rounds import Round, rounds
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.simulate import simulate
from train import environment
from train.assemble import DTYPES
from train.config import RunConfig
from train.flops import training_flops_per_token

# What the host needs to see a number once the device has it: a copy over PCIe and an event.
READ_S = 15e-6
# How often the share of a step in which ranks work is looked up anew: by then it changes by a hundredth.
_NUM_BESIDE = 3
NOT_TIMED = Timed()

Found = TypeVar("Found")


class Plan:
    """A run on a cluster. Everything is worked out when it is asked for, and once.

    kept: what was traced by what decides it, shared between plans. make_routing: what experts get. On a machine
    whose host computes `balanced` is in the mean: there a micro-batch has what chance makes of it. timed: what the
    run's own layers took on this machine, which then says how long a step is as written.
    """

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        rates: Rates | None = None,
        make_routing: MakeRouting = balanced,
        kept: Kept | None = None,
        timed: Timed = NOT_TIMED,
    ) -> None:
        self.config = config
        self.timed = timed
        self.cluster = cluster.on(threads_of(config)) if cluster.host.is_device else cluster
        self.rates = rates or Rates(self.cluster, value_width=config.model.v_head_dim)
        self._kept: Kept = {} if kept is None else kept
        # Small micro-batches are on machines like this one, where one row more is another product.
        self._make_routing = as_drawn if cluster.host.is_device and make_routing is balanced else make_routing
        self._steps: dict[str, StepTime] = {}

    def with_layers(self, layers: Sequence[int]) -> Plan:
        """This plan with another number of layers on each stage; nothing is traced again."""
        pipeline = replace(self.config.pipeline, layers=list(layers))
        config = replace(self.config, pipeline=pipeline)
        return Plan(config, self.cluster, self.rates, self._make_routing, self._kept, self.timed)

    @property
    def device(self) -> str:
        """For which kind of device everything is chosen."""
        return "cpu" if self.cluster.host.is_device else "cuda"

    @cached_property
    def layers(self) -> Layers:
        """What each kind of layer does."""
        return layers_of(self.config, self.device, self._make_routing, self._kept)

    @cached_property
    def slices(self) -> list[tuple[str, ...]]:
        """The kinds of the layers of each slice of the model."""
        num_dense = self.config.model.first_k_dense_replace
        return [layers_of_parts(each, num_dense) for each in self.config.slices]

    @cached_property
    def num_micro_batches(self) -> int:
        """Micro-batches of one pipeline in a step of the full batch."""
        return self._count(self.config.train.global_batch_size)

    @cached_property
    def schedule(self) -> Schedule:
        """What each rank of a pipeline does in a step of the full batch."""
        return self.config.schedule(self.num_micro_batches)

    @cached_property
    def rounds(self) -> tuple[tuple[Round, ...], ...]:
        """What each rank of a pipeline exchanges in that step where messages are kernels."""
        return rounds(self.schedule)

    @property
    def num_tokens(self) -> int:
        """Tokens of a step of the full batch."""
        return self.config.train.global_batch_size * self.config.train.seq_len

    @cached_property
    def boundary_bytes(self) -> int:
        """Bytes of the tensor that one stage hands to the next."""
        train = self.config.train
        num_elements = train.micro_batch_size * train.seq_len * self.config.model.hidden_size
        return num_elements * DTYPES[self.config.precision.name].itemsize

    # --- memory

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """The memory of each rank of a pipeline."""
        booked = {kind: passes_of(layer, memory.book) for kind, layer in self.layers.passes.items()}
        return [self._rank(rank, booked) for rank in range(self.config.parallel.pp)]

    def _rank(self, rank: int, booked: Mapping[str, Passes[memory.Booked]]) -> RankMemory:
        quantised = self._quantised_bytes(rank)
        in_rounds = self.device == "cuda"
        posted = 0 if in_rounds else NUM_POSTED * sum(channel.target == rank for channel in self._sent)
        own_rounds = self.rounds[rank] if in_rounds else None
        peak = memory.peak_of(
            self.schedule, rank, self.slices, booked, self.boundary_bytes, posted, self._sent, own_rounds
        )
        state = self._states[rank]
        held = state.on_device + quantised + peak.num_bytes
        return RankMemory(state, quantised, peak, self._reserve(rank, held))

    @cached_property
    def _sent(self) -> dict[Channel, list[Message]]:
        return messages(self.schedule)

    def _quantised_bytes(self, rank: int) -> int:
        return sum(self.layers.quantised_bytes.get(kind, 0) for kind in self._kinds_on(rank))

    def _reserve(self, rank: int, held: int) -> int:
        """Context, communicators, and fragmentation of what is held."""
        figures = self.cluster.memory
        links = link_groups(sum(rank in channel[:2] for channel in self._sent), self.device)
        fixed = figures.context_gb + (links + num_groups(self.config, self.device, rank)) * figures.communicator_gb
        return int(fixed * 1e9 + held * figures.fragmentation_share / (1 - figures.fragmentation_share))

    def _kinds(self, stage: int) -> tuple[str, ...]:
        return self.slices[self.config.placement.position(stage)]

    def _kinds_on(self, rank: int) -> list[str]:
        """The kinds of the layers of all stages of a rank."""
        return [kind for stage in self.config.placement.stages_on(rank) for kind in self._kinds(stage)]

    # --- time

    def step(self, kernels: str = AS_WRITTEN) -> StepTime:
        """The step in one set of kernels."""
        if kernels not in self._steps:
            self._steps[kernels] = self._step(kernels)
        return self._steps[kernels]

    def pricing(self, kernels: str, beside: bool, busy_share: float = 1.0) -> Pricing:
        """What events take in a set of kernels.

        beside: in a pair, whose exchanges run beside what computes. busy_share: of the time in which another rank works
        that shares the machine's cores.
        """
        crosses, precision = self.config.parallel.nodes_per_ep_group > 1, self.config.precision.name
        slowdown, own, times = self._slowdown(busy_share), OwnScales(), self._own(kernels)
        if times is not None:
            slowdown, own = times.slowdown(busy_share), self._scales
        return Pricing(self.cluster, self.rates, precision, kernels, beside, crosses, slowdown, self._together(), own)

    def _own(self, kernels: str) -> OwnTimes | None:
        """Times of the run's own layers, which are those of the code as it is written."""
        return self.timed.times if kernels == AS_WRITTEN else None

    @cached_property
    def _scales(self) -> OwnScales:
        """The run's own layers as they were timed, over what the machine's figures say of them."""
        times = self._own(AS_WRITTEN)
        assert times is not None
        crosses, timed = self.config.parallel.nodes_per_ep_group > 1, few_layers(self.config)
        plain = Pricing(
            self.cluster, self.rates, self.config.precision.name, AS_WRITTEN, False, crosses, {}, self._together()
        )
        update = plain.update(update_events(timed, 0, self.device), 0)
        return scales_of(times, [*(plain.events(all_of(each)) for each in self.layers.passes.values()), update])

    def _slowdown(self, busy_share: float) -> dict[str, float]:
        """How much longer everything takes than on a rank that is alone: ranks of one machine share its cores, and
        those that wait leave theirs to the others. What a rank's own threads do to each other is in its figures."""
        threads = threads_of(self.config)
        num_others = min(self.config.parallel.ranks_per_node, self.config.parallel.world_size) - 1
        alone, crowded = (self.cluster.slowdown(threads * num) for num in (1, 1 + busy_share * num_others))
        return {work: longer / alone.get(work, 1.0) for work, longer in crowded.items()}

    def _together(self) -> dict[str, int]:
        """Kind of group -> how many of its ranks share a machine."""
        mesh = self.config.parallel
        per_node = min(mesh.ranks_per_node, self.cluster.devices_per_node)
        in_column = min(per_node, mesh.dp)
        apart = max(1, in_column // mesh.ep)
        return {
            "rail": 1,
            "node": mesh.ep // mesh.nodes_per_ep_group,
            "ep": min(per_node, mesh.ep),
            "dense": in_column,
            "embedding": in_column,
            "expert": apart,
            "world": per_node,
            "link": 2 if per_node > mesh.dp else 1,
        }

    def pipeline(self, kernels: str) -> tuple[ActionCosts, PipelineStep]:
        """What the schedule's actions take in one set of kernels, and the schedule simulated with that."""
        found = self._pipeline_beside(kernels, 1.0)
        for _ in range(_NUM_BESIDE if self.pricing(kernels, False).slowdown else 0):
            # Ranks that wait, for neighbours or in exchanges, leave their cores to those that work.
            worked_s = [sum(totals.busy_s.values()) + totals.host_s for totals in found[1].totals]
            found = self._pipeline_beside(kernels, sum(worked_s) / len(worked_s) / found[1].simulation.step)
        return found

    def _pipeline_beside(self, kernels: str, busy_share: float) -> tuple[ActionCosts, PipelineStep]:
        pricings = (self.pricing(kernels, each, busy_share) for each in (False, True))
        alone, beside = (priced(self.layers.passes, pricing) for pricing in pricings)
        costs = ActionCosts(
            self.config.placement, self.slices, alone, beside, self.host(kernels), self._latency_s(kernels)
        )
        return costs, run_schedule(self.schedule, costs)

    def _step(self, kernels: str) -> StepTime:
        costs, pipeline = self.pipeline(kernels)
        ranks_s = tuple(totals.length_s for totals in pipeline.totals)
        middle = self.schedule.ranks[self.config.parallel.pp // 2]
        pair, totals = _pair(middle), Totals()
        for action in pair:
            totals.add(costs.cost(action).totals)
        updates, rest_s = self._updating(kernels, rooms(pipeline.simulation)), self._rest_s(kernels)
        return StepTime(kernels, costs, pipeline, updates, rest_s, ranks_s, pair, totals)

    def _rest_s(self, kernels: str) -> float:
        """What a host that is the device does in a step beside its layers and its optimizer."""
        if kernels != AS_WRITTEN:
            return 0.0
        own = self._own(kernels)
        if own is None:
            return self.cluster.host.step_us * 1e-6 * self._slowdown(1.0).get("calls", 1.0)
        once_s = own.once_s
        quantising_s = (
            sum(once_s.get(kind, 0.0) for kind in self._kinds_on(rank)) for rank in range(self.config.parallel.pp)
        )
        return max(quantising_s) * own.turns + own.of_step_s

    def host(self, kernels: str) -> Host:
        """Our own code's host. Fused kernels are few enough for any host to keep ahead. Where the host is the device,
        the trace's calls say what it takes."""
        if self.cluster.host.is_device:
            return Host(is_device=True)
        issue_s = self.cluster.host.launch_us * 1e-6
        return Host(issue_s, READ_S) if kernels == AS_WRITTEN else Host()

    def _latency_s(self, kernels: str) -> float:
        """From a chunk's end until its result is at the neighbour."""
        if self.config.parallel.pp == 1:
            return 0.0
        launch = Launch(0, "send", "link", 2, self.boundary_bytes, 0)
        return dict(self.pricing(kernels, False).events([launch])).popitem()[1]

    def _updating(self, kernels: str, beside: Sequence[Room]) -> tuple[Totals, ...]:
        """Each rank's update, with what it quantises anew, and without what hides beside the pipeline."""
        found = []
        for rank in range(self.config.parallel.pp):
            clock = Clock(self.host(kernels))
            # Where the run's own layers were timed, so was what they quantise.
            kinds = self._kinds_on(rank) if self._own(kernels) is None else []
            again = [each for kind in kinds for each in self.layers.quantising.get(kind, ())]
            state = self._states[rank]
            # Gradients are zeroed, and those of the shard read; masters and moments read and written, weights written.
            num_bytes = state.main_grad + 3 * state.masters + 2 * state.moments + state.weights
            num_bytes += self._quantised_bytes(rank)
            events = self.pricing(kernels, False).update([*self._updates[rank], *again], num_bytes)
            sets = exchanged_sets(self.config, rank)
            for (event, seconds), (_, left_s) in zip(events, exposed(events, sets, beside[rank]), strict=True):
                clock.see(event, left_s, 0)
                if isinstance(event, Launch):  # what hides keeps the network at work all the same
                    clock.totals.network_s[event.group] += seconds - left_s
            found.append(clock.totals)
        return tuple(found)

    @cached_property
    def _states(self) -> list[StateBytes]:
        """What each rank keeps from step to step."""
        return self._of_like_ranks(lambda rank: state_bytes(self.config, rank))

    @cached_property
    def _updates(self) -> list[tuple[Event, ...]]:
        """What each rank's optimizer does."""
        config = self.config
        job = config.model, config.parallel, config.mirrored, config.shared_ends, config.precision, config.optimizer

        def update(rank: int) -> tuple[Event, ...]:
            kinds = [self._kinds(stage) for stage in config.placement.stages_on(rank)]
            key = repr(("update", self.device, *job, kinds, config.frozen and rank))
            if key not in self._kept:
                self._kept[key] = update_events(config, rank, self.device)
            return self._kept[key]

        return self._of_like_ranks(update)

    def _of_like_ranks(self, of: Callable[[int], Found]) -> list[Found]:
        """What is found out of each rank of a pipeline, once for those that hold like layers. Where some parameters are
        frozen, layers of a kind are not alike."""
        known: dict[object, Found] = {}
        found = []
        apart = bool(self.config.frozen)
        for rank in range(self.config.parallel.pp):
            kinds = sorted(self._kinds(stage) for stage in self.config.placement.stages_on(rank))
            key = rank if apart else tuple(kinds)
            if key not in known:
                known[key] = of(rank)
            found.append(known[key])
        return found

    def gpu_hours(self, kernels: str) -> float:
        """Hours of all devices over the whole recipe, its ramp included, evaluations and checkpoints not."""
        sizes = [(self._count(num_sequences), num_steps) for num_sequences, num_steps in self.config.recipe().batches()]
        known: dict[str, list[int]] = {}
        for num, _ in sizes:
            known.setdefault(self.config.schedule(num).name, []).append(num)
        step_s: dict[int, float] = {}
        for numbers in known.values():
            # A longer step repeats the middle of a schedule: its length is linear in the number of micro-batches.
            low, high = min(numbers), max(numbers)
            ends = [self._length_s(kernels, num) for num in (low, high)]
            for num in numbers:
                share = (num - low) / max(1, high - low)
                step_s[num] = ends[0] + share * (ends[1] - ends[0])
        total_s = sum(step_s[num] * num_steps for num, num_steps in sizes)
        return total_s * self.config.parallel.world_size / 3600

    def _count(self, num_sequences: int) -> int:
        """Micro-batches of one pipeline in a step of so many sequences."""
        return num_sequences // self.config.parallel.dp // self.config.train.micro_batch_size

    def _length_s(self, kernels: str, num_micro_batches: int) -> float:
        step = self.step(kernels)
        if num_micro_batches == self.num_micro_batches:
            return step.step_s
        schedule = self.config.schedule(num_micro_batches)
        return simulate(schedule, step.costs).step + step.rest_of_step_s + step.rest_s

    # --- figures

    def tokens_per_s_per_gpu(self, kernels: str) -> float:
        """Throughput of the full batch."""
        return self.num_tokens / self.step(kernels).step_s / self.config.parallel.world_size

    def mfu(self, kernels: str, causal: bool = True) -> float:
        """Model FLOPs over bf16's peak, as the published figures have it: a causal mask counts half, or does not."""
        flops = training_flops_per_token(self.config.model, self.config.train.seq_len, causal=causal)
        return self.tokens_per_s_per_gpu(kernels) * flops / self.cluster.compute.peak(PEAK_DTYPE)


def threads_of(config: RunConfig) -> int:
    """With how many threads a rank computes on this machine, as it decides when it starts."""
    fair = environment.fair_threads(config.parallel.world_size)
    return config.run.num_threads or environment.num_threads() or fair


# Utilisation is counted against bf16's peak also where products are FP8 (arXiv 2505.09343, Table 4).
PEAK_DTYPE = "bfloat16"


def _pair(actions: Sequence[Action]) -> tuple[Action, ...]:
    """A pair, or where there is none whatever passes a micro-batch through a stage and back, halfway through a step."""
    pairs = [action for action in actions if isinstance(action, Pair)]
    if pairs:
        return (pairs[len(pairs) // 2],)
    chunks = [action for action in actions if isinstance(action, Chunk)]
    forwards = [chunk for chunk in chunks if chunk.kind == "F"]
    chosen = forwards[len(forwards) // 2]
    return tuple(each for each in chunks if (each.stage, each.micro_batch) == (chosen.stage, chosen.micro_batch))
