"""Copying rows to several places and summing what comes back: the arithmetic of every step of a dispatch.

Legend: M rows go in, K experts are chosen per token, C copies come out, d is the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Copies made of M rows, in the order in which they leave.

    source: [C], the row that each copy is made of.
    back: [C], numbers of copies grouped by their row: the fixed order in which a row's copies are summed.
    offsets: [M], where each row's copies begin in `back`; None when every row has exactly one copy.
    slots: [C], where a copy's routing weight lies in the flattened [M, K] weights; None when a copy takes along all
        that its row has.
    num_slots: K where `slots` is given.
    has_empty: whether some copies are of no row: their source is M, their slot M K, and `back` leaves them out.
    """

    source: Tensor
    back: Tensor
    offsets: Tensor | None
    slots: Tensor | None = None
    num_slots: int = 0
    has_empty: bool = False

    def spread(self, rows: Tensor) -> Tensor:
        """rows [M, ...] -> copies [C, ...]."""
        return rows.index_select(0, self.source)

    def fold(self, copies: Tensor) -> Tensor:
        """The transpose of `spread`: copies [C, d] -> the sum of each row's copies [M, d].

        16-bit floats are summed in fp32 and rounded once.
        """
        if self.offsets is None:
            return copies.index_select(0, self.back)
        return F.embedding_bag(self.back, copies, self.offsets, mode="sum")

    def spread_weights(self, weights: Tensor) -> Tensor:
        """weights [M, K] -> [C] where each copy takes one of them, else [C, K] (or [M] -> [C])."""
        if self.has_empty:  # of these, zero
            weights = F.pad(weights, (0,) * (2 * weights.dim() - 1) + (1,))
        if self.slots is None:
            return self.spread(weights)
        return weights.reshape(-1).index_select(0, self.slots)

    def fold_weights(self, d_weights: Tensor) -> Tensor:
        """The transpose of `spread_weights`."""
        if self.slots is None:
            return self.fold(d_weights)
        num_weights = self.num_rows * self.num_slots
        folded = d_weights.new_zeros(num_weights + self.has_empty).index_copy_(0, self.slots, d_weights)
        return folded[:num_weights].view(self.num_rows, self.num_slots)

    def spaced(self, lengths: list[int], multiple: int) -> tuple[Copies, list[int]]:
        """These copies, which come in runs of `lengths`, with empty ones behind each run until it has a multiple.

        Returns them and the lengths of their runs.
        """
        spaced = [-(-length // multiple) * multiple for length in lengths]
        if spaced == lengths:
            return self, lengths
        counts = np.array([lengths, spaced])
        shifts = counts.cumsum(1) - counts
        # From pinned memory on a GPU: any other copy would make the host wait for the device.
        shifts_and_lengths = torch.from_numpy(np.stack([shifts[1] - shifts[0], counts[0]]))
        if self.back.is_cuda:
            shifts_and_lengths = shifts_and_lengths.pin_memory().to(self.back.device, non_blocking=True)
        num_copies = self.back.numel()
        places = shifts_and_lengths[0].repeat_interleave(shifts_and_lengths[1], output_size=num_copies)
        places = places + torch.arange(num_copies, device=places.device)

        def spread_out(numbers: Tensor, none: int) -> Tensor:
            return numbers.new_full((sum(spaced),), none).index_copy_(0, places, numbers)

        slots = None if self.slots is None else spread_out(self.slots, self.num_rows * self.num_slots)
        source, back = spread_out(self.source, self.num_rows), places.index_select(0, self.back)
        return Copies(source, back, self.offsets, slots, self.num_slots, has_empty=True), spaced

    @property
    def num_rows(self) -> int:
        """M."""
        return self.back.numel() if self.offsets is None else self.offsets.numel()


def arrange(wanted: Tensor, keys: Tensor, num_copies: int, weighted: bool) -> Copies:
    """One copy of row m for every true `wanted[m, p]`, ordered by `keys[m, p]`, then by m, then by p.

    wanted: bool [M, P], true `num_copies` times: the host knows that number, so that it need not wait for the device to
    count. keys: integers [M, P]. With `weighted`, P is K and copy (m, p) takes weight (m, p) along.
    """
    num_columns = wanted.shape[1]
    natural = wanted.reshape(-1).nonzero_static(size=num_copies).squeeze(1)
    order = keys.reshape(-1).index_select(0, natural).argsort(stable=True)
    pairs = natural.index_select(0, order)
    per_row = wanted.sum(1)
    return Copies(
        source=pairs.div(num_columns, rounding_mode="floor"),
        back=inverse(order),
        offsets=per_row.cumsum(0) - per_row,
        slots=pairs if weighted else None,
        num_slots=num_columns if weighted else 0,
    )


def reach(places: Tensor, num_places: int) -> Tensor:
    """places: integers [M, K] -> bool [M, num_places]: whether row m has place p among places[m, :].

    Numbers outside 0..num_places-1 count for nothing.
    """
    inside = (places >= 0) & (places < num_places)
    reached = places.new_zeros((places.shape[0], num_places + 1), dtype=torch.bool)
    return reached.scatter_(1, torch.where(inside, places, num_places), True)[:, :num_places]


def one_per_place(reached: Tensor, num_copies: int) -> Copies:
    """One copy of row m for each place p that it reaches (bool [M, places]), ordered by place, then by row.

    `reached` is true `num_copies` times. What `arrange` gives with the place as key, without a sort.
    """
    num_rows, num_places = reached.shape
    leaving = reached.t().reshape(-1).nonzero_static(size=num_copies).squeeze(1)  # place * M + row
    source = leaving.remainder(max(1, num_rows))
    cell = source * num_places + leaving.div(max(1, num_rows), rounding_mode="floor")
    per_row = reached.sum(1)
    return Copies(
        source=source,
        back=inverse(reached.reshape(-1).cumsum(0).index_select(0, cell) - 1),
        offsets=per_row.cumsum(0) - per_row,
    )


def tally(ids: Tensor, num_ids: int) -> Tensor:
    """How often each of 0..num_ids-1 occurs: ids, integers of any shape, -1 for none -> int64 [num_ids]."""
    slots = ids.reshape(-1) + 1  # the first is for those that are none
    counts = torch.zeros(num_ids + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots))[1:]


def regroup(counts: Tensor, num_rows: int) -> Tensor:
    """Rows lie in blocks (a, b) of counts[a, b] rows, a slowest; return the order that makes b slowest.

    counts: [A, B] integers whose sum is num_rows. Returns [num_rows]: `rows[regroup(counts, num_rows)]` has the blocks
    in the order (b, a).
    """
    lengths = counts.t().reshape(-1)
    starts = (counts.reshape(-1).cumsum(0) - counts.reshape(-1)).view_as(counts).t().reshape(-1)
    shifts = starts - (lengths.cumsum(0) - lengths)
    moved = shifts.repeat_interleave(lengths, output_size=num_rows)
    return moved + torch.arange(num_rows, device=counts.device)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [n]."""
    return torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
