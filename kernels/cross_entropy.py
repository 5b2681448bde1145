"""Softmax, cross-entropy and the gradient of logits in one launch: the kernel of `train.model.cross_entropy`.

A program has one token. It goes over the logits twice, which then lie in the cache: for the sum of their exponentials,
kept relative to the largest one so far, and to write the gradient over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two

_BLOCK = 4096


@jit
def _cross_entropy(
    Logits, Labels, Losses, stride, width, factor, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, GRADIENT: tl.constexpr
):
    wide = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(Labels + row)
    Logits += row * stride
    columns = tl.arange(0, BLOCK)
    top = tl.full((1,), float("-inf"), wide)
    total = tl.zeros((1,), wide)
    own = tl.zeros((1,), wide)
    for first in range(0, width, BLOCK):
        places = first + columns
        x = tl.load(Logits + places, mask=places < width, other=float("-inf")).to(wide)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        # Not loaded by itself: another thread may have overwritten it by then.
        own += tl.sum(tl.where(places == label, x, 0.0), 0)
        top = higher
    one = tl.arange(0, 1)
    tl.store(Losses + row + one, tl.where(label >= 0, tl.log(total) + top - own, 0.0))
    if GRADIENT:
        scale = tl.where(label >= 0, factor, 0.0)
        for first in range(0, width, BLOCK):
            places = first + columns
            x = tl.load(Logits + places, mask=places < width, other=float("-inf")).to(wide)
            slope = (tl.exp(x - top) / total - tl.where(places == label, 1.0, 0.0)) * scale
            tl.store(Logits + places, slope.to(Logits.dtype.element_ty), mask=places < width)


def _launch(logits: Tensor, labels: Tensor, factor: float, gradient: bool) -> tuple[Tensor, Launch]:
    num_rows, width = logits.shape
    losses = logits.new_empty(num_rows, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    constants = {
        "BLOCK": min(_BLOCK, power_of_two(width)), "DOUBLE": logits.dtype == torch.float64, "GRADIENT": gradient
    }  # fmt: skip
    arguments = logits, labels, losses, logits.stride(0), width, factor
    passes = 2 if gradient else 1
    return losses, Launch(
        _cross_entropy, (num_rows,), arguments, constants, num_warps=8,
        read_bytes=passes * logits.nbytes + labels.nbytes,
        written_bytes=(passes - 1) * logits.nbytes + losses.nbytes,
    )  # fmt: skip


@operation("cross_entropy_(Tensor(a!) logits, Tensor labels, float factor) -> Tensor")
def _plan_gradient(logits: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Launch]:
    return _launch(logits, labels, factor, gradient=True)


@operation("cross_entropy(Tensor logits, Tensor labels) -> Tensor")
def _plan_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Launch]:
    return _launch(logits, labels, 0.0, gradient=False)


def cross_entropy_(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    """Σ of -ln softmax(logits)[label] in nats, a scalar of float32 or wider, where labels are at least 0.

    logits [C, V] are overwritten by the gradient of factor times the sum; labels int64 [C].
    """
    return _plan_gradient(logits, labels.contiguous(), factor).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """That sum alone; logits [C, V] stay as they are."""
    return _plan_loss(logits, labels.contiguous()).sum()
