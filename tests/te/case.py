"""Products with a fixed input, by whichever Transformer Engine there is: over the twin they are what a GPU should find.

`python -m tests.te.case FILE` runs them over the twin, on a CPU, and saves what comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.expert.copies import Copies
from train.model.kernels import Kernels
from train.precision.build import passes
from train.precision.config import Fp8
from train.precision.engine import Engine, Mlp
from train.precision.grads import Sink, main_grad
from train.precision.transformer_engine import LibraryWeights, TransformerEngine

# Rows of four experts, one of which has none; tokens of a dense layer.
SPLITS = [130, 0, 7, 256]
NUM_TOKENS, HIDDEN, WIDTH, INTER = 200, 384, 272, 144


def _values(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()).bfloat16()


def _weight(seed: int, device: torch.device | str, *shape: int) -> nn.Parameter:
    weight = nn.Parameter((_values(seed, *shape) * 0.05).to(device))
    weight.main_grad = torch.zeros(shape, device=device)  # type: ignore[attr-defined]
    return weight


class Journey:
    """Rows of experts as they come to an engine and leave it: by its codec, with empty ones where it needs them."""

    def __init__(self, engine: Engine, splits: list[int], width: int, device: torch.device | str = "cpu") -> None:
        codec, numbers = engine.codec(width), torch.arange(sum(splits), device=device)
        assert codec is not None
        self.codec = codec
        self.copies, self.splits = Copies(numbers, numbers, None).spaced(splits, codec.row_multiple)

    def there(self, x: Tensor) -> Tensor:
        return self.codec.arrive(self.codec.encode(x), self.copies.source, self.splits, x.dtype)

    def experts(
        self, engines: tuple[Engine, Engine], weights: tuple[Tensor, Tensor], sink: Sink, x: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """What experts make of x [R, d] and row_weights [R], and a function from its gradient to those of both."""
        rows = self.there(x).requires_grad_()
        spread = self.copies.spread_weights(row_weights).requires_grad_()
        up, down = (engine.grouped(self.splits) for engine in engines)
        y = Mlp(*weights, up, down, Kernels(), sink)(rows, spread)

        def back(dy: Tensor) -> tuple[Tensor, Tensor]:
            y.backward(self.there(dy))
            assert rows.grad is not None and spread.grad is not None
            return self.copies.fold(rows.grad), self.copies.fold_weights(spread.grad)

        return self.copies.fold(y.detach()), back


def run(device: torch.device | str, power_of_two: bool) -> dict[str, Tensor]:
    """Two micro-batches through two layers that share an input, and through experts; both backward, then both W, the
    last one first. Results, gradients of inputs, `main_grad`, on the CPU."""
    shared = LibraryWeights(passes(device), power_of_two)
    dense = TransformerEngine(Fp8(), shared)
    up, down = (TransformerEngine(fp8, shared) for fp8 in (Fp8(round_input=True), Fp8(round_gradient=True)))
    journey = Journey(up, SPLITS, HIDDEN, device)
    weights = {
        "first": _weight(1, device, WIDTH, HIDDEN),
        "second": _weight(2, device, INTER, HIDDEN),
        "gate_up": _weight(3, device, len(SPLITS), 2 * INTER, HIDDEN),
        "down": _weight(4, device, len(SPLITS), HIDDEN, INTER),
    }
    found: dict[str, Tensor] = {}
    waiting: list[list[Callable[[], None]]] = []
    for number in range(2):
        waiting.append([])
        x = _values(10 + number, NUM_TOKENS, HIDDEN).to(device).requires_grad_()
        rows = _values(20 + number, sum(SPLITS), HIDDEN).to(device)
        row_weights = _values(30 + number, sum(SPLITS), 1)[:, 0].float().abs().to(device)
        outputs = dense.project(x, waiting[-1].append, weights["first"], weights["second"])
        stacked = weights["gate_up"], weights["down"]
        y, back = journey.experts((up, down), stacked, waiting[-1].append, rows, row_weights)
        torch.autograd.backward(
            outputs, [_values(40 + number, *y.shape).to(device) for number, y in enumerate(outputs)]
        )
        d_rows, d_row_weights = back(_values(42, *y.shape).to(device))
        names = "y first", "y second", "y experts", "dx", "drows", "drow_weights"
        for name, value in zip(names, (*outputs, y, x.grad, d_rows, d_row_weights), strict=True):
            assert value is not None
            found[f"{name} {number}"] = value.detach().cpu()
    for work in (work for works in reversed(waiting) for work in works):
        work()
    return {**found, **{f"d{name}": main_grad(weight).cpu() for name, weight in weights.items()}}


if __name__ == "__main__":
    from tests.te import twin

    twin.install()
    torch.set_num_threads(1)
    torch.save({power_of_two: run("cpu", power_of_two) for power_of_two in (True, False)}, Path(sys.argv[1]))
