"""A small world for the sharded optimizer: parameters of odd sizes, gradients as a pure function, plain references."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import Handle, all_gather, reduce_scatter
from parallel.everyone import Everyone
from parallel.shards import ParamInfo, Piece, stacked_experts
from parallel.zero import optimizer as zero_optimizer
from parallel.zero.inner import InnerOptimizer
from parallel.zero.optimizer import StepResult, ZeroOptimizer, build
from parallel.zero.sets import ReplicaGroups
from train.recipe.adamw import AdamW
from train.recipe.optimizer import OptimizerConfig

NUM_EXPERTS = 4
NUM_SOURCES = 4  # what a gradient is summed over; spread over the ranks
CLIP = 2.0


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    decay: bool
    expert: bool = False


# No size is a multiple of anything; the vectors of the first set have fewer elements than there are ranks.
SPECS = {
    "embed": Spec((13, 7), True),
    "scale": Spec((1,), False),
    "bias": Spec((2,), False),
    "gate": Spec((NUM_EXPERTS, 7), True),
    "w": Spec((3, 11, 5), True),
    "experts.up": Spec((NUM_EXPERTS, 3, 7), True, expert=True),
    "experts.down": Spec((NUM_EXPERTS, 5, 3), True, expert=True),
    "experts.bias": Spec((NUM_EXPERTS, 1), False, expert=True),
}


@dataclass(frozen=True)
class Case:
    """One job: sizes, engine, precision; `fault` is what is broken on purpose."""

    dp: int
    ep: int
    engine: str = "native"
    dtype: torch.dtype = torch.float32
    moments_dtype: str = "fp32"
    first_step: int = 0
    last_step: int = 20
    fault: str = ""
    poison: tuple[int, int, str, float] | None = None  # step, rank, parameter, value
    loaded: dict[str, Tensor] | None = field(default=None, compare=False)

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def initial(name: str, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(SPECS[name].shape, generator=draw, dtype=torch.float64).to(dtype)


def gradient(name: str, step: int, source: int, dtype: torch.dtype) -> Tensor:
    """Contribution of one source. Its size swings with the step, so that some steps are clipped and others not."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * source + 100_003 * sum(map(ord, name)))
    size = 0.5 * math.exp(2.5 * math.sin(step))
    return (torch.randn(SPECS[name].shape, generator=draw, dtype=torch.float64) * size / 10).to(dtype)


def learning_rate(step: int) -> float:
    return 1e-2 * (1 + math.cos(step / 7)) / 2


