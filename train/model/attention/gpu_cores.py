"""Attention's core by the kernels of GPUs: cuDNN's, FlashAttention 3 and 2, and the one that torch brings along.

The door to the libraries `flash_attn_interface` (FlashAttention-3) and `flash_attn` (2), which nobody needs: torch has
two kernels of its own. Documents go to a kernel as the places where they begin, so that there is no mask, and no work
for pairs of positions that see nothing of each other. None wants its inputs dense: cuDNN's graphs, FlashAttention 2 and
3 and torch's own kernels are told the strides of rows and heads, and ask only that the elements of a head lie together.
Signatures are those of the libraries' sources; not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.model.attention.choice import CORES
from train.model.attention.cores import Attend, Documents, begins, scaled_dot_product

# For what the chosen kernel refuses at a moment, as cuDNN's does a text of one token, and for evaluations of any kind.
_ANY_SHAPE = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
LIBRARIES = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""Kernels that are a library's, by the module to import."""


class GpuCore:
    """A kernel by its name, as `choice` describes it."""

    asks_for_lengths = True

    def __init__(self, name: str) -> None:
        self.name, self.value_width = name, CORES[name].value_width

    def by_document(self, documents: Documents) -> Attend:
        assert documents.num_at_most is not None and documents.longest_at_most is not None
        starts = starts_of(documents.numbers, documents.num_at_most)
        return partial(self._apart, starts, documents.longest_at_most)

    def _apart(self, starts: Tensor, longest: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out = self._by_lengths(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, longest, scale)
        return out.unflatten(0, q.shape[:2])

    def _by_lengths(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        """q, k, v [T, heads, width] of T tokens, where documents begin int32 [N + 1] -> [T, H, v]."""
        raise NotImplementedError(f"{self.name} takes no documents")


class SdpaCore(GpuCore):
    """A fused kernel of torch's own, by the name that torch has for it."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        super().__init__(name)
        self._backends = [backend, *_ANY_SHAPE]

    def causally(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(self._backends, set_priority=True):
            return scaled_dot_product(q, k, v, scale, is_causal=True)


class TorchFlashCore(SdpaCore):
    """FlashAttention-2 as torch brings it along. Whether it repeats its bits is torch's own setting."""

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        super().__init__("torch_flash", SDPBackend.FLASH_ATTENTION)
        # Before 2.13 shared heads of keys were not asked for.
        self._names_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
        self._attend: Any = varlen_attn

    def _by_lengths(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        gqa = {"enable_gqa": k.shape[1] != q.shape[1]} if self._names_gqa else {}
        # A window that reaches nothing to the right is what it calls causal.
        return self._attend(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), **gqa)


class FlashCore(GpuCore):
    """FlashAttention 2 or 3, whose functions take the same words for what is asked here."""

    def __init__(self, name: str, deterministic: bool) -> None:
        super().__init__(name)
        self._attend, self._attend_apart = load(name)
        self._deterministic = deterministic

    def causally(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _output(self._attend(q, k, v, softmax_scale=scale, causal=True, deterministic=self._deterministic))

    def _by_lengths(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        return _output(
            self._attend_apart(
                q,
                k,
                v,
                cu_seqlens_q=starts,
                cu_seqlens_k=starts,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                softmax_scale=scale,
                causal=True,
                deterministic=self._deterministic,
            )
        )


def load(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a library has for rows that are one text, and for documents. ImportError, or whatever it raises, without."""
    library = importlib.import_module(LIBRARIES[name])
    return library.flash_attn_func, library.flash_attn_varlen_func


def _output(found: Tensor | Sequence[Tensor]) -> Tensor:
    """FlashAttention-3 of before autumn 2025 gives out the logarithms of its sums as well."""
    return found if isinstance(found, Tensor) else found[0]


def starts_of(numbers: Tensor, num_at_most: int) -> Tensor:
    """Where documents begin in rows laid end to end, and the end of all: numbers [B, S] -> int32 [num_at_most + 1].

    Made on the device without a read. Documents that are not there are empty, behind the last one.
    """
    place = begins(numbers).flatten().cumsum(0)  # from 1, over all rows
    return torch.searchsorted(place, torch.arange(1, num_at_most + 2, device=place.device), out_int32=True)
