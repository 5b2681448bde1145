"""Recompute changes what is kept, and no bit of a gradient."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks._storages import Storages
from parallel.collectives import drive
from parallel.pipeline.overlap import HOST_COMPUTES, interleave
from parallel.pipeline.segments import Segments
from tests.train.model_cases import TINY, build, random_config, random_dense_config, random_tokens, same_bits
from train.compose import compose
from train.model.config import given
from train.model.kernels import triton_kernels
from train.model.loss import LossTerms
from train.model.recompute import Recompute
from train.model.recompute_config import NODES, RecomputeConfig
from train.model.router import Router
from train.model.tape import Inline
from train.model.transformer import Findings, Transformer
from train.precision import engine
from train.precision.build import build_engines, fp8_weights

TERMS = LossTerms(main=0.1, mtp=0.03, balance=0.01)
# Every set of choices.
CHOICES = [
    RecomputeConfig(norm, mla_up_proj, experts_up_proj, list(nodes))
    for norm, mla_up_proj, experts_up_proj in itertools.product((False, True), repeat=3)
    for count in range(len(NODES) + 1)
    for nodes in itertools.combinations(NODES, count)
    if not (experts_up_proj and "experts" in nodes)
]
NONE, NORM, UP, BOTH = (RecomputeConfig(norm, up) for norm, up in ((0, 0), (1, 0), (0, 1), (1, 1)))
HIDDEN = RecomputeConfig(experts_up_proj=True)
WHOLE = RecomputeConfig(nodes=list(NODES))


class Deferred(list[Any]):
    """A sink that keeps weight gradients until they are taken."""

    def __call__(self, wgrad: Any) -> None:
        self.append(wgrad)

    @torch.no_grad()
    def take(self) -> None:
        while self:
            self.pop(0)()


def make(choice: RecomputeConfig, config: Any = TINY, dtype: torch.dtype = torch.float64, **rest: Any) -> Transformer:
    return build(config, dtype, recompute=Recompute(choice), **rest)


def whole(model: Transformer, batches: list[Tensor]) -> list[Any]:
    """One autograd graph per micro-batch."""
    outputs = [model(tokens, TERMS) for tokens in batches]
    for output in outputs:
        output.total.backward()
    return [(output.metrics, output.load) for output in outputs]


def pieces(model: Transformer, batches: list[Tensor]) -> list[Any]:
    """In pieces; each backward in turns with the next forward."""
    found: list[Findings] = []
    before: Segments | None = None
    for tokens in batches:
        record = Segments()
        forward = model.steps(tokens, None, TERMS, record)
        _, (_, findings) = (
            interleave(HOST_COMPUTES, before.backward(None), forward) if before else (None, drive(forward))
        )
        found.append(findings)
        before = record
    assert before is not None
    drive(before.backward(None))
    return [tuple(each) for each in found]


def assert_same(one: Transformer, two: Transformer) -> None:
    for name, parameter in one.named_parameters():
        assert torch.equal(two.get_parameter(name).main_grad, parameter.main_grad), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", [whole, pieces])
@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_the_same_bits(seed: int, run: Any, dtype: torch.dtype) -> None:
    config = random_config(seed, num_nextn_predict_layers=seed % 3, first_k_dense_replace=seed % 2)
    batches = [random_tokens(config, 2, 9, seed), random_tokens(config, 3, 7, seed + 1)]
    plain = make(NONE, config, dtype)
    expected = run(plain, batches)
    for choice in random.Random(seed).sample(CHOICES, 4):
        model = make(choice, config, dtype)
        for ours, theirs in zip(run(model, batches), expected, strict=True):
            assert same_bits(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]), choice
        assert_same(model, plain)


@pytest.mark.parametrize("run", [whole, pieces])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_a_dense_model_are_the_same_bits(seed: int, run: Any) -> None:
    config = random_dense_config(seed, num_nextn_predict_layers=seed % 3)
    batches = [random_tokens(config, 2, 9, seed), random_tokens(config, 3, 7, seed + 1)]
    plain = make(NONE, config)
    expected = run(plain, batches)
    for choice in (NORM, WHOLE):
        model = make(choice, config)
        assert all(same_bits(ours[0], theirs[0]) for ours, theirs in zip(run(model, batches), expected, strict=True))
        assert_same(model, plain)


def test_what_is_rotated_in_place_and_what_is_a_view_is_rebuilt() -> None:
    """Kernels that overwrite queries, and values as wide as keys, which stay where their projection wrote them: the
    same bits, and up to the order of sums those of kernels that write all anew."""
    config = replace(TINY, num_hidden_layers=1, num_nextn_predict_layers=0, v_head_dim=13)
    tokens = [random_tokens(config, 1, 3)]
    plain, written_anew = make(NONE, config, kernels=triton_kernels("cpu")), make(NONE, config)
    pieces(plain, tokens)
    pieces(written_anew, tokens)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.main_grad, written_anew.get_parameter(name).main_grad)
    for choice in (UP, WHOLE):
        model = make(choice, config, kernels=triton_kernels("cpu"))
        pieces(model, tokens)
        assert_same(model, plain)


@pytest.mark.parametrize("choice", [BOTH, HIDDEN, WHOLE], ids=["fine", "hidden", "whole"])
def test_backward_and_weight_gradients_still_come_apart(choice: RecomputeConfig) -> None:
    sink, tokens = Deferred(), random_tokens(TINY, 2, 9)
    plain, model, record = make(NONE), make(choice, sink=sink), Segments()
    plain(tokens, TERMS).total.backward()
    drive(model.steps(tokens, None, TERMS, record))
    assert not sink
    drive(record.backward(None))
    # The head's is formed beside its logits.
    waiting = [each for name, each in model.named_parameters() if each.ndim > 1 and name != "lm_head.weight"]
    assert not any(parameter.main_grad.any() for parameter in waiting)
    sink.take()
    assert_same(plain, model)


def kept(choice: RecomputeConfig, tokens: Tensor, config: Any = TINY) -> tuple[int, int, int]:
    """Bytes alive for one micro-batch after F, B and W, with the report and the loss terms left out."""
    sink = Deferred()
    model, record = make(choice, config, sink=sink), Segments()
    found = []
    with Storages() as storages:
        drive(model.steps(tokens, None, TERMS, record))
        found.append(storages.num_bytes())
        drive(record.backward(None))
        found.append(storages.num_bytes())
        record = Segments()
        sink.take()
        found.append(storages.num_bytes())
    return found[0], found[1], found[2]


def test_what_is_kept_between_forward_and_backward() -> None:
    """Counted exactly: rebuilt tensors are gone, and nothing else holds them."""
    num_sequences, seq_len, width = 2, 33, 8
    tokens = random_tokens(TINY, num_sequences, seq_len)
    after = {
        name: kept(choice, tokens)[0]
        for name, choice in [("none", NONE), ("norm", NORM), ("up", UP), ("hidden", HIDDEN)]
    }
    after |= {"both": kept(BOTH, tokens)[0], "whole": kept(WHOLE, tokens)[0]}
    depths = range(1, TINY.num_nextn_predict_layers + 1)
    # Tokens seen by main layers, and by the layer of each prediction depth.
    main, rest = num_sequences * seq_len, [num_sequences * (seq_len - k) for k in depths]
    per_layer = main * TINY.num_hidden_layers + sum(rest)
    of_keys = TINY.attention_sizes.qk_head_dim
    heads = TINY.num_attention_heads * (2 * of_keys + max(of_keys, TINY.v_head_dim))
    assert after["none"] - after["up"] == width * per_layer * heads
    # Two norms of the hidden state and two latents per layer. A depth adds the joined pair, and the normed state that
    # it reads, of the model or of the depth before.
    assert TINY.q_lora_rank is not None
    norms = per_layer * (2 * TINY.hidden_size + TINY.q_lora_rank + TINY.kv_lora_rank)
    joined, read = 2 * TINY.hidden_size * sum(rest), TINY.hidden_size * (main + sum(rest[:-1]))
    assert after["none"] - after["norm"] == width * (norms + joined + read)
    assert after["none"] - after["both"] == (after["none"] - after["up"]) + (after["none"] - after["norm"])
    assert after["whole"] < after["both"]
    # Gate and up of every expert that a token is sent to, of layers with experts, which those of depths are too.
    rows = given(TINY.num_experts_per_tok) * (main * TINY.num_moe_layers + sum(rest))
    assert after["none"] - after["hidden"] == width * rows * 2 * given(TINY.moe_intermediate_size)


def in_fp8(choice: RecomputeConfig, model: Any = TINY, **rest: Any) -> Transformer:
    """A model in bfloat16 whose products are in FP8."""
    config = compose(["model=tiny", "precision=fp8"]).precision
    engines = build_engines(config, "cpu", fp8_weights(config, "cpu"))
    return make(choice, model, torch.bfloat16, engines=engines, **rest)


@pytest.mark.parametrize("run", [whole, pieces])
def test_gradients_in_fp8_are_the_same_bits(run: Any) -> None:
    """Where a product keeps its input's codes they are made again of the same input."""
    batches = [random_tokens(TINY, 2, 17), random_tokens(TINY, 1, 33)]
    plain = in_fp8(NONE)
    expected = run(plain, batches)
    for choice in (NORM, UP, HIDDEN, replace(BOTH, experts_up_proj=True), replace(BOTH, nodes=["experts"])):
        model = in_fp8(choice)
        assert all(same_bits(ours[0], theirs[0]) for ours, theirs in zip(run(model, batches), expected, strict=True))
        assert_same(model, plain)


