"""Arithmetics of matrix products beside FP8 as we train with it: what the loss gap of FP8 is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from train.precision.blockwise import E4M3, scales_of
from train.precision.build import everywhere
from train.precision.config import FP8_MODULES, MODULE_KEYS, Fp8, PrecisionConfig
from train.precision.engine import Engine, Products
from train.precision.reference import Fp8Engine, Fp8Groups, QuantisedWeights
from train.precision.tiles import Kept, round_blocks, round_to
from train.precision.torch_engine import TorchEngine

MakeEngines = Callable[[PrecisionConfig, torch.device | str, QuantisedWeights], Mapping[str, Engine]]


class Reassociated(TorchEngine):
    """Products whose sums over the inner dim are taken in two halves: the same numbers but for the last bits."""

    def _mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        half = a.shape[1] // 2
        total = super()._mm(a[:, :half], b[:half], out)
        return total.add_(super()._mm(a[:, half:], b[half:]))

    def wgrad_(self, accumulator: Tensor, dy: Tensor, x: Tensor) -> None:
        half = dy.shape[0] // 2
        super().wgrad_(accumulator, dy[half:], x[half:])
        super().wgrad_(accumulator, dy[:half], x[:half])


class _OtherRows(Fp8Engine):
    """Rows that travel as themselves, because they are rounded in another way."""

    def codec(self, width: int) -> None:
        return None


class _OtherGradients(_OtherRows):
    """Gradients quantised in one way for both products that take them."""

    def gradient_columns(self, dy: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        return [self.gradient_operand(dy[rows]) for rows in groups]


class UnscaledGradients(_OtherGradients):
    """E4M3 without scales: what lies under 2^-10, as most gradients do, is lost."""

    def gradient_operand(self, dy: Tensor) -> Tensor:
        return round_to(dy.float().clamp(-E4M3.largest, E4M3.largest), E4M3)


class BlockGradients(_OtherGradients):
    """One scale for 128 x 128 values, with which the report saw a model of 16 B parameters diverge (appendix B.2)."""

    def gradient_operand(self, dy: Tensor) -> Tensor:
        return round_blocks(dy)


class Partly(_OtherRows):
    """FP8 in some of the three products; operands of the others as they are, multiplied in float32."""

    def __init__(self, fp8: Fp8, weights: QuantisedWeights, products: Collection[str]) -> None:
        """products: of "fprop", "dgrad" and "wgrad"; what is kept for the last is kept whole where it is not there."""
        super().__init__(fp8, weights)
        self._products = products

    def weight(self, product: str, weight: Tensor) -> Tensor:
        """weight [..., n, k] as a product takes it, in float32."""
        return self._weights.of(weight) if product in self._products else weight.detach().float()

    enter = Products.enter  # what enters a product and what is kept of it need not be rounded alike

    def operand(self, x: Tensor) -> Tensor:
        return super().operand(x) if "fprop" in self._products else x.float()

    def keep(self, x: Tensor) -> Kept:
        return super().keep(x) if "wgrad" in self._products else (x,)

    def restore(self, kept: Kept) -> Tensor:
        return super().restore(kept) if "wgrad" in self._products else kept[0]

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(operand, self.weight("fprop", weight).t()).to(weight.dtype)

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(self.gradient_operand(dy), self.weight("dgrad", weight)).to(weight.dtype)

    def gradient_operand(self, dy: Tensor) -> Tensor:
        return super().gradient_operand(dy) if "dgrad" in self._products else dy.float()

    def grouped(self, splits: list[int]) -> Products:
        return _PartlyGroups(self, self._weights, splits)

    def received(self, dy: Tensor) -> Tensor:
        return super().received(dy) if "wgrad" in self._products else dy

    def gradient_columns(self, dy: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        return super().gradient_columns(dy, groups) if "wgrad" in self._products else [dy[at].float() for at in groups]

    def input_columns(self, x: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        return super().input_columns(x, groups) if "wgrad" in self._products else [x[at].float() for at in groups]


class _PartlyGroups(Fp8Groups):
    def __init__(self, engine: Partly, weights: QuantisedWeights, splits: list[int]) -> None:
        super().__init__(engine, weights, splits)
        self._weight = engine.weight

    def fprop(self, operand: Tensor, weight: Tensor) -> Tensor:
        return self._product(operand, self._weight("fprop", weight).transpose(1, 2)).to(weight.dtype)

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return self._product(self._engine.gradient_operand(dy), self._weight("dgrad", weight)).to(weight.dtype)


def round_whole(x: Tensor) -> Tensor:
    """x -> float32, the same shape: quantised to E4M3 with one scale for all of it, and dequantised."""
    if not x.numel():
        return x.float()
    scale = scales_of(x.float().abs().amax(), power_of_two=False)
    return round_to(x.float() / scale, E4M3) * scale


class _WholeWeights(QuantisedWeights):
    """Weights with one scale per matrix, quantised whenever they are asked for."""

    def of(self, weight: Tensor) -> Tensor:
        whole = weight.detach()
        return torch.stack([round_whole(each) for each in whole]) if whole.dim() == 3 else round_whole(whole)


class PerTensor(_OtherGradients):
    """One scale per tensor for inputs, weights and gradients; of experts' matrices for each."""

    def __init__(self, fp8: Fp8, _weights: QuantisedWeights) -> None:
        super().__init__(fp8, _WholeWeights())

    enter = Products.enter  # the input is kept as it is

    def operand(self, x: Tensor) -> Tensor:
        return round_whole(x)

    def keep(self, x: Tensor) -> Kept:
        return (x,)

    def restore(self, kept: Kept) -> Tensor:
        return kept[0]

    def gradient_operand(self, dy: Tensor) -> Tensor:
        return round_whole(dy)

    def gradient_columns(self, dy: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        return [round_whole(dy[rows]) for rows in groups]

    def input_columns(self, x: Tensor, groups: Sequence[slice]) -> list[Tensor]:
        return [round_whole(x[rows]) for rows in groups]


def partly(products: Collection[str]) -> MakeEngines:
    """The table of FP8, each module by its own scales and formats, with FP8 in some of the three products alone."""

    def make(config: PrecisionConfig, device: torch.device | str, weights: QuantisedWeights) -> Mapping[str, Engine]:
        high = TorchEngine(device)
        made = {fp8: Partly(fp8, weights, products) for fp8 in FP8_MODULES.values()}
        return {module: made[fp8] if config.is_fp8(module) else high for module, fp8 in FP8_MODULES.items()}

    return make


def reassociated(
    _config: PrecisionConfig, device: torch.device | str, _weights: QuantisedWeights
) -> Mapping[str, Engine]:
    return everywhere(Reassociated(device))


def instead(kind: type[Fp8Engine]) -> MakeEngines:
    """The table of FP8 with another engine wherever it has one of FP8."""

    def make(config: PrecisionConfig, device: torch.device | str, weights: QuantisedWeights) -> Mapping[str, Engine]:
        made, high = kind(Fp8(), weights), TorchEngine(device)
        return {module: made if config.is_fp8(module) else high for module in MODULE_KEYS}

    return make
