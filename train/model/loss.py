"""Cross-entropy behind the output head, in chunks of tokens: the logits of a whole batch never exist."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.model.cross_entropy import softmax_and_loss
from train.model.layers import Backend
from train.precision.engine import products_of
from train.precision.grads import main_grad, wide_dtype


class LossTerms(NamedTuple):
    """Factor of each loss per summed unit, known before the step: gradients of micro-batches and ranks then just add.

    main: 1 / targets of the global batch, its predicted tokens. mtp: lambda / (D * the same). The balance losses of
    experts, devices and communication: alpha / sequences of the global batch.
    """

    main: float
    mtp: float
    balance: float
    device_balance: float = 0.0
    comm_balance: float = 0.0


# Of passes whose loss nobody differentiates.
NO_LOSS = LossTerms(0.0, 0.0, 0.0)


def _chunks(num_tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


class _CrossEntropySum(torch.autograd.Function):
    """Its gradients are formed in the forward pass, while a chunk's logits are at hand: that of x is kept until the
    backward pass, that of the weight is added to `main_grad` at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, factor: float, backend: Backend) -> Tensor:
        head, total = products_of(backend.engines["lm_head"]), x.new_zeros((), dtype=wide_dtype(x.dtype))
        dx, accumulator = torch.empty_like(x), main_grad(weight)
        for rows in _chunks(len(x), backend.kernels.chunk_size.tokens(len(weight))):
            logits = head.fprop(head.operand(x[rows]), weight)
            total += backend.kernels.cross_entropy_(logits, labels[rows], factor)
            dx[rows] = head.dgrad(logits, weight)
            head.wgrad_(accumulator, logits, x[rows])
            del logits  # before those of the next chunk are made
        ctx.save_for_backward(dx)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> Any:
        return ctx.saved_tensors[0], None, None, None, None


def cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, factor: float, backend: Backend) -> Tensor:
    """Σ over tokens of -ln softmax(x weightᵀ)[label], in nats; scalar, float32 or wider.

    x [N, d], weight [V, d], labels int64 [N], of which NO_TARGET counts nothing. With gradients enabled the sum takes
    part in a loss as `factor` times itself and in no other way: whatever gradient reaches it in the backward pass, x
    gets that of factor * sum. The weight's has been added to its `main_grad` by then; RuntimeError if it has none.
    """
    if torch.is_grad_enabled():
        return _CrossEntropySum.apply(x, weight, labels, factor, backend)
    head, total = products_of(backend.engines["lm_head"]), x.new_zeros((), dtype=wide_dtype(x.dtype))
    for rows in _chunks(len(x), backend.kernels.chunk_size.tokens(len(weight))):
        logits = head.fprop(head.operand(x[rows]), weight).to(total.dtype)
        total += softmax_and_loss(logits, labels[rows])[1]
    return total
