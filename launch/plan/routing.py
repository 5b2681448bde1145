"""What experts get, in a run without values: how many rows each rank is to expect, and the border that says so.

A token chooses K of E experts out of `topk_group` of `n_group` groups. What a fake run needs are four numbers of each
set of experts, those of a rank and those of a node: how many of T tokens choose it (copies, one for each token that
chooses any of the set), and how often it is chosen (rows, one for each choice).

Model. A token's scores of the experts are independent and alike. Where it may choose from all groups, the chance that
none of its K experts is of a set is hypergeometric. Where it is limited to some, those are strong ones, and hardly any
of them is left out in the end (by V3's sizes a token visits 3.96 of its 4 groups, and 3.63 if groups were chosen
blindly): then the router's own limit is asked about tokens drawn at random, always the same ones. Where experts have
unequal loads, a set that is chosen c times as often as with even ones is missed with the c-th power of that chance, as
if its choices were independent. All ranks are taken to send alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Any, TypeVar

import torch
from torch import Tensor

from launch.plan.record import Recorder
from parallel.collectives import Steps
from parallel.expert.placement import Placement
from parallel.host import Host, Source
from parallel.torch_names import unset_fake_temporarily
from train.model.config import ModelConfig, given
from train.model.router import TOPK_METHODS, GroupLimit, largest

T = TypeVar("T")

# Tokens that are drawn: a mean over the ranks or nodes of a group is then within a few tenths of a percent.
_NUM_DRAWN = 8192


@dataclass(frozen=True)
class Routing:
    """Rows and copies of one rank's tokens, by place.

    Attributes:
        num_tokens: T, that each rank has.
        placement: where experts are.
        num_groups, num_kept, num_chosen: n_group, topk_group, K.
        method: `model.topk_method`, which says what makes a group strong.
        loads: how often each expert is chosen, over the mean: [E] numbers whose mean is 1.
    """

    num_tokens: int
    placement: Placement
    num_groups: int
    num_kept: int
    num_chosen: int
    method: str
    loads: tuple[float, ...]

    @classmethod
    def balanced(cls, model: ModelConfig, placement: Placement, num_tokens: int) -> Routing:
        """Every expert gets the same."""
        even = (1.0,) * placement.num_experts
        groups = given(model.n_group), given(model.topk_group), given(model.num_experts_per_tok)
        return cls(num_tokens, placement, *groups, model.topk_method, even)

    @classmethod
    def as_drawn(cls, model: ModelConfig, placement: Placement, num_tokens: int) -> Routing:
        """Every expert gets the same in the mean, and in a micro-batch what chance makes of it.

        Counts that are drawn lie as far apart as the square root of their mean. The experts get as many as such counts
        have in their order, one above the mean beside one as far below it, so that ranks get alike.
        """
        even = cls.balanced(model, placement, num_tokens)
        num_experts = placement.num_experts
        apart = (num_experts / max(num_tokens * even.num_chosen, 1)) ** 0.5
        half = [NormalDist().inv_cdf((rank + 0.5) / num_experts) for rank in range(num_experts // 2)]
        loads = [1 + sign * apart * far for far in half for sign in (1, -1)] + [1.0] * (num_experts % 2)
        low = [max(load, 0.0) for load in loads]
        return replace(even, loads=tuple(load * num_experts / sum(low) for load in low))

    @classmethod
    def with_max_vio(
        cls, model: ModelConfig, placement: Placement, num_tokens: int, max_vio: float, shown: str = "busiest"
    ) -> Routing:
        """The fullest expert of a router gets (1 + max_vio) times the mean, and the fullest rank what it is to be
        expected to get then: `fullest_rank`. Its experts get that each, the others share the rest evenly.

        shown: whether this rank is that one (`busiest`), or one of the `mean` load, when all are even.
        Raises ValueError for a MaxVio that the number of ranks does not allow, or another word.
        """
        even = cls.balanced(model, placement, num_tokens)
        if shown not in ("busiest", "mean"):
            raise ValueError(f"the rank shown is {shown!r}, which is not one of busiest, mean")
        own, num_experts = placement.num_local_experts, placement.num_experts
        if not 0 <= max_vio <= num_experts / own - 1:
            raise ValueError(
                f"max_vio={max_vio} is not from 0 to {num_experts / own - 1:g}, where one rank of {placement.ep} has "
                "every token"
            )
        if shown == "mean" or own == num_experts:
            return even
        fullest = 1 + max_vio * fullest_rank(num_experts, own)
        rest = (num_experts - own * fullest) / (num_experts - own)
        first = placement.first_expert
        loads = [fullest if first <= e < first + own else rest for e in range(num_experts)]
        return replace(even, loads=tuple(loads))

    @classmethod
    def of_loads(
        cls,
        model: ModelConfig,
        placement: Placement,
        num_tokens: int,
        loads: Sequence[Sequence[int]],
        shown: str = "busiest",
    ) -> Routing:
        """What a run has counted: loads [routers][E], as `loads.jsonl` has them.

        The ranks of each router are put in the order of what they hold, the rank that is shown first: from the fullest
        on (`busiest`), or from the one nearest to the mean (`mean`). Then the routers' mean is taken, so that it is a
        mean router's fullest rank. Raises ValueError for loads of another number of experts, or empty ones.
        """
        even = cls.balanced(model, placement, num_tokens)
        if not loads or any(len(each) != placement.num_experts or not sum(each) for each in loads):
            raise ValueError(f"loads are not of {placement.num_experts} experts, some of which have tokens")
        ranked = [_ranked(each, placement, shown) for each in loads]
        mean = tuple(sum(column) / len(ranked) for column in zip(*ranked, strict=True))
        return replace(even, loads=mean)

    @cached_property
    def rows(self) -> list[int]:
        """How often a rank's tokens choose each expert: T K in all."""
        exact = [self.num_tokens * self.num_chosen * load / self.placement.num_experts for load in self.loads]
        return _rounded(exact)

    def copies(self, first: int, count: int) -> int:
        """How many of a rank's tokens choose any of the experts `first` to `first + count - 1`."""
        return round(self.num_tokens * self.chance(first, count))

    def chance(self, first: int, count: int) -> float:
        """That a token chooses any of the experts `first` to `first + count - 1`."""
        num_experts = self.placement.num_experts
        if self.num_kept == self.num_groups:
            missed = math.comb(num_experts - count, self.num_chosen) / math.comb(num_experts, self.num_chosen)
        else:
            limit = num_experts, self.num_groups, self.num_kept, self.num_chosen, self.method
            missed = _missed(limit, count)
        if missed <= 0:
            return 1.0
        return 1 - missed ** (sum(self.loads[first : first + count]) / count)

    @property
    def nodes_per_token(self) -> float:
        """How many nodes a token visits on average, its own among them."""
        each = self.placement.experts_per_node
        return sum(self.chance(node * each, each) for node in range(self.placement.num_nodes))

    def answer(self, name: str) -> list[Any]:
        """What the border says when `name` of a dispatch is read. KeyError for another name."""
        # Chances may have to be drawn, with values, while a job without values asks.
        with unset_fake_temporarily():
            return self._answers[name]()

    @property
    def _answers(self) -> dict[str, Callable[[], list[Any]]]:
        return {
            "expert counts": self._expert_counts,
            "hop counts": lambda: [*self._rail_counts(), *self._node_counts()],
        }

    def _expert_counts(self) -> list[Any]:
        place, rows = self.placement, self.rows
        if place.ep == 1:
            return [rows]
        own = place.num_local_experts
        leaving = [rows[rank * own : (rank + 1) * own] for rank in range(place.ep)]
        return [leaving, [leaving[place.ep_rank]] * place.ep]

    def _rail_counts(self) -> list[Any]:
        place = self.placement
        leaving = [
            self.copies(node * place.experts_per_node, place.experts_per_node) for node in range(place.num_nodes)
        ]
        return [leaving, [leaving[place.node]] * place.num_nodes]

    def _node_counts(self) -> list[Any]:
        """Counts of the rows that have come over the rail, from as many ranks as there are nodes."""
        place, own = self.placement, self.placement.num_local_experts
        first = place.node * place.experts_per_node
        leaving = []
        for rank in range(place.ranks_per_node):
            start = first + rank * own
            by_expert = [place.num_nodes * count for count in self.rows[start : start + own]]
            leaving.append([self.copies(start, own)] * place.num_nodes + by_expert)
        return [leaving, [leaving[place.ep_rank % place.ranks_per_node]] * place.ranks_per_node]


