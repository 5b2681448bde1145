"""The door to Transformer Engine: FP8 products by the library's kernels on GPUs that have them. Not yet run on a GPU.

The library multiplies, and quantises weights; parameters, `main_grad`, autograd and order stay ours. What it multiplies
lies as it reads it (`quantised`), made in one pass each (`Passes`), and rows that have travelled in E4M3 are handed on
as they came. Its own modules would quantise by themselves, from bfloat16, rows and columns of every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from train.precision.coded import CodedRows, parts_of
from train.precision.config import Fp8
from train.precision.engine import Activation, Products
from train.precision.quantised import ROW_MULTIPLE, Columns, Groups, Passes, Rows

# Widths of matrices have to be multiples by themselves (`build.check_widths`).
WIDTH = 16
CAPABILITY = (9, 0)


@lru_cache(maxsize=1)
def _library() -> Any:
    """transformer_engine.pytorch, imported when first needed: it takes seconds, and a GPU."""
    import transformer_engine.pytorch as te

    return te


def missing(device: torch.device | str) -> str | None:
    """Why Transformer Engine cannot multiply on this device, as the end of a sentence; None where it can."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return "it needs a GPU, and the run is on a CPU"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"it needs a GPU of compute capability 9.0 (Hopper), not {torch.cuda.get_device_capability()}"
    try:
        available, reason = _library().is_fp8_block_scaling_available(return_reason=True)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"it is not installed (pip install --no-build-isolation -e '.[cuda]'): {error}"
    return None if available else f"it says: {reason}"


class Library(Protocol):
    """What is used of Transformer Engine: the library itself, or what stands for it where nothing is computed."""

    def quantise(self, weight: Tensor, power_of_two: bool) -> Any:
        """weight [n, k] in blocks of 128 x 128, by rows, as the forward product takes it."""
        ...

    def with_columns(self, quantised: Any) -> Any:
        """A quantised weight by columns as well, as the gradient of an input takes it: the same codes, transposed. What
        is given is left as it is."""
        ...

    def multiply(self, rows: Rows, groups: Groups, weights: Sequence[Any], out: Tensor, transposed: bool) -> None:
        """Fill out [P, n] with each group's rows times its weight, transposed, or [P, k] with those times the weight
        itself."""
        ...

    def multiply_add(self, of_dy: Sequence[Columns], of_x: Sequence[Columns], into: Sequence[Tensor]) -> None:
        """into[e] [n, k], float32, += dyᵀ x of group e, none of which is empty."""
        ...


class Installed:
    """The library itself."""

    def quantise(self, weight: Tensor, power_of_two: bool) -> Any:
        return self._quantiser(2, power_of_two, columnwise=False)(weight)

    def with_columns(self, quantised: Any) -> Any:
        found = type(quantised)(**quantised.get_metadata())
        found.update_usage(rowwise_usage=True, columnwise_usage=True)
        return found

    def multiply(self, rows: Rows, groups: Groups, weights: Sequence[Any], out: Tensor, transposed: bool) -> None:
        operands = [self._storage(each, None) for each in groups.rows(rows)]
        how: dict[str, Any] = {"layout": "TN" if transposed else "NN", "use_split_accumulator": True}
        if len(weights) == 1:
            self._gemm.general_gemm(weights[0], operands[0], out_dtype=out.dtype, out=out, **how)
            return
        how |= {"m_splits": list(groups.splits), "single_output": True}
        self._gemm.general_grouped_gemm(list(weights), operands, [out], [None] * len(weights), out.dtype, **how)

    def multiply_add(self, of_dy: Sequence[Columns], of_x: Sequence[Columns], into: Sequence[Tensor]) -> None:
        left, right = ([self._storage(None, each) for each in side] for side in (of_x, of_dy))
        how: dict[str, Any] = {"layout": "NT", "use_split_accumulator": True, "accumulate": True}
        if len(into) == 1:
            self._gemm.general_gemm(left[0], right[0], out_dtype=into[0].dtype, out=into[0], **how)
            return
        splits = [each.codes.shape[1] for each in of_dy]
        self._gemm.general_grouped_gemm(
            left, right, list(into), [None] * len(into), into[0].dtype, m_splits=splits, **how
        )

    @cached_property
    def _gemm(self) -> Any:
        _library()
        from transformer_engine.pytorch.cpp_extensions import gemm

        return gemm

    @lru_cache(maxsize=4)  # noqa: B019 - one of it lives as long as the run
    def _quantiser(self, dim: int, power_of_two: bool, columnwise: bool = True) -> Any:
        """E4M3 without a floor, in tiles of 1 x 128 or, with two dims, blocks of 128 x 128."""
        te = _library()
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

        quantiser = Float8BlockQuantizer(
            te.DType.kFloat8E4M3,
            rowwise=True,
            columnwise=columnwise,
            amax_epsilon=0.0,
            force_pow_2_scales=power_of_two,
            block_scaling_dim=dim,
        )
        quantiser.internal = True
        return quantiser

    def _storage(self, rows: Rows | None, columns: Columns | None) -> Any:
        """The library's own tensor over one group's rows or columns, as it would have quantised them."""
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
            Float8BlockwiseQTensorStorage,
        )

        return Float8BlockwiseQTensorStorage(
            rowwise_data=None if rows is None else rows.codes.view(torch.uint8),
            rowwise_scale_inv=None if rows is None else rows.scales,
            columnwise_data=None if columns is None else columns.codes.view(torch.uint8),
            columnwise_scale_inv=None if columns is None else columns.scales,
            fp8_dtype=_library().DType.kFloat8E4M3,
            quantizer=self._quantiser(1, True),
            is_2D_scaled=False,
            fake_dtype=torch.bfloat16,
        )


