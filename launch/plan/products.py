"""How long a product takes whose shape nobody measured: a law of three figures, and what measured neighbours add to it.

A device makes a result in tiles, as many at a time as it has processors, and a tile of depth k costs as much as one of
depth k + ramp would at full rate (its operands must arrive before it can start, its result must leave):

    seconds = least + max(waves * processors * tile * 2 * (k + ramp) / rate, bytes / bandwidth)

Waves are whole, but for tiles that do not fill one: they are cut smaller, and cost their part of a wave. `rate` and
`ramp` are those that miss a table's own rows least, in logarithms. What the law misses of a measured row, as a factor,
is carried over to shapes nearby: the mean of the rows' factors in logarithms, weighed by the inverse fifth power of the
distance between the logarithms of (m, n, k, groups). At a measured shape this is the measurement; between measured
shapes the law says how the rate falls off with small m, n and k, and the neighbours how good the library is at shapes
like this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.plan.figures import WIDTHS, ProductRate

# What a ramp is where a table says little of it, in bytes of an operand: that of DeepGEMM's table for H800, which is in
# FP8 and has many depths. And what it costs a law, in errors of rows, to be off it by a factor of e.
USUAL_RAMP_BYTES, UNUSUAL = 750.0, 0.05
# The largest ramp that a law may have, and the step at which the search for it ends.
DEEPEST, FINE = 4096.0, 1.003
# The power of the distance with which a row's word fades: as many rows as there are at a distance in four dimensions
# weigh less the farther they are. And what keeps the weight of the very shape finite.
FADES, AT_HAND = 5, 1e-9


@dataclass(frozen=True)
class Shape:
    """A product's shape.

    Attributes:
        groups: matrices that rows, or the depth, are dealt out to.
        m, n, k: rows and columns of the result and length of the sums, of all groups together.
        by_depth: the depth is dealt out (a weight gradient of experts), and each group has an m x n result.
        result_bytes: of an element of the result.
        is_added: the result is added to what is there.
    """

    groups: int
    m: int
    n: int
    k: int
    by_depth: bool = False
    result_bytes: int = 2
    is_added: bool = False

    @property
    def flops(self) -> int:
        """A multiply and an add are two."""
        return 2 * self.m * self.n * self.k

    def num_bytes(self, dtype: str) -> int:
        """Operands once, result once, twice where it is added to."""
        weights, results = self.groups, 1
        if self.by_depth:
            weights, results = 1, self.groups
        operands = WIDTHS[dtype] * (self.m * self.k + weights * self.n * self.k)
        return operands + (1 + self.is_added) * self.result_bytes * results * self.m * self.n

    @property
    def of_group(self) -> tuple[float, int, float]:
        """(rows, columns, depth) of one group's product."""
        if self.by_depth:
            return self.m, self.n, self.k / self.groups
        return self.m / self.groups, self.n, self.k


@dataclass(frozen=True)
class Law:
    """What is the same for all shapes of one table.

    Attributes:
        rate: operations/s that deep and large products approach.
        ramp: depth that every tile costs in addition.
    """

    rate: float
    ramp: float


class ProductTable:
    """Seconds of products of one dtype and kind of result.

    rows: measured products, at least one.
    peak: operations/s that no product exceeds.
    bytes_per_s: of memory.
    tile: (rows, columns) of what one processor makes at a time.
    num_units: processors at work.
    least_s: of any operation.
    """

    def __init__(
        self,
        rows: Sequence[ProductRate],
        peak: float,
        bytes_per_s: float,
        tile: tuple[int, int],
        num_units: int,
        least_s: float,
    ) -> None:
        self._dtype, self._tile, self._num_units = rows[0].dtype, tile, num_units
        self._bytes_per_s, self._least_s, self._peak = bytes_per_s, least_s, peak
        self._seconds: dict[Shape, float] = {}
        measured = [(shape_of(row), shape_of(row).flops / (row.tflops * 1e12)) for row in rows]
        self.law = self._fitted(measured)
        self._factors = [(_place(shape), math.log(s / self.by_law(shape))) for shape, s in measured]

    def seconds(self, shape: Shape) -> float:
        """A product's time. An empty product takes what any operation takes."""
        if shape not in self._seconds:
            self._seconds[shape] = self._predicted(shape) if shape.flops else self._least_s
        return self._seconds[shape]

    def _predicted(self, shape: Shape) -> float:
        place, total, weights = _place(shape), 0.0, 0.0
        for at, factor in self._factors:
            weight = 1 / (math.dist(at, place) ** FADES + AT_HAND)
            total, weights = total + weight * factor, weights + weight
        return max(self.by_law(shape) * math.exp(total / weights), shape.flops / self._peak, self._least_s)

    def by_law(self, shape: Shape) -> float:
        """Seconds without the neighbours' word."""
        work = self._work(shape) * (shape.of_group[2] + self.law.ramp) / self.law.rate
        return self._least_s + max(work, shape.num_bytes(self._dtype) / self._bytes_per_s)

    def _work(self, shape: Shape) -> float:
        """Operations per unit of depth, those included that idle processors of the last wave could have done."""
        rows, columns, _ = shape.of_group
        tiles = shape.groups * max(math.ceil(rows / self._tile[0]), 1) * math.ceil(columns / self._tile[1])
        waves = tiles / self._num_units
        if waves > 1:  # fewer tiles than processors are cut smaller, or in depth
            waves = math.ceil(waves)
        return 2.0 * waves * self._num_units * self._tile[0] * self._tile[1]

    def _fitted(self, measured: Sequence[tuple[Shape, float]]) -> Law:
        """The least sum of errors in logarithms, found from a coarse grid of both figures to a fine one."""
        rows = [(self._work(s), s.of_group[2], s.num_bytes(self._dtype) / self._bytes_per_s, t) for s, t in measured]

        usual = USUAL_RAMP_BYTES / WIDTHS[self._dtype]

        def error(law: Law) -> float:
            missed = (
                abs(math.log((self._least_s + max(work * (k + law.ramp) / law.rate, moved)) / seconds))
                for work, k, moved, seconds in rows
            )
            return sum(missed) + UNUSUAL * abs(math.log(law.ramp / usual))

        rates = [self._peak * 2 ** (-i / 4) for i in range(16)]
        ramps = [DEEPEST * 2 ** (-i / 2) for i in range(20)]
        best, step = min((Law(rate, ramp) for rate in rates for ramp in ramps), key=error), 2**0.25
        while step > FINE:
            near = [step**i for i in (-2, -1, 0, 1, 2)]
            laws = [Law(min(best.rate * x, self._peak), best.ramp * y * y) for x in near for y in near]
            best, step = min(laws, key=error), step**0.6
        return best


def shape_of(row: ProductRate) -> Shape:
    """A measured row's shape. Rows with a float32 result of narrower operands are weight gradients: these add to what
    is there, and their groups share the depth."""
    added = row.result == "float32" and WIDTHS[row.dtype] < WIDTHS["float32"]
    return Shape(row.groups, row.m, row.n, row.k, added and row.groups > 1, WIDTHS[row.result], added)


def _place(shape: Shape) -> tuple[float, float, float, float]:
    rows, columns, depth = shape.of_group
    return math.log(max(rows, 1)), math.log(columns), math.log(max(depth, 1)), math.log(shape.groups)
