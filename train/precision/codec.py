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
from train.precision.coded import CodedRows
from train.precision.tiles import keep_rows


@dataclass(frozen=True)
class Fp8Rows:
    """Rows of `width` elements as bytes: `width` of E4M3, then the exponent of each tile's scale; 1 + 1/128 each.

    What arrives of them stays quantised (`CodedRows`): the products of the experts take it as it is.
    """

    width: int
    row_multiple = 1

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

    def arrive(self, payload: Tensor, source: Tensor, splits: list[int], dtype: torch.dtype) -> Tensor:
        """uint8 [N, num_bytes] -> coded rows [R, width], whose parts are those of `tiles.keep_rows`."""
        values, exponents = payload.split([self.width, self.num_bytes - self.width], dim=-1)
        exponents = exponents.index_select(0, source)
        scales = (exponents.to(torch.int32) << 23).view(torch.float32).masked_fill_(exponents == 255, torch.nan)
        codes = values.index_select(0, source).view(torch.float8_e4m3fn)
        return CodedRows((codes, scales), codes.shape, dtype)
