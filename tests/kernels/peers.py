"""How near a kernel must be to its eager twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Sums of a few hundred terms in another order: some units in the last place of what is summed in. In bfloat16 both are
# rounded once, and may fall to either side: one unit in its last place.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}


def agree(
    ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor], dtype: torch.dtype, factor: float = 1
) -> None:
    """Equal up to what the type allows, relative to a value or, near zero, to one."""
    tolerance = factor * TOLERANCES[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
