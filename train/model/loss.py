"""Cross-entropy behind the output head, in chunks of tokens: the logits of a whole batch never exist."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.model.layers import Backend
from train.precision.engine import products_of
from train.precision.grads import main_grad, wide_dtype

# The label of a position that predicts nothing.
NO_TARGET = -1
# Logits of one chunk: enough rows for an efficient product, few enough to stay in a cache.
_CHUNK_LOGITS = 2**21
_MIN_CHUNK_TOKENS = 256


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


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _softmax_and_loss(logits: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities [C, V], cross-entropy summed where it counts) of logits [C, V] and labels, counts [C, 1].

    ln Σ exp(logits) is recovered from the largest probability, which cannot underflow: the softmax is the only pass
    that takes exponentials.
    """
    probabilities = torch.softmax(logits, -1)
    log_sum = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    return probabilities, (log_sum - logits.gather(1, labels)).mul_(counts).sum()


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that can be looked up, and whether each counts."""
    return labels.clamp(min=0), labels != NO_TARGET


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, backend: Backend) -> Tensor:
        head, wide = products_of(backend.engines["lm_head"]), wide_dtype(x.dtype)
        total = x.new_zeros((), dtype=wide)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        for rows in _chunks(len(x), len(weight)):
            target, counts = _targets(labels[rows, None])
            d_logits, loss = _softmax_and_loss(head.fprop(head.operand(x[rows]), weight).to(wide), target, counts)
            total += loss
            d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            d_logits = d_logits.to(x.dtype)
            # What does not count is left out of the narrow operands, not of the wide logits.
            dx[rows] = head.dgrad(d_logits, weight).mul_(counts)
            head.wgrad_(dweight, d_logits, x[rows] * counts)
        ctx.save_for_backward(dx, dweight)
        ctx.weight, ctx.sink = weight, backend.sink
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> Any:
        dx, dweight = ctx.saved_tensors
        ctx.sink(partial(main_grad(ctx.weight).addcmul_, dweight, d_total))
        return dx * d_total, None, None, None


def cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, backend: Backend) -> Tensor:
    """Σ over tokens of -ln softmax(x weightᵀ)[label], in nats; scalar, float32 or wider.

    x [N, d], weight [V, d], labels int64 [N], of which NO_TARGET counts nothing. With gradients enabled they are formed
    on the way, while a chunk's logits are at hand.
    """
    if torch.is_grad_enabled():
        return _CrossEntropySum.apply(x, weight, labels, backend)
    head, total = products_of(backend.engines["lm_head"]), x.new_zeros((), dtype=wide_dtype(x.dtype))
    for rows in _chunks(len(x), len(weight)):
        logits = head.fprop(head.operand(x[rows]), weight).to(total.dtype)
        total += _softmax_and_loss(logits, *_targets(labels[rows, None]))[1]
    return total
