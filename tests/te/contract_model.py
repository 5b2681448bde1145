"""A whole model over the library's modules, as a pipeline drives it, against the reference."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from parallel.pipeline.segments import Segments
from tests.te.contract_engine import KeepsInput, library
from tests.te.twin import LOG
from tests.train.model_cases import build, random_tokens, same_bits
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.recompute import Recompute
from train.model.recompute_config import RecomputeConfig
from train.model.tape import drive
from train.model.transformer import Transformer
from train.precision.build import build_engines, check_widths, matrices
from train.precision.config import FP8_MODULES, Fp8, PrecisionConfig
from train.precision.engine import Engine
from train.precision.grads import main_grad
from train.precision.reference import Fp8Engine, QuantisedWeights
from train.precision.torch_engine import TorchEngine
from train.settings import group
from train.stage import Stage, WeightGradients

# Widths are multiples of 16, few of 128; 42 tokens are none.
CONFIG = ModelConfig(
    vocab_size=100,
    hidden_size=144,
    intermediate_size=160,
    moe_intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=3,
    topk_group=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    q_lora_rank=48,
    max_position_embeddings=64,
    initializer_range=0.08,
)
FP8 = group(PrecisionConfig, "precision", "fp8")
POWERS = replace(FP8, power_of_two_scales=True)
NUM_SEQUENCES, SEQ_LEN, NUM_MICRO_BATCHES = 2, 21, 3
TERMS = LossTerms(1 / 126, 0.3 / 126, 1e-3)


class Step(NamedTuple):
    losses: list[dict[str, Tensor]]
    gradients: dict[str, Tensor]
    num_weights: int


def twin_engines() -> Mapping[str, Engine]:
    """The reference, but for the columns of what it would keep in E5M6."""
    quantised = QuantisedWeights(True)

    @cache  # layers that share an input share an engine
    def engine(kind: type[Fp8Engine], fp8: Fp8) -> Fp8Engine:
        return kind(fp8, quantised, True)

    table: dict[str, Any] = {}
    for module, fp8 in FP8_MODULES.items():
        kind = KeepsInput if fp8.keep == "e5m6" else Fp8Engine
        table[module] = engine(kind, fp8) if FP8.is_fp8(module) else TorchEngine()
    return table


def library_engines() -> Mapping[str, Engine]:
    return build_engines(POWERS, "cpu", library())


def step(
    engines: Mapping[str, Engine],
    recompute: RecomputeConfig | None = None,
    loss_factor: float = 1.0,
    config: ModelConfig = CONFIG,
) -> Step:
    """Three micro-batches: two forwards before the first backward, weight gradients late and in no order of theirs."""
    sink = WeightGradients()
    model = build(config, torch.bfloat16, engines=engines, sink=sink, recompute=Recompute(recompute))
    check_widths(model, FP8)
    stage = Stage(model, sink, Segments)
    tokens = [random_tokens(CONFIG, NUM_SEQUENCES, SEQ_LEN, seed=number) for number in range(NUM_MICRO_BATCHES)]
    stage.begin(tokens.__getitem__, LossTerms(*(factor * loss_factor for factor in TERMS)))
    LOG.take()
    for action, number in ("F0", "F1", "B0", "F2", "B1", "W1", "B2", "W0", "W2"):
        if action == "F":
            drive(stage.forward(int(number), None))
        elif action == "B":
            drive(stage.backward(int(number), None))
        else:
            stage.weight_gradients(int(number))
    losses = [stage.findings[number].metrics for number in range(NUM_MICRO_BATCHES)]
    gradients = {name: main_grad(parameter).clone() for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    return Step(losses, gradients, LOG.num_weights)


@pytest.fixture(scope="module")
def single() -> Step:
    return step(library_engines())


def different(ours: Step, theirs: Step) -> dict[str, float]:
    """Gradients that are not the same bits, and how far they are apart."""
    return {
        name: float((ours.gradients[name] - other).norm() / other.norm())
        for name, other in theirs.gradients.items()
        if not torch.equal(ours.gradients[name], other)
    }


def test_a_step_is_the_reference_bit_for_bit(single: Step) -> None:
    """Powers of two; both make o_proj's columns from its input."""
    theirs = step(twin_engines())
    assert all(same_bits(a, b) for a, b in zip(single.losses, theirs.losses, strict=True))
    assert different(single, theirs) == {}


