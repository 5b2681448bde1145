"""The passes around Transformer Engine's products (`quantised.Passes`) by operations of torch, on any device.

What each computes is said here. Kernels do the same in one launch each (`kernels.fp8_rows`, `kernels.fp8_swiglu`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.precision import tiles
from train.precision.blockwise import TILE
from train.precision.codec import Fp8Rows
from train.precision.coded import parts_of
from train.precision.engine import Activation
from train.precision.quantised import ROW_MULTIPLE, Columns, Groups, Rows


class EagerPasses:
    """Each pass as several operations."""

    def encode(self, x: Tensor) -> Tensor:
        """x [N, d] -> bytes, as `codec.Fp8Rows` has them."""
        return Fp8Rows(x.shape[1]).encode(x)

    def take(self, payload: Tensor, source: Tensor, groups: Groups, width: int) -> Rows:
        """payload, bytes of N rows; source [P] -> those rows, and zeros where source is N."""
        # A row of zeros: scales that are not used may be anything finite.
        payload = torch.nn.functional.pad(payload, (0, 0, 0, 1))
        parts = parts_of(Fp8Rows(width).arrive(payload, source, list(groups.splits), torch.float32))
        assert parts is not None
        return _by_group(parts, groups)

    def quantise_rows(self, x: Tensor, power_of_two: bool) -> Rows:
        """x [T, k] -> tiles of 1 x 128 of its rows, and rows of zeros up to a multiple."""
        x = _filled_up(x)
        return _by_group(tiles.keep_rows(x, power_of_two), Groups((x.shape[0],)))

    def quantise(self, x: Tensor, power_of_two: bool) -> tuple[Rows, Columns]:
        """x [T, k] -> tiles of 1 x 128, and tiles of 128 x 1, of its rows and of zeros up to a multiple."""
        x = _filled_up(x)
        groups = Groups((x.shape[0],))
        return _by_group(tiles.keep_rows(x, power_of_two), groups), _columns_of(x, groups, power_of_two)

    def columns(self, rows: Rows, groups: Groups, power_of_two: bool) -> Columns:
        """Tiles of 128 x 1 of what quantised rows stand for (technical report, section 3.5.2)."""
        return _columns_of(_restored(rows, groups), groups, power_of_two)

    def activate(
        self, activation: Activation, h: Tensor, row_weights: Tensor | None, groups: Groups, power_of_two: bool
    ) -> tuple[Rows, Rows]:
        """h [P, 2f], row_weights [P] -> tiles of 1 x 128 of h, to be kept, and of its activation [P, f]."""
        a = activation.swiglu_forward(h, row_weights)
        kept, found = (tiles.keep_rows(each, power_of_two) for each in (h, a))
        return _by_group(kept, groups), _by_group(found, groups)

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
        """da [P, f] and the kept rows of h -> columns of the activation, rows and columns of the gradient of h, and
        the gradient of row_weights."""
        h = _restored(kept, groups).to(da.dtype)
        a, dh, d_row_weights = activation.swiglu_backward(da, h, row_weights)
        rows = _by_group(tiles.keep_rows(dh, gradient_power_of_two), groups)
        columns = _columns_of(a, groups, power_of_two), _columns_of(dh, groups, gradient_power_of_two)
        return columns[0], rows, columns[1], d_row_weights


def _filled_up(x: Tensor) -> Tensor:
    """x [T, k] and rows of zeros up to a multiple."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % ROW_MULTIPLE))


def _by_group(kept: tiles.Kept, groups: Groups) -> Rows:
    """Scales [P, tiles] in the order of the library."""
    codes, scales = kept
    return Rows(codes, torch.cat([part.t().reshape(-1) for part in scales.split(list(groups.splits))]))


def _restored(rows: Rows, groups: Groups) -> Tensor:
    """What quantised rows stand for, float32 [P, k]."""
    scales = torch.cat([part.scales.t() for part in groups.rows(rows)])
    return tiles.restore_rows((rows.codes, scales))


def _columns_of(x: Tensor, groups: Groups, power_of_two: bool) -> Columns:
    """x [P, k]: tiles of 128 x 1 that begin at each group's first row."""
    parts = [tiles.keep_rows(part.t().contiguous(), power_of_two) for part in x.split(list(groups.splits))]
    codes = torch.cat([codes.view(torch.uint8).reshape(-1) for codes, _ in parts]).view(torch.float8_e4m3fn)
    scales = torch.cat([scales.t().reshape(-1, x.shape[1]) for _, scales in parts])
    assert scales.shape[0] == sum(-(-length // TILE) for length in groups.splits)
    return Columns(codes, scales)
