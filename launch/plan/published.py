"""DeepSeek's kernels, as their own trace of one forward and backward pair has them: `configs/kernels/deepseek_v3.yaml`.

A part of a layer takes what its products and its attention take, and three classes of work besides. Each class is as
long, per byte of its own necessary traffic, as it is in the trace:

    cast      activation operands of FP8 products, read in BF16 and written in FP8, once each
    permute   rows of experts' products: operands and results, once each, in BF16
    other     operands and results of all products and of attention, once each, in BF16: what norms, rotary embedding,
              activations and sums have to read and write between them

These bytes are a function of the products alone, so that a part's rest scales with any model and with any split of it
over ranks, whatever operations our own code spends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.plan.figures import AttentionRate, ProductRate
from launch.plan.products import Shape
from train.settings import CONFIGS, read_file

FILE = CONFIGS / "kernels" / "deepseek_v3.yaml"
BF16_BYTES = 2
# Read in BF16, written in FP8.
CAST_BYTES = 3


@dataclass(frozen=True)
class Part:
    """One part of a layer in one pass, as the trace has it.

    Attributes:
        name: `attention` or `experts`.
        kind: `F`, `B` or `W`.
        span_ms: from its first kernel to its last.
        cast_ms: of these, kernels that quantise and transpose.
        permute_ms: kernels that bring rows into the experts' order and back.
        other_ms: all that is neither in these nor a product or attention, with the time between kernels.
        num_sequences: of attention; 0 where there is none.
        products: that it has, with their rates.
    """

    name: str
    kind: str
    span_ms: float
    cast_ms: float
    permute_ms: float
    other_ms: float
    num_sequences: int = 0
    products: list[ProductRate] = field(default_factory=list)


@dataclass(frozen=True)
class KernelSet:
    """`kernels`: rates of one system's kernels, by class.

    Attributes:
        source: where the figures are from.
        cluster: on which they ran.
        num_units_taken: processors of a device that communication held meanwhile.
        dispatch_share: part of the cluster's `exchange` rate that a dispatch reached beside compute.
        combine_share: the same of a combine.
        num_heads: of the attention of its parts.
        attention: rates of attention.
        parts: of a layer.
    """

    source: str
    cluster: str
    num_units_taken: int
    dispatch_share: float
    combine_share: float
    num_heads: int
    attention: list[AttentionRate]
    parts: list[Part]

    def part(self, name: str, kind: str) -> Part:
        """KeyError for a part that the trace does not have."""
        for part in self.parts:
            if (part.name, part.kind) == (name, kind):
                return part
        raise KeyError(f"{name}({kind})")


@dataclass(frozen=True)
class Traffic:
    """Necessary bytes of a part's classes."""

    cast: int
    permute: int
    other: int


def load() -> KernelSet:
    """The set in the repository's file."""
    return read_file(KernelSet, FILE, "kernels")


def traffic(products: Sequence[tuple[str, Shape]], attention: Sequence[tuple[int, ...]], kind: str) -> Traffic:
    """The classes' bytes of a part with these products (dtype, shape) and attentions (sizes as `Kernel` has them)."""
    cast = permute = other = 0
    for dtype, shape in products:
        operands, results = activations(shape, kind)
        cast += CAST_BYTES * operands if dtype == "float8_e4m3fn" else 0
        permute += BF16_BYTES * (operands + results) if shape.groups > 1 else 0
        other += BF16_BYTES * (operands + results)
    for sequences, heads, queries, keys, qk_width, v_width in attention:
        other += BF16_BYTES * sequences * heads * (queries + keys) * (qk_width + v_width)
    return Traffic(cast, permute, other)


def activations(shape: Shape, kind: str) -> tuple[int, int]:
    """(elements of a product's operands that are activations, of its result if that is one)."""
    if kind == "W":
        return (shape.m + shape.n) * shape.k, 0
    return shape.m * shape.k, shape.m * shape.n