@pytest.mark.parametrize("pads", [True, False], ids=["padded values", "values as wide as keys"])
def test_codes_of_an_input_that_is_there_anyway_are_not_kept(pads: bool) -> None:
    """Of norms' outputs, which are rebuilt, and of attention's output, which it keeps, unless that is copied out of
    padded heads. Codes of experts' rows, which nobody else has, are kept."""
    config, (num_sequences, seq_len) = TINY, (2, 33)
    if not pads:
        config = replace(TINY, v_head_dim=TINY.attention_sizes.qk_head_dim)
    found = []
    for offer in (Recompute.offer_form, lambda *_: None):
        with mock.patch.object(Recompute, "offer_form", offer), Storages() as storages:
            model, record = in_fp8(BOTH, config, sink=Deferred()), Segments()
            before = storages.num_bytes()
            drive(model.steps(random_tokens(config, num_sequences, seq_len), None, TERMS, record))
            found.append(storages.num_bytes() - before)
    tokens = sum(num_sequences * (seq_len - k) for k in range(1, config.num_nextn_predict_layers + 1))
    tokens += num_sequences * seq_len * config.num_hidden_layers
    assert config.q_lora_rank is not None
    # Of every layer: queries and keys read one norm, dense MLP or shared experts the other, and each latent has one.
    widths = [config.hidden_size, config.hidden_size, config.q_lora_rank, config.kv_lora_rank]
    codes = sum(map(bytes_of_codes, widths))
    if not pads:  # what the output's projection reads has half a byte more
        width = config.num_attention_heads * config.v_head_dim
        codes += bytes_of_codes(width) + -(-width // 2)
    assert found[1] - found[0] == tokens * codes


@pytest.mark.parametrize("choice", [BOTH, NORM], ids=["norms and heads", "norms"])
def test_swiglus_input_of_experts_is_made_again_of_their_codes(choice: RecomputeConfig) -> None:
    """In FP8 too: its codes are gone, nothing else is kept for it, and each layer makes it once."""
    found, tokens = [], random_tokens(TINY, 2, 33)
    with mock.patch("train.precision.engine._hidden_again", wraps=engine._hidden_again) as again:
        for each in (choice, replace(choice, experts_up_proj=True)):
            with Storages() as storages:
                model, record = in_fp8(each, sink=Deferred()), Segments()
                before = storages.num_bytes()
                drive(model.steps(tokens, None, TERMS, record))
                found.append(storages.num_bytes() - before)
                drive(record.backward(None))
        assert again.call_count == TINY.num_routers
    layers = [33] * TINY.num_moe_layers + [33 - k for k in range(1, TINY.num_nextn_predict_layers + 1)]
    rows = 2 * sum(layers) * given(TINY.num_experts_per_tok)
    assert found[0] - found[1] == rows * bytes_of_codes(2 * given(TINY.moe_intermediate_size))


def bytes_of_codes(width: int) -> int:
    """Of a row in E4M3 with a scale in float32 for every 128 elements."""
    return width + 4 * -(-width // 128)


def test_without_shared_experts_a_whole_node_keeps_the_received_rows_alone() -> None:
    """Not this rank's own tokens as well, which only shared experts read."""
    tokens = random_tokens(TINY, 2, 33)
    found = [kept(WHOLE, tokens, replace(TINY, n_shared_experts=number))[0] for number in (1, 0, None)]
    layers = [33] * TINY.num_moe_layers + [33 - k for k in range(1, TINY.num_nextn_predict_layers + 1)]
    assert found[0] - found[1] == found[0] - found[2] == 2 * sum(layers) * TINY.hidden_size * 8


@pytest.mark.parametrize(
    "choice", [NONE, NORM, UP, BOTH, HIDDEN, WHOLE], ids=["none", "norm", "up", "both", "hidden", "whole"]
)
def test_all_is_released(choice: RecomputeConfig) -> None:
    _, between, after = kept(choice, random_tokens(TINY, 2, 33))
    assert between > 0
    assert after == 0


def test_evaluation_keeps_nothing() -> None:
    tokens, model = random_tokens(TINY, 2, 33), make(BOTH).eval()
    expected = make(NONE)(tokens, TERMS).metrics
    with torch.no_grad(), Storages() as storages:
        _, findings = drive(model.steps(tokens, None, TERMS, Inline()))
        assert same_bits(findings.metrics, expected)
        del findings, _
        assert storages.num_bytes() == 0


def routes(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """What the routers chose, call by call, forward and backward."""
    original, chosen = Router.select, []

    def select(self: Router, scores: Tensor) -> Tensor:
        chosen.append(original(self, scores))
        return chosen[-1]

    with mock.patch.object(Router, "select", select):
        drive(drive_back(model, tokens))
    return chosen


def drive_back(model: Transformer, tokens: Tensor) -> Any:
    record = Segments()
    yield from model.steps(tokens, None, TERMS, record)
    yield from record.backward(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rerun_takes_the_same_ways(dtype: torch.dtype) -> None:
    """The second pass computes what the first did, in backward order: each router chooses what it chose before."""
    tokens = random_tokens(TINY, 2, 33)
    once, twice = routes(make(NONE, dtype=dtype), tokens), routes(make(WHOLE, dtype=dtype), tokens)
    num_routers = TINY.num_routers
    assert (len(once), len(twice)) == (num_routers, 2 * num_routers)
    for first, again, plain in zip(twice[:num_routers], twice[: num_routers - 1 : -1], once, strict=True):
        assert torch.equal(first, again) and torch.equal(first, plain)


def test_nodes_run_twice_and_no_more() -> None:
    ran: Counter[str] = Counter()
    model, tokens = make(WHOLE), random_tokens(TINY, 2, 9)
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "experts")):
            module.register_forward_hook(lambda module, args, output, name=name: ran.update([name]))
    drive(drive_back(model, tokens))
    assert ran and set(ran.values()) == {2}


def test_what_was_offered_is_told_from_what_was_not() -> None:
    """By storage, type and content; views are rebuilt as views, by one rebuild for all."""
    recompute, rebuilds = Recompute(NORM), []
    offer = recompute.offer("norm")

    def triple(x: Tensor) -> tuple[Tensor]:
        rebuilds.append(x)
        return (x * 3,)

    def piece(x: Tensor) -> Tensor:
        y = triple(x.detach())[0]
        offer(triple, (y,), (x,))
        other = torch.full_like(y, 7.0)
        offer(triple, (other,), (x,))
        other.mul_(2)  # no longer what was offered
        freed = torch.ones_like(y)
        offer(triple, (freed,), (x,))
        del freed
        fresh = torch.ones_like(y)  # may get the address of the freed one
        return (x * y).sum() + (x[0] * y.t()[1]).sum() + (x * other).sum() + (x * fresh).sum()

    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    rebuilds.clear()
    result = recompute.on(Inline()).compute(piece, x)
    assert len(rebuilds) == 1
    result.backward()
    assert len(rebuilds) == 2
    expected = 3 * x.detach() + 14 + 1
    expected[0] += 3 * x.detach()[:, 1]
    torch.testing.assert_close(x.grad, expected)


def test_a_rebuild_of_another_layout_is_an_error() -> None:
    recompute = Recompute(NORM)

    def piece(x: Tensor) -> Tensor:
        y = x.detach() + 1
        recompute.offer("norm")(lambda z: ((z + 1).t().contiguous().t(),), (y,), (x,))
        return (x * y).sum()

    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="another layout"):
        recompute.on(Inline()).compute(piece, x).backward()


def test_a_rerun_that_differs_is_an_error() -> None:
    counts = iter((1, 2))

    def piece(x: Tensor) -> Tensor:
        return sum(((x * x).sum() for _ in range(next(counts))), torch.zeros(()))

    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="saved other tensors"):
        Recompute(WHOLE).node("dense")(piece)(x).backward()


def test_nothing_chosen_installs_nothing() -> None:
    recompute, tape = Recompute(), Inline()
    assert recompute.on(tape) is tape
    assert recompute.node("experts")(drive) is drive
    with mock.patch("train.model.recompute.saved_tensors_hooks", side_effect=AssertionError):
        make(NONE)(random_tokens(TINY, 2, 9), TERMS).total.backward()


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recompute.nodes has 'mlp', which is not one of attention, experts, dense"):
        compose(["recompute.nodes=[attention,mlp]"])
    with pytest.raises(ValueError, match="recompute"):
        compose(["recompute.moe_act=true"])


def test_the_published_run_recomputes_what_the_report_says_and_experts_first_product() -> None:
    assert compose(["experiment=v3_h800_2048"]).recompute == replace(BOTH, experts_up_proj=True)
    assert compose([]).recompute == NONE
