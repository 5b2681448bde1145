"""Both engines against torch's AdamW on whole parameters, over topologies; faults that the comparison must see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.shards import ParamInfo
from parallel.zero.optimizer import StepResult, build
from parallel.zero.sets import ReplicaGroups
from tests.parallel.zero_world import (
    CLIP,
    FAULTS,
    Case,
    Local,
    Outcome,
    check_equal,
    distance,
    make,
    reference,
    run_cases,
    whole_state,
)
from tests.spawn import Ranks
from train.recipe.adamw import AdamW
from train.recipe.optimizer import OptimizerConfig

# fp32: 20 steps of rounding in sums, norm and moments; fp64 the same with 53 bits.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float64: 1e-12}
CASES = [
    Case(dp, ep, engine, dtype)
    for dp, ep in [(4, 1), (4, 2), (4, 4), (3, 1), (2, 1), (2, 2), (1, 1)]
    for engine in ("native", "deepspeed")
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if (engine, dtype) != ("deepspeed", torch.float64)
]


def run(ranks: Ranks, cases: list[Case]) -> list[list[Outcome]]:
    """Outcomes by case, then by rank. All cases must have one size."""
    by_rank = ranks.run(run_cases, cases, world_size=cases[0].dp)
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]


def test_the_reference_clips_some_steps_and_not_others() -> None:
    _, norms = reference(torch.float32, list(range(20)))
    assert 5 < sum(norm > CLIP for norm in norms) < 15


@pytest.mark.parametrize("sizes", sorted({(case.dp, case.ep) for case in CASES}), ids=str)
def test_engines_equal_adamw_on_whole_parameters(ranks: Ranks, sizes: tuple[int, int]) -> None:
    cases = [case for case in CASES if (case.dp, case.ep) == sizes]
    for case, outcomes in zip(cases, run(ranks, cases), strict=True):
        check_equal(case, outcomes, TOLERANCE[case.dtype])


def test_engines_agree_on_bf16_moments(ranks: Ranks) -> None:
    cases = [Case(4, 2, engine, moments_dtype="bf16") for engine in ("native", "deepspeed")]
    native, deepspeed = run(ranks, cases)
    assert {piece.tensor.dtype for pieces in native[0].state.values() for piece in pieces} == {
        torch.float32,
        torch.bfloat16,
    }
    # A difference in the last bit of fp32 may round a moment to the other neighbour (2^-8 of it); few elements do.
    assert distance(whole_state(native), whole_state(deepspeed)) < 1e-3
    # Their shards are cut at other places, so the squares are added in another order.
    assert native[0].results[0].grad_norm == pytest.approx(deepspeed[0].results[0].grad_norm, rel=1e-12)
    # Moments of 8 bits leave masters within noise of those with 24.
    assert distance(whole_state(native), reference(torch.float32, list(range(20)))[0]) < 1e-2


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(ranks: Ranks, fault: str) -> None:
    cases = [Case(4, 2, engine, fault=fault) for engine in ("native", "deepspeed")]
    for case, outcomes in zip(cases, run(ranks, cases), strict=True):
        state, norms = reference(case.dtype, list(range(case.last_step)))
        # By numbers, not by an exception on the way: state and norms are far outside of what the comparison allows.
        assert distance(whole_state(outcomes), state) > 1e3 * TOLERANCE[case.dtype]
        assert abs(outcomes[0].results[1].grad_norm / norms[1] - 1) > 1e3 * TOLERANCE[case.dtype]
        with pytest.raises(AssertionError):
            check_equal(case, outcomes, TOLERANCE[case.dtype])


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
@pytest.mark.parametrize("poison", [(6, 1, "embed", float("inf")), (6, 3, "experts.down", float("nan"))], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(
    ranks: Ranks, engine: str, poison: tuple[int, int, str, float]
) -> None:
    clean = Case(4, 2, engine, last_step=6)
    before, after = run(ranks, [clean, replace(clean, last_step=7, poison=poison)])
    for rank in range(4):
        assert [result.finite for result in after[rank].results] == [True] * 6 + [False]
        assert after[rank].num_steps == 6
        assert all(torch.equal(after[rank].params[name], param) for name, param in before[rank].params.items())
        for key, pieces in before[rank].state.items():
            assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(after[rank].state[key], pieces, strict=True))


def test_training_goes_on_after_a_step_that_was_not_taken(ranks: Ranks) -> None:
    case = Case(4, 2, "deepspeed", poison=(6, 2, "bias", float("nan")))
    outcomes, native = run(ranks, [case, replace(case, engine="native")])
    state, _ = reference(torch.float32, [step for step in range(20) if step != 6])
    for each in (outcomes, native):
        assert each[0].num_steps == 19
        assert distance(whole_state(each), state) < TOLERANCE[torch.float32]


def test_squares_beyond_fp32_are_finite(ranks: Ranks) -> None:
    """1e30 squared overflows fp32: the norm must not, and both engines must take the step on all ranks."""
    cases = [Case(4, 2, engine, last_step=1, poison=(0, 1, "embed", 1e30)) for engine in ("native", "deepspeed")]
    for outcomes in run(ranks, cases):
        assert all(outcome.results[0].finite for outcome in outcomes)
        assert outcomes[0].results[0].grad_norm == pytest.approx(1e30)
        assert all(outcome.num_steps == 1 for outcome in outcomes)


@pytest.mark.parametrize(
    ("saved", "continued"),
    [
        (Case(4, 2, "native"), Case(2, 1, "deepspeed")),
        (Case(4, 4, "deepspeed"), Case(4, 1, "native")),
        (Case(2, 2, "deepspeed", torch.bfloat16), Case(4, 2, "native", torch.bfloat16)),
        (Case(3, 1, "native", torch.float64), Case(4, 4, "native", torch.float64)),
        (Case(4, 2, "native"), Case(1, 1, "deepspeed")),
    ],
    ids=lambda case: f"{case.engine}-{case.dp}-{case.ep}",
)
def test_state_continues_under_another_topology_and_engine(ranks: Ranks, saved: Case, continued: Case) -> None:
    [first] = run(ranks, [replace(saved, last_step=7)])
    case = replace(continued, first_step=7, loaded=whole_state(first))
    [second] = run(ranks, [case])
    check_equal(case, second, TOLERANCE[case.dtype])


# --- one process, no process group ---


def test_without_groups_one_process_is_the_world() -> None:
    case = Case(1, 1)
    local = Local(case, 0)
    optimizer = make(case, local, ReplicaGroups())
    optimizer.zero_grad()
    local.backward(0)
    _, norms = reference(torch.float32, [0])
    assert optimizer.step(1e-2).grad_norm == pytest.approx(norms[0], rel=1e-6)


def test_a_world_of_one_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer is the reduced gradient, and fp32 weights are their own masters."""
    case = Case(1, 1)
    local = Local(case, 0)
    optimizer = make(case, local, ReplicaGroups())
    weights = {name: param.untyped_storage().data_ptr() for name, param in local.params.items()}
    masters = {key: pieces[0].tensor.untyped_storage().data_ptr() for key, pieces in optimizer.state().items()}
    assert all(masters[f"master.{name}"] == pointer for name, pointer in weights.items())
    seen: list[int] = []
    update = optimizer._engine.update
    monkeypatch.setattr(
        optimizer._engine, "update", lambda grads: (seen.extend(g.data_ptr() for g in grads), update(grads))
    )
    optimizer.step(1e-3)
    assert seen == [flat.data_ptr() for flat in optimizer._engine.main_grads]


