"""Inner optimizers that look at whole matrices, beside AdamW for the rest: one process's numbers on every topology."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.shards import ParamInfo, lay_out, lay_out_whole, segments
from parallel.zero import native
from parallel.zero.optimizer import ZeroOptimizer, build
from parallel.zero.sets import ReplicaGroups
from tests.parallel.zero_world import (
    NUM_SOURCES,
    SPECS,
    Case,
    Local,
    Outcome,
    distance,
    gradient,
    initial,
    learning_rate,
    make_groups,
    whole_state,
)
from tests.spawn import Ranks

STEPS = 6
# Matrices of the world that an update by whole matrices is for. The first stack has one for each of its three.
BY_MATRIX = {"w": (11, 5), "experts.up": (3, 7), "experts.down": (5, 3), "gate": (4, 7)}


class Normalised(torch.optim.Optimizer):
    """Momentum, each matrix of it divided by its own norm: an update that no part of a matrix can make by itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for master, found in zip(group["params"], group["matrices"], strict=True):
                momentum = self.state[master].setdefault("momentum", torch.zeros_like(master))
                momentum.mul_(0.9).add_(master.grad)
                master.mul_(1 - group["lr"] * group["weight_decay"])
                for start, rows, columns in found:
                    part = slice(start, start + rows * columns)
                    master[part] -= group["lr"] * momentum[part] / (momentum[part].norm() + 1e-30)


