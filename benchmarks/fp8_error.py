"""Errors of FP8 products against float64, by how operands are scaled and how sums are accumulated.

    python -m benchmarks.fp8_error [m=256 n=512 k=4096 seed=0]

y = x wᵀ for x [m, k] of several kinds and Gaussian w [n, k]. Two tables, as in docs/fp8.md:

scaling       relative error of y against the float64 product of unquantised operands: of the whole (Frobenius norm),
              and of the median row, which is what a quiet token sees beside loud ones.
accumulation  Gaussian operands, per tensor scaled, K of three sizes: largest error of an element against the exact
              product of the quantised operands, over the mean magnitude of y.

The accumulator of Hopper's tensor cores is modelled after the technical report (section 3.3.2): the products of 32
elements are summed exactly, and the running sum keeps 14 bits, cut towards zero. Promoted every 128 elements, partial
sums times their tiles' scales go on in float32. What training runs (`train/precision/reference.py`) dequantises
operands and takes one float32 product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from train.precision.blockwise import BLOCKS, E4M3, ROWS, TILE, Quantised, quantise
from train.precision.config import Fp8
from train.precision.reference import Fp8Engine, QuantisedWeights

DEFAULTS = {"m": 256, "n": 512, "k": 4096, "seed": 0}
KINDS = ("gaussian", "loud channels", "loud tokens", "student t(2)", "wide rows")
SUMMED_EXACTLY, ACCUMULATOR_BITS = 32, 14


def inputs(kind: str, m: int, k: int, generator: torch.Generator) -> Tensor:
    """x [m, k] in float32. Outliers in one of 256 channels or one of 64 tokens; gradients have wide rows."""
    x = torch.randn(m, k, generator=generator)
    if kind == "loud channels":
        x[:, torch.randperm(k, generator=generator)[: max(1, k // 256)]] *= 1e4
    if kind == "loud tokens":
        x[torch.randperm(m, generator=generator)[: max(1, m // 64)]] *= 1e4
    if kind == "student t(2)":
        x *= torch.rand(m, k, generator=generator).log_().neg_().rsqrt_()  # chi² of two degrees is exponential
    if kind == "wide rows":
        x *= torch.exp(3 * torch.randn(m, 1, generator=generator) + torch.randn(m, k, generator=generator))
    return x


def per_tensor(x: Tensor) -> Quantised:
    """One scale for all of x [m, k], in the form of 1 x 128 tiles."""
    scale = x.abs().amax() / E4M3.largest
    return Quantised((x / scale).to(torch.float8_e4m3fn), scale.expand(x.shape[0], -(-x.shape[1] // TILE)))


def truncate(x: Tensor, bits: int) -> Tensor:
    """float64 x with all but `bits` leading bits of its mantissa cut off."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(torch.ldexp(mantissa, torch.tensor(bits))), exponent - bits)


