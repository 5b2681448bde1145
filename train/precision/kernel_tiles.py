"""The quantisers of `tiles` as kernels for a GPU: the same bits, one launch each where torch has twenty."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kernels import fp8_rows, fp8_values
from train.precision.tiles import Kept


class KernelTiles:
    """`tiles`, by kernels; its functions are told there."""

    def round_rows(self, x: Tensor, power_of_two: bool = False) -> Tensor:
        return self.restore_rows(self.keep_rows(x, power_of_two))

    def keep_rows(self, x: Tensor, power_of_two: bool = False) -> Kept:
        rows = x.reshape(-1, x.shape[-1])
        codes, scales = fp8_rows.quantise_rows(rows, rows.shape[0], power_of_two)
        by_row = scales.view(-1, rows.shape[0]).t()
        return codes.view(x.shape), by_row.reshape(*x.shape[:-1], by_row.shape[1])

    def enter_rows(self, x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Kept]:
        kept = self.keep_rows(x, power_of_two)
        return self.restore_rows(kept), kept

    def restore_rows(self, kept: Kept) -> Tensor:
        codes, scales = kept
        rows = codes.reshape(-1, codes.shape[-1])
        return fp8_values.restore(rows, scales.reshape(rows.shape[0], scales.shape[-1])).view(codes.shape)

    def round_group_columns(self, x: Tensor, groups: Sequence[slice], power_of_two: bool = False) -> list[Tensor]:
        if not groups:
            return []
        # Groups lie one behind another, from the first row on.
        splits = [rows.stop - rows.start for rows in groups]
        x = x[groups[0].start : groups[-1].stop]
        x = x if x.stride(-1) == 1 else x.contiguous()
        rounded = fp8_values.round_tiles(x, _starts(splits, x.device), splits, False, power_of_two)
        return list(rounded.split(splits))

    def round_blocks(self, weight: Tensor, power_of_two: bool = False, out: Tensor | None = None) -> Tensor:
        matrices = weight.reshape(-1, weight.shape[-1])
        splits = [weight.shape[-2]] * (matrices.shape[0] // weight.shape[-2])
        starts = _starts(splits, weight.device)
        rounded = fp8_values.round_tiles(matrices, starts, splits, True, power_of_two).view(weight.shape)
        return rounded if out is None else out.copy_(rounded)


def _starts(splits: list[int], device: torch.device) -> Tensor | None:
    """The first row of each group and the end, on the device; None for one group."""
    if len(splits) == 1:
        return None
    starts = torch.tensor([0, *accumulate(splits)], dtype=torch.int32)
    # From pinned memory: any other copy would make the host wait for the device.
    return starts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else starts