class LibraryWeights:
    """What all engines of a run share: the quantised weights, made when first used and until they change.

    They are kept by rows. A block's codes by columns are the same ones transposed, which takes one percent
    of a forward and a backward of V3 (planned, not yet run on a GPU), and would take the memory of the rows a second
    time if they were kept.
    """

    def __init__(self, passes: Passes, power_of_two: bool = False, library: Library | None = None) -> None:
        """power_of_two: for all scales, whatever an engine's own `Fp8` says. library: None is the installed one."""
        self.passes, self.power_of_two, self.library = passes, power_of_two, library or Installed()
        self._quantised: dict[int, tuple[Tensor, int, list[Any]]] = {}
        self._is_current: set[int] = set()

    def changed(self) -> None:
        """An optimizer has stepped, or a checkpoint was read: weights are quantised anew when next used."""
        self._is_current.clear()

    def of(self, weight: Tensor) -> list[Any]:
        """weight [n, k], or [E, n, k], as the library's products take it: one for each group."""
        key = id(weight)
        found = self._quantised.get(key)
        # The count of in-place changes does not see those made through a flat buffer: `changed` says them.
        if found is None or key not in self._is_current or found[1] != weight._version:
            self._quantised.pop(key, None)
            parts = weight.detach().view(-1, *weight.shape[-2:])
            quantised = [self.library.quantise(part, self.power_of_two) for part in parts]
            found = self._quantised[key] = weight, weight._version, quantised
            self._is_current.add(key)
        return found[2]

    def by_columns(self, weight: Tensor) -> list[Any]:
        """`of`, as the products take it that give gradients of inputs; made anew for each."""
        return [self.library.with_columns(each) for each in self.of(weight)]


