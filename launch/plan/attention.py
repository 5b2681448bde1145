"""Attention's core as a plan sees it: the kernel of a GPU that a run takes, by the shapes that it reads and makes.

Tensors without values lie in the host's memory, where torch would take a kernel of the CPU's. So each kernel of a GPU
has an operation here under its own name, forward and backward, that gives out memory alone. What they keep for the
backward pass is what they all keep: queries, keys, values, the result, and the logarithm of the sum of each row of
scores in float32.

`auto` means here what it means on a Hopper GPU with torch alone: which libraries are on a cluster is not known.
Documents are taken to be as long as rows, which is the most that they may cost.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from train.config import RunConfig
from train.model.attention.choice import AUTO, CORES, TORCH, choose
from train.model.attention.cores import Attend, Core, Documents, TorchCore
from train.model.attention.gpu_cores import LIBRARIES, starts_of

NAMESPACE = "halocline_attention"


def core_without_values(config: RunConfig, kernels: str) -> Core | None:
    """What stands for the core of a run on a device of this kind, "cuda" or "cpu"; None where the core itself does."""
    if kernels != "cuda":
        return None
    asked = config.run.attention_kernel
    name = choose(asked, config.attention_demand, partial(_assumed_missing, is_auto=asked == AUTO))
    return TorchCore() if name == TORCH else _TracedCore(name)


def _assumed_missing(name: str, is_auto: bool) -> str | None:
    return "no library is assumed" if is_auto and name in LIBRARIES else None


class _TracedCore:
    """A kernel of a GPU without its values."""

    asks_for_lengths = True

    def __init__(self, name: str) -> None:
        self.name, self._equal_widths = name, CORES[name].equal_widths
        _operations(name)

    def value_width(self, qk_width: int, v_width: int) -> int:
        return max(qk_width, v_width) if self._equal_widths else v_width

    def causally(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._attend(None, q, k, v, scale)

    def by_document(self, documents: Documents) -> Attend:
        assert documents.num_at_most is not None
        return partial(self._attend, starts_of(documents.numbers, documents.num_at_most))

    def _attend(self, starts: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads_first = (each.transpose(1, 2) for each in (q, k, v))
        return _Attention.apply(self.name, starts, *heads_first).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """query [B, H, S, qk], key [B, G, S, qk], value [B, G, S, v] -> [B, H, S, v]."""

    @staticmethod
    def forward(ctx: Any, name: str, starts: Tensor | None, *heads: Tensor) -> Tensor:
        out, sums = _operation(name)(*heads, starts, True)
        ctx.save_for_backward(*heads, out, sums)
        ctx.name, ctx.starts = name, starts
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        return None, None, *_operation(f"{ctx.name}_backward")(*ctx.saved_tensors, d_out, ctx.starts, True)


def _operation(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), f"scaled_dot_product_{name}")


@lru_cache(maxsize=len(CORES))
def _operations(name: str) -> torch.library.Library:
    """Make a kernel's operations known to torch, for tensors without values alone."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    name = f"scaled_dot_product_{name}"
    heads, rest = "Tensor query, Tensor key, Tensor value", "Tensor? starts, bool is_causal"
    library.define(f"{name}({heads}, {rest}) -> (Tensor, Tensor)")
    library.define(
        f"{name}_backward({heads}, Tensor out, Tensor sums, Tensor d_out, {rest}) -> (Tensor, Tensor, Tensor)"
    )
    library.impl(name, _forward, "Meta")
    library.impl(f"{name}_backward", _backward, "Meta")
    return library


def _forward(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, is_causal: bool) -> Any:
    batch, heads, length, _ = query.shape
    # In memory a position's heads lie together, as those of the queries do.
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _backward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(each) for each in (query, key, value))
