"""Kernels of attention's core: which one a run takes, what it is called with, and that all compute the same.

Their libraries and a GPU are not here. Stand-ins have the signatures of the libraries' sources (flash-attention 2.8.3;
3 at c082294 and, with two results, before it) and refuse what the kernels refuse; torch's own signatures are those of
the torch that is installed. What they compute is the formula, document by document.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from tests.train.model_cases import TINY, build, same_bits
from tests.train.test_packing import END, TERMS, documents, packed
from train.compose import compose
from train.model.attention import gpu_cores, installed
from train.model.attention.choice import AUTO, CORES, Demand, choose, objection
from train.model.attention.cores import Core, Documents, HostCore, TorchCore, begins
from train.model.attention.gpu_cores import starts_of
from train.model.attention.installed import MAKERS, build_core, library_missing
from train.model.packing import ByDocument, OneText

CPU = torch.device("cpu")
V3 = Demand(192, 128, two_bytes=True)


def formula(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, equal: bool) -> Tensor:
    """Causal attention of each document, [T, heads, width], as kernels compute it; checks what they check."""
    assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q) == len(k) == len(v)
    lengths = starts.diff()
    assert (lengths >= 0).all() and lengths.max() <= longest
    assert q.shape[-1] == k.shape[-1] and (not equal or v.shape[-1] == k.shape[-1])
    shared, out = q.shape[1] // k.shape[1], []
    for part in zip(*(each.split(lengths.tolist()) for each in (q, k, v)), strict=True):
        mine, keys, values = part[0], *(each.repeat_interleave(shared, 1) for each in part[1:])
        scores = torch.einsum("shd,thd->hst", mine, keys) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        out.append(torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def whole(q: Tensor, k: Tensor, v: Tensor, scale: float, equal: bool) -> Tensor:
    """The same of rows [B, S, heads, width] that are one text each."""
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32) * q.shape[1]
    flat = (each.flatten(0, 1) for each in (q, k, v))
    return formula(*flat, starts, q.shape[1], scale, equal).unflatten(0, q.shape[:2])


class Flash2(types.ModuleType):
    """`flash_attn` 2.8.3, flash_attn_interface.py."""

    asked: list[bool]

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
        window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and not dropout_p
        self.asked.append(deterministic)
        return whole(q, k, v, softmax_scale, equal=True)

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
        softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False,
        block_table: Any = None,
    ) -> Any:  # fmt: skip
        assert causal and not dropout_p and max_seqlen_q == max_seqlen_k and torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.asked.append(deterministic)
        return formula(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, equal=True)


class Flash3(types.ModuleType):
    """`flash_attn_interface`, hopper/flash_attn_interface.py."""

    asked: list[bool]

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and qv is None
        self.asked.append(deterministic)
        return whole(q, k, v, softmax_scale, equal=False)

    def flash_attn_varlen_func(
        self, q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False, qv: Any = None,
        q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
        deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and qv is None and max_seqlen_q == max_seqlen_k and torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.asked.append(deterministic)
        return formula(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, equal=False)


class Flash3Before(Flash3):
    """Until autumn 2025 the logarithms of the sums came with the result."""

    def flash_attn_func(self, *args: Any, deterministic: bool = False, **options: Any) -> Any:
        out = super().flash_attn_func(*args, deterministic=deterministic, **options)
        return out, out[..., 0]

    def flash_attn_varlen_func(self, *args: Any, deterministic: bool = False, **options: Any) -> Any:
        out = super().flash_attn_varlen_func(*args, deterministic=deterministic, **options)
        return out, out[..., 0]


def varlen(new: bool) -> Callable[..., Tensor]:
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.13 and of 2.11."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: bool = False,
        seqused_k: Any = None, block_table: Any = None, num_splits: Any = None,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0) and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
        assert enable_gqa == (query.shape[1] != key.shape[1]) or not new
        return formula(query, key, value, cu_seq_q, max_q, scale, equal=True)

    def attend_before(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1),
    ) -> Tensor:  # fmt: skip
        return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return attend if new else attend_before


@contextmanager
def libraries(flash3: type[Flash3] = Flash3, new_torch: bool = True) -> Iterator[dict[str, list[bool]]]:
    """Inside, all kernels are there; yields what the libraries' were asked about repeating their bits."""
    modules = {"flash_attn": Flash2("flash_attn"), "flash_attn_interface": flash3("flash_attn_interface")}
    for module in modules.values():
        module.asked = []
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch("torch.nn.attention.varlen.varlen_attn", varlen(new_torch)),
    ):
        yield {name: module.asked for name, module in modules.items()}


OTHERS = [name for name in CORES if name != "torch"]


def test_stand_ins_have_torchs_own_signature() -> None:
    from torch.nn.attention.varlen import varlen_attn

    ours, theirs = (inspect.signature(each).parameters for each in (varlen(True), varlen_attn))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(("flash3", "new_torch"), [(Flash3, True), (Flash3Before, False)], ids=["new", "before"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("groups", [4, 2])
def test_every_kernel_attends_as_torch_does(name: str, groups: int, flash3: type[Flash3], new_torch: bool) -> None:
    """Values, and gradients of all three, for rows that are one text and for documents, of which some are not there."""
    draw = torch.Generator().manual_seed(3)
    numbers = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
    with libraries(flash3, new_torch):
        core = MAKERS[name](False)
        width = core.value_width(8, 5)
        assert width == (8 if CORES[name].equal_widths else 5)
        shapes = [(2, 7, 4, 8), (2, 7, groups, 8), (2, 7, groups, width)]
        heads = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
        weights = torch.randn(2, 7, 4, width, generator=draw, dtype=torch.float64)

        def results(core: Core, is_apart: bool) -> list[Tensor]:
            packed = Documents(numbers, torch.float64, num_at_most=9, longest_at_most=7)
            attend = core.by_document(packed) if is_apart else core.causally
            out = attend(*heads, 0.3)  # type: ignore[call-arg]
            return [out, *torch.autograd.grad((out * weights).sum(), heads)]

        for is_apart in (False, *([True] if CORES[name].by_document else [])):
            for found, expected in zip(results(core, is_apart), results(HostCore(), is_apart), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["flash_attention_3", "torch_flash"])
def test_a_model_trains_alike_by_documents(name: str) -> None:
    """Losses and gradients of a model with prediction depths, whose rows are shorter: the host reads two numbers a
    micro-batch, the documents are those of its tokens, and the mask is nowhere."""
    rows = torch.cat(documents(TINY, [6, 3, 1, 8, 5, 9, 4, 20], 7)).view(4, 14)
    expected_output, expected = packed(build(TINY, packing=ByDocument(END, HostCore())), rows)
    read: list[list[int]] = []

    def reading(numbers: Tensor) -> list[int]:
        read.append(numbers.tolist())
        return numbers.tolist()

    with libraries():
        output, found = packed(build(TINY, packing=ByDocument(END, MAKERS[name](False), reading)), rows)
    numbers = (rows == END).cumsum(1).roll(1, 1)
    numbers[:, 0] = 0
    assert read == 2 * [[int(begins(numbers[:, :-1]).sum()), 13]] or len(read) <= 2
    assert same_bits({}, {}) and output.metrics.keys() == expected_output.metrics.keys()
    # Another order of sums in fp64.
    for key, value in output.metrics.items():
        torch.testing.assert_close(value, expected_output.metrics[key], rtol=1e-10, atol=1e-10)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12)
