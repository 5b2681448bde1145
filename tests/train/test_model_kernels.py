"""Kernels: hand-written backwards against finite differences, compiled against eager."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from tests import reference
from tests.bounds import assert_within, gamma
from train.model.attention.kernels import rotate
from train.model.cross_entropy import NO_TARGET, ChunkSize, cross_entropy_
from train.model.kernels import Kernels, compiled_kernels, rms_norm_forward, swiglu_backward, swiglu_forward
from train.model.layers import Backend
from train.model.loss import cross_entropy_sum
from train.precision.build import everywhere
from train.precision.engine import Mlp
from train.precision.grads import run_now
from train.precision.torch_engine import TorchEngine


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def with_main_grad(*shape: int) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    weight.main_grad = torch.zeros_like(weight)
    return weight


def test_rms_norm() -> None:
    x, weight = random(2, 5, 7), random(7)
    torch.testing.assert_close(Kernels().rms_norm(x, weight, 1e-3), reference.rms_norm(x, weight, 1e-3))
    assert gradcheck(lambda x, w: Kernels().rms_norm(x, w, 1e-3), (x, weight))
    # A strided input, as the latent beside the rotary key is.
    assert gradcheck(lambda x, w: Kernels().rms_norm(x[..., :4], w[:4], 1e-3), (x, weight))
    assert gradcheck(lambda x, w: Kernels().rms_norm_beside(x, w, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_beside_its_input_has_the_bits_of_autograds_sum(dtype: torch.dtype) -> None:
    """Also where one of the two is not read."""
    x, weight = random(3, 5, 8, dtype=dtype), random(8, dtype=dtype)
    d_beside, dy = torch.randn(2, 3, 5, 8).to(dtype)
    for read in ((True, True), (True, False), (False, True)):
        found = []
        for beside, y in (Kernels().rms_norm_beside(x, weight, 1e-3), (x * 1, Kernels().rms_norm(x, weight, 1e-3))):
            outputs = [each for each, is_read in ((beside, read[0]), (y, read[1])) if is_read]
            gradients = [each for each, is_read in ((d_beside, read[0]), (dy, read[1])) if is_read]
            found.append(torch.autograd.grad(outputs, (x, weight), gradients, allow_unused=True))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] is found[1][1] is None or torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(weighted: bool) -> None:
    h, row_weights = random(5, 8), random(5) if weighted else None
    gate, up = h.chunk(2, -1)
    expected = F.silu(gate) * up * (row_weights.unsqueeze(-1) if weighted else 1)
    torch.testing.assert_close(swiglu_forward(h, row_weights), expected)
    da = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        a, dh, d_row_weights = swiglu_backward(da, h, row_weights)
    torch.testing.assert_close(a, expected)
    inputs = (h, row_weights) if weighted else (h,)
    grads = torch.autograd.grad(expected, inputs, da)
    torch.testing.assert_close((dh, d_row_weights) if weighted else (dh,), grads)


@pytest.mark.parametrize("v_width", [3, 11])
def test_joined_heads(v_width: int) -> None:
    """Widths that divide nothing, an odd offset of the rotary part, values padded or not."""
    table = torch.polar(torch.ones(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    q, kv, k_rope = random(2, 4, 2, 5 + 6), random(2, 4, 2, 5 + 3), random(2, 4, 6)
    out_q, out_k, out_v = Kernels().join_heads(q, kv, k_rope, table, v_width)
    for b, s, h, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 2, 3))).tolist():
        angle = torch.angle(table[s, j])
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        pair = slice(5 + 2 * j, 7 + 2 * j)
        torch.testing.assert_close(out_q[b, s, h, pair], turn @ q[b, s, h, pair])
        torch.testing.assert_close(out_k[b, s, h, pair], turn @ k_rope[b, s, 2 * j : 2 * j + 2])
    assert torch.equal(out_q[..., :5], q[..., :5])
    assert torch.equal(out_k[..., :5], kv[..., :5])
    assert torch.equal(out_v, F.pad(kv[..., 5:], (0, v_width - 3)))
    assert gradcheck(lambda *inputs: Kernels().join_heads(*inputs, table, v_width), (q, kv, k_rope))


@pytest.mark.parametrize("splits", [None, [3, 0, 2]])
def test_swiglu_mlp(splits: list[int] | None) -> None:
    engine = TorchEngine()
    products = engine if splits is None else engine.grouped(splits)
    lead = () if splits is None else (3,)
    gate_up, down = with_main_grad(*lead, 12, 4), with_main_grad(*lead, 4, 6)
    x, row_weights = random(5, 4), random(5)

    def apply(x: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
        return Mlp(gate_up, down, products, products, Kernels(), run_now)(x, row_weights)

    assert gradcheck(apply, (x, row_weights))
    groups = torch.zeros(5, dtype=torch.int64) if splits is None else torch.tensor([0, 0, 0, 2, 2])
    twins = [weight.detach().clone().requires_grad_() for weight in (gate_up, down)]
    stacked = [weight.view(-1, *weight.shape[-2:]) for weight in twins]
    outputs = []
    for row, group in enumerate(groups.tolist()):
        gate, up = (stacked[0][group] @ x[row]).chunk(2)
        outputs.append(stacked[1][group] @ (F.silu(gate) * up) * row_weights[row])
    expected = torch.stack(outputs)
    gate_up.main_grad.zero_(), down.main_grad.zero_()
    y = apply(x, row_weights)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    grads = torch.autograd.grad(expected, twins, dy)
    torch.testing.assert_close((gate_up.main_grad, down.main_grad), grads)


def head_of(num_tokens: int) -> Backend:
    """Products by torch, of which the head takes so many tokens at a time."""
    return Backend(everywhere(TorchEngine()), Kernels(chunk_size=ChunkSize(1, num_tokens)))


@pytest.mark.parametrize("num_tokens", [3, 8, 100])
def test_cross_entropy_in_chunks(num_tokens: int) -> None:
    """The sum, and the gradients of its factor times it, beside torch's own; some tokens predict nothing. The weight's
    gradient is added to what its `main_grad` holds, in the forward pass, and nothing else of its size is kept."""
    weight, labels, factor = with_main_grad(11, 5), torch.randint(-1, 11, (8,)), 0.3
    x, backend = random(8, 5), head_of(num_tokens)
    before = torch.randn_like(weight.main_grad)
    weight.main_grad.copy_(before)
    loss = cross_entropy_sum(x, weight, labels, factor, backend)
    added = weight.main_grad - before
    (factor * loss).backward()
    twin = weight.detach().clone().requires_grad_()
    expected = F.cross_entropy(x @ twin.T, labels, reduction="sum", ignore_index=NO_TARGET)
    torch.testing.assert_close(loss, expected)
    d_x, d_weight = torch.autograd.grad(factor * expected, (x, twin))
    torch.testing.assert_close((x.grad, added), (d_x, d_weight))
    assert torch.equal(weight.main_grad - before, added)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(x, weight, labels, factor, backend), loss)


def test_a_head_without_a_place_for_its_gradient() -> None:
    with pytest.raises(RuntimeError, match="no main_grad"):
        cross_entropy_sum(random(2, 4), random(3, 4), torch.tensor([0, 2]), 1.0, head_of(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_overwrites_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks or as a whole, with the same bits; narrow logits become the gradient of what they are, rounded once."""
    logits, labels = random(7, 13).detach().to(dtype), torch.tensor([0, 12, NO_TARGET, 5, 5, NO_TARGET, 3])
    wide = logits.detach().to(torch.float64).requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="sum", ignore_index=NO_TARGET)
    (gradient,) = torch.autograd.grad(2.0**-30 * expected, wide)
    found = []
    for size in (1, 26, 2**26):
        monkeypatch.setattr("train.model.cross_entropy._WIDE_LOGITS", size)
        d_logits = logits.clone()
        found.append((cross_entropy_(d_logits, labels, 2.0**-30), d_logits))
    for loss, d_logits in found:
        assert torch.equal(d_logits, found[0][1])
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(d_logits.double(), gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-16)


