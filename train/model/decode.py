"""A model that goes on with a text: the layers of training over caches, and drafts by multi-token prediction.

One sequence, in one process that holds the whole model. N tokens go through at a time: a chunk of the prompt, the next
token, or the next token and drafts of those behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from train.model.attention.cache import Cache
from train.model.attention.rope import rotation_table
from train.model.block import DenseBlock, MoEBlock
from train.model.mtp import MTPModule
from train.model.transformer import Transformer
from train.precision.grads import wide_dtype

Pick = Callable[[Tensor], int]  # logits [V] -> a token


class Decoder:
    """The main model over caches of `capacity` tokens. `length` tokens have been read."""

    def __init__(self, model: Transformer, capacity: int) -> None:
        weight = model.embed_tokens.weight
        self.model = model
        self._layers = [cast(DenseBlock | MoEBlock, layer) for layer in model.layers.values()]
        self.caches: list[Cache] = [layer.self_attn.new_cache(capacity) for layer in self._layers]
        self._table = rotation_table(model.config, capacity, weight.device, weight.dtype)
        self.length = 0

    @torch.no_grad()
    def read(self, tokens: Sequence[int]) -> Tensor:
        """The next N tokens -> the normed states that predict what follows each of them: [1, N, hidden]."""
        table = self._table[self.length : self.length + len(tokens)]
        self.length += len(tokens)
        x = _embed(self.model, tokens)
        for layer, cache in zip(self._layers, self.caches, strict=True):
            x = layer.decode(x, table, cache)
        return self.model.norm(x)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """states [1, N, hidden] -> [N, V], in float32 or wider."""
        return _logits(self.model, states)

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.length = length
        for cache in self.caches:
            cache.rewind(length)


class Depth:
    """One prediction depth k over its own cache: position i joins a state of i with token i + k.

    Positions below `length` are there for good. A position whose token was a draft is read again.
    """

    def __init__(self, model: Transformer, module: MTPModule, capacity: int) -> None:
        weight = model.embed_tokens.weight
        self._model, self._module = model, module
        self.cache: Cache = module.layer.self_attn.new_cache(capacity)
        self._table = rotation_table(model.config, capacity, weight.device, weight.dtype)
        # Inputs that are certain but wait for their token: states of the depth before, from position `length` on.
        self.waiting = weight.new_empty(1, 0, weight.shape[1])

    @property
    def length(self) -> int:
        return self.cache.length

    @torch.no_grad()
    def read(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """The next N positions: states of the depth before [1, N, hidden] and tokens -> normed states, same shape."""
        table = self._table[self.length : self.length + len(tokens)]
        joined = self._module.join(states, _embed(self._model, tokens))
        return self._module.norm(self._module.layer.decode(joined, table, self.cache))


class Drafter:
    """Guesses the tokens behind the next one by the model's prediction depths: depth k drafts the k-th (Eq. 21-23).

    Depths are chained: a draft is the token that the next depth joins.
    """

    def __init__(self, model: Transformer, capacity: int) -> None:
        self.model = model
        self.depths = [Depth(model, cast(MTPModule, module), capacity) for module in model.mtp]

    @torch.no_grad()
    def follow(self, states: Tensor, known: Sequence[int], pick: Pick | None = None) -> list[int]:
        """Read what the main model has read since the last call, and draft.

        states: the main model's normed states of the new positions, [1, N, hidden]. known: all tokens so far, prompt
        included; with `pick`, which chooses the drafts, exactly one more than there are states. Returns a draft per
        depth, without `pick` none.
        """
        tokens, num_certain = list(known), None
        for k, depth in enumerate(self.depths, start=1):
            start = depth.length
            states = torch.cat([depth.waiting, states], 1)
            certain_inputs = states.shape[1] if num_certain is None else num_certain - start
            stop = max(start, min(start + states.shape[1], len(tokens) - k))
            made = (
                depth.read(states[:, : stop - start], tokens[start + k : stop + k]) if stop > start else states[:, :0]
            )
            if pick is not None:
                tokens.append(pick(_logits(self.model, made[:, -1:])[0]))
            # What was joined with a draft, or made from it, is read again when the token is known.
            num_certain = max(start, min(stop, len(known) - k))
            depth.cache.rewind(num_certain)
            depth.waiting = states[:, num_certain - start : certain_inputs]
            states = made
        return tokens[len(known) :]


def _embed(model: Transformer, tokens: Sequence[int]) -> Tensor:
    return model.embed_tokens(torch.tensor([list(tokens)], device=model.embed_tokens.weight.device))


def _logits(model: Transformer, states: Tensor) -> Tensor:
    return model.lm_head(states)[0].to(wide_dtype(states.dtype))