def accumulate(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a [m, j] bᵀ [j, n], added to `total` by an accumulator of few bits: float64, both multiples of 32 long."""
    total = a.new_zeros(a.shape[0], b.shape[0]) if total is None else total
    for part_a, part_b in zip(a.split(SUMMED_EXACTLY, 1), b.split(SUMMED_EXACTLY, 1), strict=True):
        total = truncate(total + part_a @ part_b.T, ACCUMULATOR_BITS)
    return total


def row_scales(weight: Quantised, n: int) -> Tensor:
    """Scales of 128 x 128 blocks, or of rows, as one per row and tile: [n, tiles]."""
    scales = weight.scales
    return scales if scales.shape[0] == n else scales.repeat_interleave(TILE, 0)[:n]


def promoted(x: Quantised, weight: Quantised) -> Tensor:
    """The slow twin of the engine: sums of 128 elements in few bits, their scales and the rest in float32."""
    m, n = x.values.shape[0], weight.values.shape[0]
    out, scales = torch.zeros(m, n), row_scales(weight, n)
    pieces = (part.values.double().split(TILE, 1) for part in (x, weight))
    for tile, (a, b) in enumerate(zip(*pieces, strict=True)):
        out += accumulate(a, b).float() * x.scales[:, tile, None] * scales[:, tile]
    return out


def unpromoted(x: Quantised, weight: Quantised) -> Tensor:
    """All of a product in one accumulator of few bits; one scale per tensor."""
    return accumulate(x.values.double(), weight.values.double()) * x.scales[0, 0] * weight.scales[0, 0]


def exact(x: Quantised, weight: Quantised) -> Tensor:
    """The product of quantised operands in float64."""
    n = weight.values.shape[0]
    wide = [
        part.values.double() * scales.double().repeat_interleave(TILE, 1)[:, : part.values.shape[1]]
        for part, scales in ((x, x.scales), (weight, row_scales(weight, n)))
    ]
    return wide[0] @ wide[1].T


def engine_product(x: Tensor, weight: Tensor, power_of_two: bool = False) -> Tensor:
    engine = Fp8Engine(Fp8(), QuantisedWeights(power_of_two), power_of_two)
    return engine.fprop(engine.operand(x), weight)


SIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bf16": lambda x, w: (x.bfloat16().float() @ w.bfloat16().float().T).bfloat16(),
    "FP8 per tensor": lambda x, w: exact(per_tensor(x), per_tensor(w)),
    "FP8 by tiles": engine_product,
    "by tiles, 2^n scales": lambda x, w: engine_product(x, w, True),
    "by tiles, 14 bits promoted": lambda x, w: promoted(quantise(x, ROWS), quantise(w, BLOCKS)),
}


def errors(y: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative error of the whole and of the median row."""
    wrong = y.double() - wanted
    rows = wrong.norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-300)
    return float(wrong.norm() / wanted.norm()), float(rows.median())


def scaling(m: int, n: int, k: int, seed: int) -> dict[str, dict[str, tuple[float, float]]]:
    """kind -> side -> errors."""
    found = {}
    for kind in KINDS:
        generator = torch.Generator().manual_seed(seed)
        x, weight = inputs(kind, m, k, generator), torch.randn(n, k, generator=generator) / k**0.5
        wanted = x.double() @ weight.double().T
        found[kind] = {name: errors(side(x, weight), wanted) for name, side in SIDES.items()}
    return found


def accumulation(m: int, n: int, k: int, seed: int) -> dict[str, float]:
    """side -> largest error of an element over the mean magnitude of y."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (per_tensor(torch.randn(size, k, generator=generator)) for size in (m, n))
    wanted = exact(x, weight)
    dequantised = [part.values.float() * part.scales[0, 0] for part in (x, weight)]
    sides = {
        "14 bits": unpromoted(x, weight),
        "14 bits, promoted every 128": promoted(x, weight),
        "one float32 product": dequantised[0] @ dequantised[1].T,
    }
    return {name: float((y.double() - wanted).abs().max() / wanted.abs().mean()) for name, y in sides.items()}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main(arguments: list[str]) -> None:
    words = dict(word.split("=", 1) for word in arguments if "=" in word)
    if len(words) != len(arguments) or not words.keys() <= DEFAULTS.keys():
        raise SystemExit(f"settings are {', '.join(f'{key}=INT' for key in DEFAULTS)}, not {' '.join(arguments)}")
    sizes = DEFAULTS | {key: int(value) for key, value in words.items()}
    if sizes["k"] % TILE:
        raise SystemExit(f"k={sizes['k']} is no multiple of {TILE}, which the model of the accumulator takes")
    found = scaling(**sizes)
    print("settings: " + " ".join(f"{key}={value}" for key, value in sizes.items()) + "\n")
    rows = [[kind, *(f"{each[0]:.1e} / {each[1]:.1e}" for each in row.values())] for kind, row in found.items()]
    print("relative error, whole / median row\n\n" + table(["x", *SIDES], rows) + "\n")
    sums = {k: accumulation(64, 64, k, sizes["seed"]) for k in (sizes["k"] // 4, sizes["k"], sizes["k"] * 4)}
    rows = [[str(k), *(f"{value:.1e}" for value in row.values())] for k, row in sums.items()]
    print("largest error over mean |y|\n\n" + table(["K", *sums[sizes["k"]]], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
