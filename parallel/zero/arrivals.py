"""New weights on their way: every replica's shard to all of them, beside whatever needs none of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from parallel.collectives import all_gather
from parallel.shards import FlatLayout
from parallel.watch import Need, Watch, Watched
from parallel.zero.sets import ParamSet


class Arrivals:
    """The gathers of a rank's sets. `arrive` stands before the first use of a set's weights, and before they change."""

    def __init__(
        self, sets: Sequence[ParamSet], layouts: Sequence[FlatLayout], weights: Sequence[Tensor], watch: Watch
    ) -> None:
        """weights: of each set, whole and flat; this rank's shard of it is what it sends."""
        self._sets, self._layouts, self._weights, self._watch = sets, layouts, weights, watch
        self._coming: dict[int, Watched[Tensor]] = {}

    def send(self, numbers: Iterable[int]) -> None:
        """Start the gathers of these sets, in one order on all replicas."""
        for index in numbers:
            each, layout, whole = self._sets[index], self._layouts[index], self._weights[index]
            if each.group is not None and each.num_shards > 1:
                weights, shard = (
                    Need("optimizer", "the weights from {peers}", each.group),
                    layout.shard_slice(each.shard),
                )
                gather = partial(all_gather, whole[shard], each.group, whole, layout.shard_numels)
                self._coming[index] = self._watch.launch(weights, gather)

    def arrive(self, index: int) -> None:
        """The weights of set number `index` are whole from here on."""
        if index in self._coming:
            self._coming.pop(index).wait()

    def settle(self) -> None:
        """All weights are whole from here on."""
        for index in list(self._coming):
            self.arrive(index)