def fullest_rank(num_experts: int, num_local: int) -> float:
    """How far the fullest rank's load is to be expected above the mean, over how far the fullest expert's is.

    For loads that lie around their mean as normal numbers do, and experts that lie on ranks without regard to them: a
    mean of `num_local` of them strays less than one by the root of their number, and is the largest of fewer. The
    expected largest of n normal numbers is Blom's (Statistical Estimates and Transformed Beta-Variables, 1958).
    """

    def largest_of(count: int) -> float:
        return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))

    return largest_of(num_experts // num_local) / (largest_of(num_experts) * num_local**0.5)


def _rounded(exact: Sequence[float]) -> list[int]:
    """Whole numbers whose sums from the first on are the nearest to those of the exact ones."""
    found, end, before = [], 0.0, 0
    for number in exact:
        end += number
        found.append(round(end) - before)
        before = round(end)
    return found


def _ranked(loads: Sequence[int], placement: Placement, shown: str) -> list[float]:
    """Loads over their mean, ranks in the order of their sums, and the first of them where this rank is."""
    own, mean = placement.num_local_experts, sum(loads) / len(loads)
    ranks = [loads[start : start + own] for start in range(0, len(loads), own)]
    if shown == "busiest":
        ranks.sort(key=sum, reverse=True)
    elif shown == "mean":
        ranks.sort(key=lambda each: abs(sum(each) - own * mean))
    else:
        raise ValueError(f"the rank shown is {shown!r}, which is not one of busiest, mean")
    others = ranks[1:]
    others.insert(placement.ep_rank, ranks[0])
    return [load / mean for each in others for load in each]


@lru_cache(maxsize=64)
def _missed(limit: tuple[int, int, int, int, str], count: int) -> float:
    """The chance that a token chooses none of `count` experts that lie together, in the mean of all places of those.

    limit: experts, groups, kept groups, chosen experts, and what makes a group strong.
    """
    chosen = _drawn(limit)
    places = limit[0] // count
    visited = torch.zeros(len(chosen), places, dtype=torch.bool).scatter_(
        1, (chosen // count).clamp(max=places - 1), True
    )
    return 1 - visited.double().mean().item()


@lru_cache(maxsize=8)
def _drawn(limit: tuple[int, int, int, int, str]) -> Tensor:
    """The experts [tokens, K] of tokens whose scores are drawn at random."""
    num_experts, num_groups, num_kept, num_chosen, method = limit
    scores = torch.rand(_NUM_DRAWN, num_experts, generator=torch.Generator().manual_seed(0))
    return largest(GroupLimit(num_groups, num_kept, TOPK_METHODS[method][1])(scores), num_chosen)


class RoutedHost(Host):
    """The border of a rank without values: answers by a routing what a dispatch asks, and with ones what else a step
    reads. A recorder hears of both ends of a read."""

    def __init__(self, routing: Routing | None, runs_ahead: bool, recorder: Recorder) -> None:
        """routing: None for a model without experts. runs_ahead: as for `Host`."""
        super().__init__()
        self.runs_ahead = runs_ahead
        self._routing, self._recorder = routing, recorder

    def look(self, number: Any) -> float:
        return 1.0

    def beside(self, way: str, trip: Steps[T], takes: Sequence[Any]) -> Steps[T]:
        return self._recorder.beside(way, trip) if self.runs_ahead else trip

    def _start(self, source: Source) -> Any:
        raise NotImplementedError("reads of this border go by their names")

    def start(self, name: str, source: Source) -> Any:
        self.num_reads[name] += 1
        reading = _Reading(name, source, self._recorder, self._answer)
        if self.runs_ahead:
            reading.set_out()
        return reading

    def _answer(self, name: str, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
        if not name.endswith("counts"):
            return [_ones(shape) for shape in shapes]
        assert self._routing is not None
        answer = self._routing.answer(name)
        asked, got = list(shapes), [_shape(numbers) for numbers in answer]
        assert asked == got, f"{name} are asked for in the shapes {asked}, and the routing has {got}"
        return answer


class _Reading:
    """Numbers that are set out when asked for, where host and device are one."""

    def __init__(self, name: str, source: Source, recorder: Recorder, answer: Callable[..., list[Any]]) -> None:
        self._name, self._source, self._recorder, self._answer = name, source, recorder, answer
        self._found: tuple[int, list[tuple[int, ...]]] | None = None

    def set_out(self) -> None:
        self._found = self._recorder.read(self._source)

    def wait(self) -> list[Any]:
        if self._found is None:
            self.set_out()
        assert self._found is not None
        number, shapes = self._found
        self._recorder.answer(number)
        return self._answer(self._name, shapes)


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _shape(numbers: Any) -> tuple[int, ...]:
    return (len(numbers), *_shape(numbers[0])) if isinstance(numbers, list) else ()