class TransformerEngine(Products):
    """An engine that multiplies in one way (`Fp8`): inputs kept as E4M3 rows, of which columns are made for the weight
    gradient, except where more is to be kept of an input than E4M3 has: then columns of it are made at once."""

    def __init__(self, fp8: Fp8, weights: LibraryWeights, splits: list[int] | None = None) -> None:
        """splits: rows of each group of stacked weights; None for weights that are not stacked."""
        self._fp8, self._weights, self._splits = fp8, weights, splits
        self._library, self._passes = weights.library, weights.passes
        self._round_input = fp8.round_input or weights.power_of_two
        self._round_gradient = fp8.round_gradient or weights.power_of_two
        self._groups: Groups | None = None

    def grouped(self, splits: list[int]) -> TransformerEngine:
        return TransformerEngine(self._fp8, self._weights, splits)

    def codec(self, width: int) -> LibraryRows:
        return LibraryRows(width, self._passes)

    def enter(self, x: Tensor) -> tuple[Rows, tuple[Tensor, ...]]:
        parts = parts_of(x)
        if parts is not None:
            return Rows(*parts), parts
        self._check_plain()
        if self._fp8.keep == "e4m3":
            rows = self._passes.quantise_rows(x, self._round_input)
            return rows, rows
        return self._passes.quantise(x, self._round_input)

    def operand_of_kept(self, kept: tuple[Tensor, ...]) -> Rows:
        assert self._fp8.keep == "e4m3", "columns are no operand of a forward product"
        return Rows(*kept)

    def restore(self, kept: tuple[Tensor, ...]) -> Columns:
        if self._fp8.keep != "e4m3":
            return Columns(*kept)
        rows = Rows(*kept)
        return self._passes.columns(rows, self._grouping(rows.codes), self._round_input)

    def enter_gradient(self, dy: Tensor) -> tuple[Rows, Rows | Columns]:
        parts = parts_of(dy)
        if parts is not None:
            return Rows(*parts), Rows(*parts)
        self._check_plain()
        return self._passes.quantise(dy, self._round_gradient)

    def _grouping(self, rows: Tensor) -> Groups:
        """How rows [P, ...] are divided."""
        if self._splits is None:
            return Groups((rows.shape[0],))
        if self._groups is None:
            self._groups = Groups.of(self._splits, rows.device)
        return self._groups

    def _check_plain(self) -> None:
        assert self._splits is None, "rows of groups come through the engine's codec"

    def fprop(self, operand: Rows, weight: Tensor) -> Tensor:
        return self._product(operand, weight, weight.shape[-2], transposed=True)

    def dgrad(self, dy: Rows, weight: Tensor) -> Tensor:
        return self._product(dy, weight, weight.shape[-1], transposed=False)

    def _product(self, operand: Rows, weight: Tensor, width: int, transposed: bool) -> Tensor:
        out = weight.new_empty(operand.codes.shape[0], width)
        if operand.codes.shape[0]:
            groups = self._grouping(operand.codes)
            weights = self._weights.of(weight) if transposed else self._weights.by_columns(weight)
            self._library.multiply(operand, groups, weights, out, transposed)
        return out

    def wgrad_(self, accumulator: Tensor, dy: Rows | Columns, x: Columns) -> None:
        groups = self._grouping(x.codes.view(x.scales.shape[1], -1).t())
        if isinstance(dy, Rows):
            dy = self._passes.columns(dy, groups, self._round_gradient)
        parts = zip(groups.columns(dy), groups.columns(x), accumulator.view(-1, *accumulator.shape[-2:]), strict=True)
        found = [each for each in parts if each[0].codes.shape[1]]
        if found:
            of_dy, of_x, into = zip(*found, strict=True)
            self._library.multiply_add(of_dy, of_x, into)

    def activate(self, activation: Activation, h: Tensor, row_weights: Tensor | None) -> tuple[Rows, Rows]:
        kept, rows = self._passes.activate(activation, h, row_weights, self._grouping(h), self._round_input)
        return rows, kept

    def keep_hidden(self, activation: Activation, h: Tensor) -> Rows:
        # By the pass that made it, for its bits and for one launch; weights of rows have no part in it.
        return self._passes.activate(activation, h, None, self._grouping(h), self._round_input)[0]

    def activate_backward(  # type: ignore[override]
        self,
        up: TransformerEngine,
        activation: Activation,
        da: Tensor,
        kept: tuple[Tensor, ...],
        row_weights: Tensor | None,
    ) -> tuple[Columns, tuple[Rows, Columns], Tensor | None]:
        a, rows, columns, d_row_weights = self._passes.activate_backward(
            activation, da, Rows(*kept), row_weights, self._grouping(da), self._round_input, up._round_gradient
        )
        return a, (rows, columns), d_row_weights


class LibraryRows:
    """`codec.Fp8Rows` for Transformer Engine: the same bytes, which arrive as its products read them.

    What an expert's rows lack to a multiple is made up by rows of zeros, which add nothing to any sum or scale.
    """

    row_multiple = ROW_MULTIPLE

    def __init__(self, width: int, passes: Passes) -> None:
        self._width, self._passes = width, passes

    def encode(self, rows: Tensor) -> Tensor:
        return self._passes.encode(rows)

    def arrive(self, payload: Tensor, source: Tensor, splits: list[int], dtype: torch.dtype) -> Tensor:
        groups = Groups.of(splits, payload.device)
        rows = self._passes.take(payload, source, groups, self._width)
        return CodedRows(rows, rows.codes.shape, dtype)
