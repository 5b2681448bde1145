"""Rows padded to what kernels of FP8 products take: in all, or for each group of rows that has its own weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Rows of a group are padded to a multiple: they are the inner dim of the weight gradient's product.
ROWS = 16


def missing_rows(num_rows: int) -> int:
    """Rows to add; an empty input gets one round of them, because no kernel is asked for nothing."""
    return -num_rows % ROWS if num_rows else ROWS


@dataclass(frozen=True)
class Padding:
    """Where rows of groups go that are padded to multiples.

    Attributes:
        rows: place of each row among the padded ones, on the device.
        splits: padded rows of each group; on the host, where the library reads them.
        total: padded rows of all groups.
    """

    rows: Tensor
    splits: Tensor
    total: int

    @staticmethod
    def of(splits: list[int], device: torch.device) -> Padding:
        # By numpy: all of it is the host's own, and no operation of the device.
        counts = np.array(splits, dtype=np.int64)
        padded = (counts + ROWS - 1) // ROWS * ROWS
        if not counts.any():
            padded[0] = ROWS
        shifts = (padded.cumsum() - padded) - (counts.cumsum() - counts)
        rows = torch.from_numpy(np.arange(counts.sum()) + np.repeat(shifts, counts))
        if device.type == "cuda":
            # From pinned memory: any other copy would make the host wait for the device.
            rows = rows.pin_memory().to(device, non_blocking=True)
        return Padding(rows, torch.from_numpy(padded), int(padded.sum()))


def pad_rows(x: Tensor, padding: Padding) -> Tensor:
    """x [R, ...] -> [padding.total, ...], zeros between the groups."""
    padded: Tensor = _PadRows.apply(x, padding.rows, padding.total)
    return padded


class _PadRows(torch.autograd.Function):
    """Rows among zeros. Not torch's own `index_copy`, whose node keeps the rows for the sake of their shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return dy.index_select(0, rows), None, None