def test_making_the_moments_changes_no_weight() -> None:
    case = Case(1, 1, dtype=torch.bfloat16)
    local = Local(case, 0)
    before = {name: param.detach().clone() for name, param in local.params.items()}
    optimizer = make(case, local, ReplicaGroups())
    assert all(torch.equal(param, before[name]) for name, param in local.params.items())
    assert all(not p.tensor.any() for key, ps in optimizer.state().items() if key.startswith("exp_") for p in ps)
    assert optimizer.num_steps == 0


def test_refusals() -> None:
    param = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    listed = [(ParamInfo("w", (2, 2)), param, AdamW(OptimizerConfig()), 0.1)]
    with pytest.raises(ValueError, match=r"zero\.engine=zeus is not one of native, deepspeed"):
        build("zeus", listed, ReplicaGroups())
    with pytest.raises(ValueError, match=r"zero\.engine=deepspeed cannot hold precision=fp64; use zero\.engine=native"):
        build("deepspeed", listed, ReplicaGroups())


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_a_rank_without_parameters_steps_along(engine: str) -> None:
    """Pipeline stages may hold no layer."""
    optimizer = build(engine, [], ReplicaGroups())
    optimizer.zero_grad()
    assert optimizer.step(0.1) == StepResult(0.0, True)
    optimizer.load_finished(7)
    assert (optimizer.num_steps, optimizer.state(), optimizer.state_bytes()) == (7, {}, 0)