def test_what_the_report_keeps_in_e5m6(single: Step) -> None:
    """Against the reference as it is: it makes the columns of o_proj's weight gradient from E5M6. Nothing else differs,
    and nothing that this gradient does not reach: every other one is the same bits, losses too."""
    theirs = step(build_engines(POWERS, "cpu", QuantisedWeights(True)))
    assert all(same_bits(a, b) for a, b in zip(single.losses, theirs.losses, strict=True))
    found = different(single, theirs)
    assert set(found) == {name for module, name, _ in matrices(build(CONFIG)) if module == "o_proj"}
    # One in 8 values of E5M6 lies half way between two of E4M3, and half of those fall the other way, by at most 1/8 of
    # themselves: sqrt(1/16) / 8.
    assert max(found.values()) < 2**-5


@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig(norm=True, mla_up_proj=True),
        RecomputeConfig(norm=True, experts_up_proj=True),
        RecomputeConfig(nodes=["attention", "experts", "dense"]),
    ],
    ids=["offers", "experts", "nodes"],
)
def test_recompute_changes_no_bit(single: Step, recompute: RecomputeConfig) -> None:
    again = step(library_engines(), recompute)
    assert different(single, again) == {}
    assert again.num_weights == single.num_weights


def test_weights_are_quantised_once_a_step(single: Step) -> None:
    """However many micro-batches there are: every matrix, and every expert's."""
    expected = 0
    for module, _, parameter in matrices(build(CONFIG)):
        if FP8.is_fp8(module):
            expected += parameter.shape[0] if parameter.ndim == 3 else 1
    assert single.num_weights == expected


def test_a_small_loss_changes_exponents_alone(single: Step) -> None:
    """No floor lies under the library's scales either."""
    scaled = step(library_engines(), loss_factor=2.0**-30)
    for name, gradient in scaled.gradients.items():
        assert torch.equal(gradient * 2.0**30, single.gradients[name]), name


def test_float32_scales_are_the_reference_up_to_borders() -> None:
    """Scales as the report has them: one value in a thousand lies on a border of E4M3 and falls the other way, and
    every quantiser behind it makes more of the difference, up to what FP8 itself is from the truth: so the two have to
    be nearer to each other than to bfloat16. Without experts, of which one such value can choose another."""
    dense = replace(CONFIG, first_k_dense_replace=2, num_nextn_predict_layers=0)
    ours = step(build_engines(FP8, "cpu", library(False)), config=dense)
    theirs = step(build_engines(FP8, "cpu", QuantisedWeights()), config=dense)
    truth = step(build_engines(PrecisionConfig("bf16"), "cpu", QuantisedWeights()), config=dense)
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=0)
    apart, rounding = sorted(different(ours, theirs).values()), sorted(different(theirs, truth).values())
    assert apart[len(apart) // 2] < 0.75 * rounding[len(rounding) // 2]


def named(model: Transformer) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
    for name, value in model.state_dict().items():
        yield name, value.shape, value.dtype


def test_nothing_of_the_library_is_in_a_model_or_its_state() -> None:
    """Names, shapes and types are those of any other engine, before and after use; a state goes through pickle."""
    plain = build(CONFIG, torch.bfloat16)
    model = build(CONFIG, torch.bfloat16, engines=library_engines())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(random_tokens(CONFIG, 2, 16), TERMS).total.backward()
    assert list(named(model)) == list(named(plain))
    assert not any(type(module).__module__.startswith("transformer_engine") for module in model.modules())
    again = pickle.loads(pickle.dumps(model.state_dict()))
    assert all(torch.equal(value, again[name]) and type(value) is Tensor for name, value in before.items())
