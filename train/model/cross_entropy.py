"""Softmax and cross-entropy of logits: the element-wise part of the loss, as kernels have it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from train.precision.grads import wide_dtype

# The label of a position that predicts nothing.
NO_TARGET = -1
# Logits that are widened at a time where they are narrow, or many: 256 MiB in float32.
_WIDE_LOGITS = 2**26


class ChunkSize(NamedTuple):
    """How many tokens pass the output head at a time.

    logits: the most that exist at once. min_tokens: what a product is never given less than, whatever the vocabulary.
    """

    logits: int
    min_tokens: int = 256

    def tokens(self, vocab_size: int) -> int:
        """Tokens of a chunk."""
        return max(self.min_tokens, self.logits // vocab_size)


# By kind of device. A CPU's logits stay in its cache. A GPU adds a chunk's weight gradient to all of `main_grad`, in
# memory, so chunks are few: 4,096 tokens of DeepSeek-V3's vocabulary, 1 GiB in bfloat16.
CHUNK_SIZES = {"cpu": ChunkSize(2**21), "cuda": ChunkSize(2**29)}


def softmax_and_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities [C, V], cross-entropy in nats summed where labels count) of logits [C, V] and labels int64 [C].

    ln Σ exp(logits) is recovered from the largest probability, which cannot underflow: the softmax is the only pass
    that takes exponentials.
    """
    target, counts = _targets(labels)
    probabilities = torch.softmax(logits, -1)
    log_sum = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    return probabilities, (log_sum - logits.gather(1, target)).mul_(counts).sum()


def cross_entropy_(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    """Σ of -ln softmax(logits)[label] in nats, a scalar of float32 or wider, where labels are not NO_TARGET.

    logits [C, V] are overwritten by the gradient of factor times the sum; labels int64 [C]. Sums are taken in float32
    for bfloat16 and float32 logits, and in float64 for float64.
    """
    wide = wide_dtype(logits.dtype)
    total = logits.new_zeros((), dtype=wide)
    size = max(1, _WIDE_LOGITS // logits.shape[1])
    for block, labels_of_block in zip(logits.split(size), labels.split(size), strict=True):
        d_logits, loss = softmax_and_loss(block.to(wide), labels_of_block)
        total += loss
        target, counts = _targets(labels_of_block)
        d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
        torch.mul(d_logits, counts.to(wide).mul_(factor), out=block)
    return total


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that can be looked up [C, 1], and whether each counts [C, 1]."""
    labels = labels.unsqueeze(1)
    return labels.clamp(min=0), labels != NO_TARGET
