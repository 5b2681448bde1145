"""What attention keeps of the tokens it has seen, while text is generated one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from train.model.attention.kernels import attend_cached


class Cache:
    """Rows of one layer's tokens, in order of their positions, with room for `capacity` of them."""

    def __init__(self, capacity: int, like: Tensor) -> None:
        """like: a tensor of the type and on the device that rows have."""
        self.capacity, self.length, self._like = capacity, 0, like

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        assert 0 <= length <= self.length, f"{length=} of {self.length} tokens"
        self.length = length

    def _rows(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self._like.dtype, device=self._like.device)

    def _grow(self, num_tokens: int) -> slice:
        """The rows of the next tokens."""
        start, stop = self.length, self.length + num_tokens
        assert stop <= self.capacity, f"{stop} tokens in a cache of {self.capacity}"
        self.length = stop
        return slice(start, stop)


class LatentCache(Cache):
    """Multi-head latent attention: a token's normed latent, and the rotated key that all heads share.

    All heads read the same rows, so that their queries are rows of one product.
    """

    def __init__(self, capacity: int, rank: int, rope: int, like: Tensor) -> None:
        super().__init__(capacity, like)
        self._rank, self._kept = rank, self._rows(capacity, rank + rope)

    def append(self, latent: Tensor, k_rope: Tensor) -> None:
        """latent [N, rank] and k_rope [N, rope] of the next N tokens."""
        rows = self._kept[self._grow(len(latent))]
        rows[:, : self._rank].copy_(latent)
        rows[:, self._rank :].copy_(k_rope)

    def attend(self, queries: Tensor, scale: float) -> Tensor:
        """queries [H, N, rank + rope] of the last N tokens, causal -> [H, N, rank]: latents, mixed for each head."""
        num_heads, num_tokens, _ = queries.shape
        kept = self._kept[None, : self.length]
        mixed = attend_cached(queries.flatten(0, 1)[None], kept, kept[..., : self._rank], num_tokens, scale)
        return mixed.view(num_heads, num_tokens, self._rank)


class GroupedCache(Cache):
    """Grouped-query and multi-head attention: a token's rotated keys and its values, for every head of those."""

    def __init__(self, capacity: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__(capacity, like)
        self._keys, self._values = (self._rows(num_heads, capacity, head_dim) for _ in range(2))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """keys and values [N, heads of keys, head_dim] of the next N tokens."""
        rows = self._grow(len(keys))
        self._keys[:, rows].copy_(keys.transpose(0, 1))
        self._values[:, rows].copy_(values.transpose(0, 1))

    def attend(self, queries: Tensor, scale: float) -> Tensor:
        """queries [H, N, head_dim] of the last N tokens, causal -> the same shape."""
        num_heads, num_tokens, head_dim = queries.shape
        keys, values = self._keys[:, : self.length], self._values[:, : self.length]
        grouped = queries.reshape(len(keys), num_heads // len(keys) * num_tokens, head_dim)
        return attend_cached(grouped, keys, values, num_tokens, scale).reshape(num_heads, num_tokens, head_dim)