def test_cross_entropy_of_extreme_logits() -> None:
    """A label whose probability underflows still has a finite loss."""
    weight = with_main_grad(3, 1)
    weight.data = torch.tensor([[1e5], [0.0], [-1e5]], dtype=torch.float64)
    x, backend = torch.tensor([[1.0], [-1.0]], dtype=torch.float64), Backend(everywhere(TorchEngine()))
    loss = cross_entropy_sum(x.requires_grad_(), weight, torch.tensor([2, 2]), 1.0, backend)
    assert loss.item() == 2e5


def test_wide_sums_for_bfloat16() -> None:
    """What float32 gives, rounded once. An exponential may miss by some units in the last place."""
    x, weight = 300 * torch.randn(4, 64), torch.randn(64).bfloat16()
    exact = rms_norm_forward(x.bfloat16().double(), weight.double(), 1e-6)[0]
    found = rms_norm_forward(x.bfloat16(), weight, 1e-6)[0]
    assert_within(found, exact, gamma(64 + 8, torch.float32) * exact.abs())
    h = torch.randn(4, 64)
    exact = swiglu_forward(h.bfloat16().double(), None)
    assert_within(swiglu_forward(h.bfloat16(), None), exact, gamma(16, torch.float32) * exact.abs())


def test_rotated_heads() -> None:
    """Pairs half a head apart; as many heads of queries as may be, fewer of keys."""
    table = torch.polar(torch.ones(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    q, k = random(2, 4, 6, 6), random(2, 4, 2, 6)
    for x, out in zip((q, k), Kernels().rotate_heads(q, k, table), strict=True):
        for s, j in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
            angle = torch.angle(table[s, j])
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
            torch.testing.assert_close(out[:, s, :, [j, j + 3]], x[:, s, :, [j, j + 3]] @ turn.t())
    assert gradcheck(lambda *inputs: Kernels().rotate_heads(*inputs, table), (q, k))


def test_rotation_keeps_the_scores_relative() -> None:
    """q_m . k_n depends on m - n alone."""
    positions = torch.arange(9, dtype=torch.float64)
    table = torch.polar(
        torch.ones(9, 4, dtype=torch.float64), torch.outer(positions, torch.rand(4, dtype=torch.float64))
    )
    q, k = (rotate(torch.randn(8, dtype=torch.float64).expand(9, 8), table) for _ in range(2))
    scores = q @ k.T
    for offset in range(9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    eager, compiled = Kernels(), compiled_kernels()
    for num_rows in (6, 9):
        h, da, x = torch.randn(num_rows, 16), torch.randn(num_rows, 8), torch.randn(num_rows, 10)
        weights, norm = torch.rand(num_rows), torch.rand(10)
        torch.testing.assert_close(compiled.swiglu_forward(h, weights), eager.swiglu_forward(h, weights))
        torch.testing.assert_close(compiled.swiglu_backward(da, h, weights), eager.swiglu_backward(da, h, weights))
        y, scale = eager.rms_norm_forward(x, norm, 1e-6)
        torch.testing.assert_close(compiled.rms_norm_forward(x, norm, 1e-6), (y, scale))
        expected = eager.rms_norm_backward(y, x, norm, scale)
        torch.testing.assert_close(compiled.rms_norm_backward(y, x, norm, scale), expected)
