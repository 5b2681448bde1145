"""Products with a fixed input, by whichever Transformer Engine there is: over the twin they are what a GPU should find.

`python -m tests.te.case FILE` runs them over the twin, on a CPU, and saves what comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from train.model.kernels import Kernels
from train.precision.config import Fp8
from train.precision.engine import Mlp
from train.precision.grads import main_grad
from train.precision.transformer_engine import LibraryModules, TransformerEngine

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


def run(device: torch.device | str, power_of_two: bool) -> dict[str, Tensor]:
    """Two micro-batches through two layers that share an input, and through experts; both backward, then both W, the
    last one first. Results, gradients of inputs, `main_grad`, on the CPU."""
    shared = LibraryModules(power_of_two)
    dense = TransformerEngine(Fp8(), shared)
    up = TransformerEngine(Fp8(round_input=True), shared).grouped(SPLITS)
    down = TransformerEngine(Fp8(round_gradient=True), shared).grouped(SPLITS)
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
        rows = _values(20 + number, sum(SPLITS), HIDDEN).to(device).requires_grad_()
        row_weights = _values(30 + number, sum(SPLITS), 1)[:, 0].float().abs().to(device).requires_grad_()
        outputs = [
            *dense.project(x, waiting[-1].append, weights["first"], weights["second"]),
            Mlp(weights["gate_up"], weights["down"], up, down, Kernels(), waiting[-1].append)(rows, row_weights),
        ]
        torch.autograd.backward(
            outputs, [_values(40 + number, *y.shape).to(device) for number, y in enumerate(outputs)]
        )
        names = "y first", "y second", "y experts", "dx", "drows", "drow_weights"
        for name, value in zip(names, (*outputs, x.grad, rows.grad, row_weights.grad), strict=True):
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
