"""One layer of each kind, traced once for everything that decides what it does, and kept.

A small job of the same run is assembled: the same sizes and precisions, the same experts over the same ranks and nodes,
one pipeline stage with three layers of each kind. Of those the middle one is taken. What a layer hands to the next one,
its output and the gradient of its input, is freed by that one: in the middle one frees what came and leaves what goes,
so that in any composition everything is counted once.

Where weights are quantised, the first micro-batch makes copies that serve until the weights change: then the second one
is taken, and what the first has more is told apart (`Layers.quantising`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from launch.plan.events import Kernel, LayerPasses, Memory, Turn
from launch.plan.record import Entry, Piece, Recorder, events_of
from launch.plan.routing import Routing
from launch.plan.world import MakeRouting, balanced, placement_of, world
from parallel.mesh import Mesh
from train.config import PipelineConfig, RunConfig
from train.job import Job
from train.model.loss import LossTerms

# The kind of what all layers of a stage share.
SHARED = "stage"
# Layers of a kind in the small job: one with a neighbour of its kind on either side.
_NUM_LAYERS = 3


@dataclass(frozen=True)
class Layers:
    """The layers of one run.

    Attributes:
        passes: `stage` (what all layers of a stage share, forward alone), `embedding`, `dense`, `moe`, `head` (the last
            norm and the loss) and `mtp` (all prediction depths together), as far as the model has them.
        quantising: of each kind, what the device does once per step, when weights have changed: copies of them in
            another format. Nothing where weights are multiplied as they are.
        quantised_bytes: of each kind, memory of those copies, on a rank.
    """

    passes: dict[str, LayerPasses]
    quantising: dict[str, tuple[Kernel, ...]]
    quantised_bytes: dict[str, int]


# What was traced, by what decides it, as text: `Layers` here, an optimizer's events in `job.Plan`.
Kept = MutableMapping[str, Any]


def layers_of(
    config: RunConfig, kernels: str = "cuda", make_routing: MakeRouting = balanced, kept: Kept | None = None
) -> Layers:
    """The layers of a run on a device of this kind, "cuda" or "cpu".

    make_routing: what experts get. kept: layers by what decides them; what is not there is traced, and kept there.
    """
    small = small_job(config)
    routing = make_routing(small, placement_of(small, Mesh(small.parallel, 0)))
    key = _key(small, kernels, routing)
    found: Layers | None = None if kept is None else kept.get(key)
    if found is None:
        found = _trace(small, kernels, make_routing)
        if kept is not None:
            kept[key] = found
    return found


def small_job(config: RunConfig) -> RunConfig:
    """A run over one pipeline stage and one group of experts, with three layers of each kind that the model has."""
    model, mesh = config.model, config.parallel
    num_dense = _NUM_LAYERS if model.first_k_dense_replace else 0
    num_moe = _NUM_LAYERS if model.num_moe_layers else 0
    return replace(
        config,
        model=replace(model, num_hidden_layers=num_dense + num_moe, first_k_dense_replace=num_dense),
        parallel=replace(mesh, pp=1, dp=mesh.ep, nodes=mesh.nodes_per_ep_group),
        pipeline=PipelineConfig(),
        optimizer=replace(config.optimizer, ema_decay=0.0),
        train=replace(config.train, freeze=[]),
    )


def _key(small: RunConfig, kernels: str, routing: Routing | None) -> str:
    mesh = small.parallel
    places = mesh.dispatch, mesh.ep, mesh.nodes
    batch = small.train.micro_batch_size, small.train.seq_len, small.data.document_mask
    attention = small.run.attention_kernel, small.run.deterministic
    how = small.precision, small.recompute, small.run.kernels, attention, kernels
    return repr((small.model, places, batch, how, routing))


def _trace(small: RunConfig, kernels: str, make_routing: MakeRouting) -> Layers:
    recorder = Recorder()
    with world(small, 0, kernels, make_routing, recorder) as job:
        (stage,) = job.stages.values()
        stage.begin(lambda _: job.train_rows.rows(0, small.train.micro_batch_size), LossTerms(1.0, 1.0, 1.0))
        first = _micro_batch(job, recorder, 0) if small.precision.name == "fp8" else None
        again = _micro_batch(job, recorder, 1)
    numbers = _numbers(again.forward)
    return Layers(
        passes={kind: again.layer(chosen) for kind, chosen in numbers.items()},
        quantising={kind: _once(first, again, chosen) for kind, chosen in numbers.items()},
        quantised_bytes={
            kind: first.left_bytes(chosen) - again.left_bytes(chosen) if first else 0
            for kind, chosen in numbers.items()
        },
    )


def _once(first: _Written | None, again: _Written, numbers: Collection[int]) -> tuple[Kernel, ...]:
    """The operations of a layer that the first micro-batch has and the next one does not."""
    return tuple((first.kernels(numbers) - again.kernels(numbers)).elements()) if first else ()


@dataclass(frozen=True)
class _Written:
    """The three passes of a micro-batch, as they were written down."""

    forward: list[Entry]
    backward: list[Entry]
    weights: list[Entry]

    def layer(self, numbers: Collection[int]) -> LayerPasses:
        """Those of one layer, which may be several in a row."""
        forward, backward, weights = (_of(entries, numbers) for entries in (self.forward, self.backward, self.weights))
        # A backward may do nothing itself, and only leave a weight gradient.
        first = min((entry.piece.turn for entry in [*backward, *weights]), default=0)
        num_turns = sum(isinstance(entry.event, Turn) for entry in backward)
        left = [[entry for entry in weights if entry.piece.turn == first + turn] for turn in range(num_turns + 1)]
        assert sum(map(len, left)) == len(weights), "a weight gradient was left outside of its layer's backward"
        return LayerPasses(events_of(forward), events_of(backward), tuple(events_of(each) for each in left))

    def kernels(self, numbers: Collection[int]) -> Counter[Kernel]:
        """The operations of a layer."""
        return Counter(entry.event for entry in self._all(numbers) if isinstance(entry.event, Kernel))

    def left_bytes(self, numbers: Collection[int]) -> int:
        """Memory that a layer has taken and not given back."""
        return sum(entry.event.num_bytes for entry in self._all(numbers) if isinstance(entry.event, Memory))

    def _all(self, numbers: Collection[int]) -> list[Entry]:
        return _of([*self.forward, *self.backward, *self.weights], numbers)


def _of(entries: Sequence[Entry], numbers: Collection[int]) -> list[Entry]:
    return [entry for entry in entries if _at_home(entry).name.number in numbers]


def _at_home(entry: Entry) -> Piece:
    """The piece that an event counts for: what all layers of a stage share is given back by none of them."""
    taken = entry.taken
    return entry.piece if taken is None or taken.name.layer != SHARED else entry.piece._replace(name=taken.name)


def _numbers(forward: Sequence[Entry]) -> dict[str, list[int]]:
    """The layers to take of each kind, by their numbers: the middle one of those that are several."""
    found: dict[str, list[int]] = {}
    for name in dict.fromkeys(entry.piece.name for entry in forward):
        numbers = found.setdefault(name.layer, [])
        if name.number not in numbers:
            numbers.append(name.number)
    return {kind: numbers[1:2] if kind in ("dense", "moe") else numbers for kind, numbers in found.items()}


def _micro_batch(job: Job, recorder: Recorder, number: int) -> _Written:
    """One micro-batch through the only stage of a job and back, and its weight gradients after that."""
    (stage,) = job.stages.values()
    borders = [recorder.num_entries]
    with recorder.on():
        recorder.drive(stage.forward(number, None))
        borders.append(recorder.num_entries)
        recorder.drive(stage.backward(number, None))
        borders.append(recorder.num_entries)
        stage.weight_gradients(number)
        stage.findings.clear()
        borders.append(recorder.num_entries)
    return _Written(*(recorder.entries(*pair) for pair in pairwise(borders)))
