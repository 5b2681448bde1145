"""The passes around Transformer Engine's products as kernels of our own: one launch each, where eager ones are many."""

from __future__ import annotations

from torch import Tensor

from kernels import fp8_rows, fp8_swiglu
from train.precision.eager_passes import EagerPasses
from train.precision.engine import Activation
from train.precision.quantised import ROW_MULTIPLE, Columns, Groups, Rows


class KernelPasses(EagerPasses):
    """`EagerPasses` by kernels. An activation whose width is no multiple of 128 stays eager, because its tiles would
    have parts of both maps' outputs."""

    def encode(self, x: Tensor) -> Tensor:
        return fp8_rows.encode(x if x.stride(-1) == 1 else x.contiguous())

    def take(self, payload: Tensor, source: Tensor, groups: Groups, width: int) -> Rows:
        return Rows(*fp8_rows.take(payload, source, groups.starts, groups.splits, width))

    def quantise_rows(self, x: Tensor, power_of_two: bool) -> Rows:
        return Rows(*fp8_rows.quantise_rows(x, _filled(x), power_of_two))

    def quantise(self, x: Tensor, power_of_two: bool) -> tuple[Rows, Columns]:
        codes, scales, *columns = fp8_rows.quantise(x, _filled(x), power_of_two)
        return Rows(codes, scales), Columns(*columns)

    def columns(self, rows: Rows, groups: Groups, power_of_two: bool) -> Columns:
        return Columns(*fp8_rows.columns(*rows, groups.starts, groups.splits, power_of_two))

    def activate(
        self, activation: Activation, h: Tensor, row_weights: Tensor | None, groups: Groups, power_of_two: bool
    ) -> tuple[Rows, Rows]:
        if not fp8_swiglu.takes(h.shape[1] // 2):
            return super().activate(activation, h, row_weights, groups, power_of_two)
        kept, kept_scales, codes, scales = fp8_swiglu.swiglu_forward(
            h, row_weights, groups.starts, groups.splits, power_of_two
        )
        return Rows(kept, kept_scales), Rows(codes, scales)

    def activate_backward(
        self,
        activation: Activation,
        da: Tensor,
        kept: Rows,
        row_weights: Tensor | None,
        groups: Groups,
        power_of_two: bool,
        gradient_power_of_two: bool,
    ) -> tuple[Columns, Rows, Columns, Tensor | None]:
        how = row_weights, groups, power_of_two, gradient_power_of_two
        if not fp8_swiglu.takes(da.shape[1]):
            return super().activate_backward(activation, da, kept, *how)
        a, a_scales, rows, row_scales, columns, column_scales, d_row_weights = fp8_swiglu.swiglu_backward(
            da, *kept, row_weights, groups.starts, groups.splits, power_of_two, gradient_power_of_two
        )
        return Columns(a, a_scales), Rows(rows, row_scales), Columns(columns, column_scales), d_row_weights


def _filled(x: Tensor) -> int:
    """Rows of x [T, k] up to a multiple."""
    return -(-x.shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE
