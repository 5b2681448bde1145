"""The whole model: losses against plain readings, nodes against forward, parts against the whole, bf16 against fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import reference
from tests.train.model_cases import TINY, added, build, random_config, random_tokens
from train.model.loss import LossTerms
from train.model.parts import Parts
from train.model.tape import Inline, drive
from train.model.transformer import Transformer

TERMS = LossTerms(main=0.1, mtp=0.03, balance=0.01)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad for name, parameter in model.named_parameters()}


def normed_states(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    x = model.embed_tokens(tokens[:, :-1])
    return model.norm(drive(model.run_layers(x, TERMS, Inline(), model.empty_findings(x.device))))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_losses_are_what_the_report_says(depth: int) -> None:
    config = replace(TINY, num_nextn_predict_layers=depth)
    model, tokens = build(config), random_tokens(config, 2, 7)
    seen = []
    for router in model.routers().values():
        router.register_forward_hook(lambda router, args, _: seen.append((router.weight, args[0])))
    output = model(tokens, TERMS)
    balance = sum(
        reference.balance_loss(torch.sigmoid(sequence @ weight.T), config.num_experts_per_tok)
        for weight, x in seen
        for sequence in x
    )
    states = normed_states(model, tokens)
    logits = model.lm_head(states)
    main = sum(
        reference.cross_entropy(logits[b, i], int(tokens[b, i + 1])) for b in range(2) for i in range(states.shape[1])
    )
    mtp = sum(reference.mtp_loss(model, states[b], tokens[b]) for b in range(2)) if depth else torch.zeros_like(main)
    expected = {"train/loss": main, "train/mtp_loss": mtp, "train/seq_balance_loss": balance}
    assert ("train/mtp_loss" in output.metrics) == (depth > 0), "what is not measured is absent"
    for name in expected.keys() & output.metrics.keys():
        torch.testing.assert_close(output.metrics[name], expected[name].detach())
    torch.testing.assert_close(output.total, 0.1 * main + 0.03 * mtp + 0.01 * balance)
    # Depth k sees k positions less.
    positions = [7] * config.num_moe_layers + [7 - k for k in range(1, depth + 1)]
    assert output.load.sum(-1).tolist() == [2 * config.num_experts_per_tok * num for num in positions]


def test_gradient_of_prediction_depths() -> None:
    """Through both depths into the shared embedding and head, against autograd over the plain reading."""
    model, twin = build(TINY), build(TINY)
    tokens = random_tokens(TINY, 1, 6)
    states = torch.randn(1, 6, TINY.hidden_size, dtype=torch.float64, requires_grad=True)
    tape, findings = Inline(), model.empty_findings(states.device)
    drive(model.predict_further(states, tokens, LossTerms(0.0, 1.0, 0.0), tape, findings))
    tape.total.backward()
    twin_states = states.detach().clone().requires_grad_()
    reference.mtp_loss(twin, twin_states[0], tokens[0]).backward()
    torch.testing.assert_close(states.grad, twin_states.grad)
    expected = gradients(twin)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)
    assert expected["embed_tokens.weight"].any() and expected["lm_head.weight"].any()


def test_parts_in_a_row_are_the_whole() -> None:
    whole, tokens = build(TINY), random_tokens(TINY, 2, 9)
    expected = whole(tokens, TERMS)
    expected.total.backward()
    first = build(TINY, parts=Parts(embedding=True, layers=(0, 1), head=False, mtp=False))
    second = build(TINY, parts=Parts(embedding=False, layers=(2,), head=True, mtp=True))
    for stage in (first, second):
        stage.load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})

    early, late = Inline(), Inline()
    sent, before = drive(first.steps(tokens, None, TERMS, early))
    received = sent.detach().requires_grad_()
    nothing, after = drive(second.steps(tokens, received, TERMS, late))
    assert nothing is None
    late.total.backward()
    torch.autograd.backward((sent, early.total), (received.grad, None))

    torch.testing.assert_close(early.total + late.total, expected.total)
    torch.testing.assert_close(added(before.metrics, after.metrics), expected.metrics)
    assert torch.equal(before.load + after.load, expected.load)
    for name, grad in gradients(whole).items():
        parts = [gradients(stage)[name] for stage in (first, second) if name in gradients(stage)]
        torch.testing.assert_close(sum(parts), grad, msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_micro_batches_add_up(seed: int) -> None:
    config = random_config(seed, num_nextn_predict_layers=1)
    whole, split, tokens = build(config), build(config), random_tokens(config, 4, 8)
    expected = whole(tokens, TERMS)
    expected.total.backward()
    outputs = [split(part, TERMS) for part in tokens.split([1, 3])]
    for output in outputs:
        output.total.backward()
    torch.testing.assert_close(added(*(output.metrics for output in outputs)), expected.metrics)
    assert torch.equal(sum(output.load for output in outputs), expected.load)
    for name, grad in gradients(split).items():
        torch.testing.assert_close(grad, gradients(whole)[name], msg=name)


def test_evaluation_gives_the_same_sums_and_counts_nothing() -> None:
    model, tokens = build(TINY), random_tokens(TINY, 2, 9)
    with torch.no_grad():
        evaluated = model.eval()(tokens, TERMS)
    assert not evaluated.load.any()
    assert not any(grad.any() for grad in gradients(model).values())
    torch.testing.assert_close(evaluated.metrics, model.train()(tokens, TERMS).metrics)


def test_no_gradient_leaves_main_grad() -> None:
    model = build(TINY)
    model(random_tokens(TINY, 2, 9), TERMS).total.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(grad.any() for grad in gradients(model).values())


def test_a_deferred_weight_gradient_is_the_same() -> None:
    """All wait for the sink but the head's, which is formed beside its logits."""
    deferred = []
    now, later, tokens = build(TINY), build(TINY, sink=deferred.append), random_tokens(TINY, 2, 9)
    for model in (now, later):
        model(tokens, TERMS).total.backward()
    assert gradients(later)["lm_head.weight"].any()
    matrices = [name for name, each in later.named_parameters() if each.ndim > 1 and name != "lm_head.weight"]
    assert not any(gradients(later)[name].any() for name in matrices)
    for wgrad in deferred:
        wgrad()
    assert all(torch.equal(grad, gradients(now)[name]) for name, grad in gradients(later).items())


def test_the_future_is_not_seen() -> None:
    model, tokens = build(TINY), random_tokens(TINY, 1, 9)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % TINY.vocab_size
    difference = (normed_states(model, tokens) - normed_states(model, changed)).abs().amax(-1)[0]
    # A product's rounding depends on how many rows an expert got: the past is equal up to that.
    assert (difference[:6] < 1e-12).all() and (difference[6:] > 1e-6).all()


def test_bf16_is_close_to_fp32() -> None:
    """Both start from the same values; bfloat16 keeps 8 bits, and a few tokens may change their experts."""
    config = replace(TINY, initializer_range=0.02)
    tokens = random_tokens(config, 4, 32)
    exact, rounded = build(config, torch.float32), build(config, torch.bfloat16)
    outputs = [model(tokens, TERMS) for model in (exact, rounded)]
    assert {value.dtype for value in outputs[1].metrics.values()} == {torch.float64}  # a step's sums must not round
    torch.testing.assert_close(outputs[0].metrics, outputs[1].metrics, rtol=2e-3, atol=0)
    for output in outputs:
        output.total.backward()
    expected, actual = (torch.cat([grad.flatten() for grad in gradients(m).values()]) for m in (exact, rounded))
    assert actual.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(expected, actual, dim=0) > 0.99
