"""Rows as bytes: what travels between ranks on the way to the experts, and back from the tokens to them.

Technical report, section 3.3.3: dispatch, and the backward of combine, send E4M3 with power-of-two scales; combine, and
the backward of dispatch, send bfloat16. The rounding belongs to the model, not to the way: the engines of the experts'
first and last products round what arrives in the same tiles (`config.FP8_MODULES`), and rounding twice changes nothing.
So the numbers are the same whether rows travel as these bytes, as bfloat16 or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.precision.blockwise import TILE
from train.precision.tiles import keep_rows, restore_rows


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of `width` elements as bytes: `width` of E4M3, then the exponent of each tile's scale; 1 + 1/128 each."""

    width: int

    @property
    def num_bytes(self) -> int:
        """Bytes of one row."""
        return self.width + -(-self.width // TILE)

    def encode(self, rows: Tensor) -> Tensor:
        """rows [N, width], any floating type up to float32 -> uint8 [N, num_bytes]."""
        values, scales = keep_rows(rows, power_of_two=True)
        # Of a power of two only the exponent is not zero; a NaN has the one above all others.
        exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
        return torch.cat((values.view(torch.uint8), exponents), dim=-1)

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [N, num_bytes] -> rows [N, width]; bfloat16 holds every value exactly that is not below 2^-133."""
        values, exponents = payload.split([self.width, self.num_bytes - self.width], dim=-1)
        scales = (exponents.to(torch.int32) << 23).view(torch.float32)
        scales = scales.masked_fill(exponents == 255, torch.nan)
        return restore_rows((values.view(torch.float8_e4m3fn), scales)).to(dtype)