@dataclass(frozen=True)
class ByMatrix:
    name = "normalised"
    state_names = ("momentum",)
    whole_matrices = True

    def make(self, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Normalised(param_groups, {"lr": 0.0})

    def set_num_updates(self, state: dict[str, Any], num_updates: int) -> None:
        pass

    def cost(self, rows: int, columns: int) -> float:
        return float(rows * columns * min(rows, columns))


def make(case: Case, local: Local, groups: ReplicaGroups) -> ZeroOptimizer:
    """The world of zero_world, its matrices under `ByMatrix`; no clipping, so that both references are plain."""
    params = []
    for info, param, inner, weight_decay in local.listed():
        if info.name in BY_MATRIX:
            info, inner = replace(info, matrix=BY_MATRIX[info.name]), ByMatrix()
        params.append((info, param, inner, weight_decay))
    return build(case.engine, params, groups, clip_grad_norm=0.0)


@contextmanager
def cut_anywhere() -> Iterator[None]:
    """Shards of equal size, and what each holds of a matrix taken for a matrix: the fault that tests must see."""

    def parts(each: Any, layout: Any) -> list[tuple[int, int, int]]:
        return [(part.in_shard, 1, part.numel) for part in segments(layout, each.shard)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "layout_of", lambda each, num_shards: lay_out(each.numels, num_shards))
        patch.setattr(native, "matrices", parts)
        yield


def run_case(case: Case, spoil: Callable[[], Any] | None = None) -> Outcome:
    local, results = Local(case, dist.get_rank()), []
    with spoil() if spoil else pytest.MonkeyPatch.context():
        optimizer = make(case, local, make_groups(case.dp, case.ep))
    if case.loaded is not None:
        for key, pieces in optimizer.state().items():
            for piece in pieces:
                whole = case.loaded[key].reshape(-1)
                piece.tensor.copy_(whole[piece.offset : piece.offset + piece.tensor.numel()])
        optimizer.load_finished(case.first_step)
    for step in range(case.first_step, case.last_step):
        optimizer.zero_grad()
        local.backward(step)
        results.append(optimizer.step(learning_rate(step)))
        optimizer.settle()
    params = {name: param.detach().clone() for name, param in local.params.items()}
    return Outcome(results, optimizer.state(), params, optimizer.num_steps)


def reference() -> dict[str, Tensor]:
    """Masters and momenta of whole parameters in one process, fp64, matrix by matrix."""
    masters = {name: nn.Parameter(initial(name, torch.float64)) for name in SPECS}
    momenta = {name: torch.zeros_like(masters[name]) for name in BY_MATRIX}
    rest = [
        {"params": [p for n, p in masters.items() if n not in BY_MATRIX and SPECS[n].decay == decay]}
        | {"weight_decay": 0.1 * decay}
        for decay in (True, False)
    ]
    adamw = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        lr = learning_rate(step)
        for name, master in masters.items():
            master.grad = sum(gradient(name, step, source, torch.float64) for source in range(NUM_SOURCES))
        for name, shape in BY_MATRIX.items():
            momenta[name].mul_(0.9).add_(masters[name].grad)
            with torch.no_grad():
                masters[name].mul_(1 - lr * 0.1 * SPECS[name].decay)
                for matrix, momentum in zip(
                    masters[name].view(-1, *shape), momenta[name].view(-1, *shape), strict=True
                ):
                    matrix -= lr * momentum / momentum.norm()
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
    found = {f"master.{name}": master.detach() for name, master in masters.items()}
    found |= {f"momentum.{name}": momentum for name, momentum in momenta.items()}
    for key in ("exp_avg", "exp_avg_sq"):
        found |= {f"{key}.{n}": adamw.state[p][key] for n, p in masters.items() if n not in BY_MATRIX}
    return found


SIZES = [(4, 1), (4, 2), (3, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_updates_by_whole_matrices_equal_one_process(ranks: Ranks, sizes: tuple[int, int]) -> None:
    case = Case(*sizes, dtype=torch.float64, last_step=STEPS)
    outcomes = ranks.run(run_case, case, world_size=case.dp)
    assert distance(whole_state(outcomes), reference()) < 1e-12
    for rank, outcome in enumerate(outcomes):
        local = Local(case, rank)
        for name, param in outcome.params.items():
            assert torch.equal(param, local.part(name, whole_state(outcomes)[f"master.{name}"]))


def test_a_shard_taken_for_a_matrix_is_seen(ranks: Ranks) -> None:
    case = Case(4, 2, dtype=torch.float64, last_step=STEPS)
    outcomes = ranks.run(run_case, case, cut_anywhere, world_size=case.dp)
    assert distance(whole_state(outcomes), reference()) > 1e-4


def test_state_continues_under_another_topology(ranks: Ranks) -> None:
    first = ranks.run(run_case, Case(4, 2, dtype=torch.float64, last_step=3), world_size=4)
    case = Case(3, 1, dtype=torch.float64, first_step=3, last_step=STEPS, loaded=whole_state(first))
    assert distance(whole_state(ranks.run(run_case, case, world_size=3)), reference()) < 1e-12


def test_deepspeed_refuses_it() -> None:
    local = Local(Case(1, 1, "deepspeed"), 0)
    with pytest.raises(ValueError, match=r"zero\.engine=deepspeed .*cannot hold .*normalised.*use zero\.engine=native"):
        make(local.case, local, ReplicaGroups())


@pytest.mark.parametrize("seed", range(20))
def test_shards_of_whole_matrices_are_whole_and_the_dearest_is_as_cheap_as_can_be(seed: int) -> None:
    """Against every way to cut the row of matrices into as many runs, by dynamic programming."""
    draw = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(1, n, (), generator=draw))

    counts = [below(5) for _ in range(below(8))]
    sizes, costs, num_shards = [below(20) for _ in counts], [float(below(30)) for _ in counts], below(7)
    numels = [count * size for count, size in zip(counts, sizes, strict=True)]
    layout = lay_out_whole(numels, counts, costs, num_shards, align=below(5))
    assert len(layout.bounds) == num_shards + 1 and layout.bounds == tuple(sorted(layout.bounds))
    held, loads = [0] * len(numels), []
    for shard in range(num_shards):
        found = segments(layout, shard)
        for part in found:
            assert part.in_tensor % sizes[part.index] == 0 and part.numel % sizes[part.index] == 0
            held[part.index] += part.numel
        loads.append(sum(part.numel // sizes[part.index] * costs[part.index] for part in found))
    assert held == numels
    row = [cost for count, cost in zip(counts, costs, strict=True) for _ in range(count)]
    best = [0.0] + [float("inf")] * len(row)
    for _ in range(num_shards):
        best = [min(max(best[i], sum(row[i:j])) for i in range(j + 1)) for j in range(len(row) + 1)]
    assert max(loads) == best[-1]


def test_a_parameter_that_is_no_matrix_is_not_given_to_it() -> None:
    vector = (ParamInfo("scale", (3,)), nn.Parameter(torch.ones(3)), ByMatrix(), 0.0)
    with pytest.raises(AssertionError, match="normalised updates matrices, and was given a vector"):
        build("native", [vector], ReplicaGroups())