def reference(dtype: torch.dtype, steps: list[int]) -> tuple[dict[str, Tensor], list[float]]:
    """torch's AdamW and clipping on whole parameters in one process: state (keyed as `ZeroOptimizer.state`), norms."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = {name: nn.Parameter(initial(name, dtype).to(wide)) for name in SPECS}
    groups = [
        {"params": [params[name] for name in SPECS if SPECS[name].decay == decay], "weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    optimizer, norms = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8), []
    for step in steps:
        for name, param in params.items():
            param.grad = sum(gradient(name, step, source, wide) for source in range(NUM_SOURCES))
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    state = {f"master.{name}": param.detach() for name, param in params.items()}
    for key in ("exp_avg", "exp_avg_sq"):
        state |= {f"{key}.{name}": optimizer.state[param][key] for name, param in params.items()}
    return state, norms


def make_groups(dp: int, ep: int) -> ReplicaGroups:
    """Groups of a world of `dp` ranks with experts spread over each run of `ep` consecutive ranks."""
    rank = dist.get_rank()

    def own(groups: list[list[int]]) -> dist.ProcessGroup:
        made = [(ranks, dist.new_group(ranks)) for ranks in groups]
        return next(group for ranks, group in made if rank in ranks)

    everyone = own([list(range(dp))])
    return ReplicaGroups(
        dense=everyone, expert=own([list(range(i, dp, ep)) for i in range(ep)]), world=Everyone.of(everyone)
    )


@dataclass
class Local:
    """This rank's parameters, and what of the global gradient it computes."""

    case: Case
    rank: int

    def __post_init__(self) -> None:
        self.num_local = NUM_EXPERTS // self.case.ep
        self.first_expert = self.rank % self.case.ep * self.num_local
        self.params = {name: nn.Parameter(self.part(name, initial(name, self.case.dtype)).clone()) for name in SPECS}

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole[self.first_expert :][: self.num_local] if SPECS[name].expert else whole

    def listed(self) -> list[tuple[ParamInfo, nn.Parameter, InnerOptimizer, float]]:
        infos = {
            name: stacked_experts(name, param.shape, NUM_EXPERTS, self.first_expert)
            if SPECS[name].expert
            else ParamInfo(name, tuple(param.shape))
            for name, param in self.params.items()
        }
        inner = AdamW(OptimizerConfig(moments_dtype=self.case.moments_dtype))
        return [(infos[name], param, inner, 0.1 * SPECS[name].decay) for name, param in self.params.items()]

    def backward(self, step: int) -> None:
        """Add this rank's share to `main_grad`: own sources if dense, those of the whole expert group for experts."""
        for name, param in self.params.items():
            for source in range(NUM_SOURCES):
                home = source % self.case.dp
                expert_group = self.rank // self.case.ep
                if home == self.rank or (SPECS[name].expert and home // self.case.ep == expert_group):
                    param.main_grad += self.part(name, gradient(name, step, source, self.case.wide))
            if self.case.poison and self.case.poison[:3] == (step, self.rank, name):
                param.main_grad.view(-1)[-1] = self.case.poison[3]


FAULTS = ("experts reduced over the dense group", "ep left out of the norm", "gradients averaged", "norm of own shards")


@contextlib.contextmanager
def broken(groups: ReplicaGroups, fault: str) -> Iterator[ReplicaGroups]:
    """The groups to build with; inside, the named fault is in force."""

    def reduce_wrongly(flat: Tensor, group: dist.ProcessGroup, numels: Sequence[int]) -> Handle:
        if fault == "gradients averaged":
            return reduce_scatter(flat / dist.get_world_size(group), group)
        everyone = groups.dense if group is groups.expert else group
        total = all_gather(flat.unsqueeze(0), everyone).wait().sum(0)
        return Handle([], (), lambda: total.view(dist.get_world_size(group), -1)[dist.get_rank(group)])

    with pytest.MonkeyPatch.context() as patch:
        if fault in ("experts reduced over the dense group", "gradients averaged"):
            patch.setattr(zero_optimizer, "reduce_scatter", reduce_wrongly)
        if fault == "norm of own shards":
            patch.setattr(Everyone, "all_gather", lambda _everyone, value, *_: value)
        yield replace(groups, world=Everyone.of(groups.expert)) if fault == "ep left out of the norm" else groups


def make(case: Case, local: Local, groups: ReplicaGroups) -> ZeroOptimizer:
    return build(case.engine, local.listed(), groups, clip_grad_norm=CLIP)


def load(optimizer: ZeroOptimizer, whole: dict[str, Tensor], num_steps: int) -> None:
    """Write the ranges that the optimizer names from whole tensors."""
    for key, pieces in optimizer.state().items():
        for piece in pieces:
            piece.tensor.copy_(whole[key].reshape(-1)[piece.offset : piece.offset + piece.tensor.numel()])
    optimizer.load_finished(num_steps)


@dataclass
class Outcome:
    results: list[StepResult]
    state: dict[str, list[Piece]]
    params: dict[str, Tensor]
    num_steps: int


def run_case(case: Case) -> Outcome:
    """On each rank: the steps of the case."""
    local = Local(case, dist.get_rank())
    results = []
    with broken(make_groups(case.dp, case.ep), case.fault) as groups:
        optimizer = make(case, local, groups)
        if case.loaded is not None:
            load(optimizer, case.loaded, case.first_step)
        for step in range(case.first_step, case.last_step):
            optimizer.zero_grad()
            local.backward(step)
            results.append(optimizer.step(learning_rate(step)))
            optimizer.settle()
    params = {name: param.detach().clone() for name, param in local.params.items()}
    return Outcome(results, optimizer.state(), params, optimizer.num_steps)


def run_cases(cases: list[Case]) -> list[Outcome]:
    return [run_case(case) for case in cases]


def whole_state(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """Global tensors from the pieces of all ranks; every element must be there exactly once."""
    parts: dict[str, list[Piece]] = {}
    for outcome in outcomes:
        for key, pieces in outcome.state.items():
            parts.setdefault(key, []).extend(pieces)
    whole = {}
    for key, pieces in parts.items():
        pieces = sorted(pieces, key=lambda piece: piece.offset)
        ends = [piece.offset + piece.tensor.numel() for piece in pieces]
        shape = SPECS[key.split(".", 1)[1]].shape
        assert [piece.offset for piece in pieces] == [0, *ends[:-1]] and ends[-1] == math.prod(shape), key
        whole[key] = torch.cat([piece.tensor for piece in pieces]).view(shape)
    return whole


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor, in norm."""
    assert ours.keys() == theirs.keys()
    return max(((ours[k].double() - theirs[k].double()).norm() / theirs[k].double().norm()).item() for k in theirs)


def check_equal(case: Case, outcomes: list[Outcome], tolerance: float) -> None:
    """State, weights, norms of all ranks against the reference; norms of all ranks against each other, bit for bit."""
    state, norms = reference(case.dtype, list(range(case.last_step)))
    assert distance(whole_state(outcomes), state) < tolerance
    for rank, outcome in enumerate(outcomes):
        assert outcome.results == outcomes[0].results
        assert outcome.num_steps == case.last_step
        local = Local(case, rank)
        for name, param in outcome.params.items():
            # Weights are the masters, rounded: all replicas hold what the owners of the shards hold.
            torch.testing.assert_close(
                param, local.part(name, whole_state(outcomes)[f"master.{name}"]).to(case.dtype), rtol=0, atol=0
            )
    ours = torch.tensor([result.grad_norm for result in outcomes[0].results], dtype=torch.float64)
    torch.testing.assert_close(
        ours, torch.tensor(norms, dtype=torch.float64)[case.first_step :], rtol=tolerance, atol=0
    )
