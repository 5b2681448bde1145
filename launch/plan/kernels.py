"""Seconds of what a device does, in three sets that differ in kernels alone.

    as written  every kernel that our code calls, at a published rate of its kind: a product by the cluster's table,
                attention by its width and length, a pass over memory at the bandwidth that is reached, none in less
                than the least time of a kernel
    published   DeepSeek's kernels and fusions: products and attention at the rates of their trace, what is neither by
                the trace's time per byte of its necessary traffic (`published.py`). On another cluster than theirs a
                product keeps its ratio to what the cluster's own table says of it, attention its ratio to the cluster's
                attention, and the rest scales with memory bandwidth. What the trace does not have (embedding, loss,
                optimizer) moves its operands and results once at the bandwidth that is reached
    bound       perfect fusion: a node moves weights, its inputs and its outputs once at the memory's peak and
                multiplies at the peak of its types, at the same time

Published and bound know nodes of a layer, the events between two `Enter`s; as written knows single kernels too.
Communication has the same three: NCCL's rates, DeepEP's, the links' own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import cached_property

from launch.plan import published
from launch.plan.cluster import Cluster, load
from launch.plan.events import Enter, Event, Kernel, Memory
from launch.plan.figures import WIDTHS, AttentionRate, FarTime, ProductRate, interpolated
from launch.plan.products import ProductTable, Shape, shape_of
from launch.plan.published import KernelSet, Part

AS_WRITTEN, PUBLISHED, BOUND = "as_written", "published", "bound"
KERNELS = (AS_WRITTEN, PUBLISHED, BOUND)
# Nodes whose work the trace has in attention's parts; all others with products are of the experts' kind.
OF_ATTENTION = {"attention", "router", "gate", "norm"}
# Layers whose parts the trace has, in these passes: a node of theirs without a product has its work in these parts. A
# loss is none of them, wherever it is computed.
WHOLE_LAYERS, PASSES, ALONE = {"moe", "dense", "mtp"}, ("F", "B", "W"), {"loss"}
# The type that the trace's products tell something of, and what runs in another one there than in our code.
TRACED_DTYPE = "float8_e4m3fn"
NARROWED = {"float32": "bfloat16"}
BF16 = WIDTHS["bfloat16"]
# By the operands' bytes, those of an element of a product's result.
RESULT_BYTES = {1: (2, 4), 2: (2, 4), 4: (4,), 8: (8,)}


class Rates:
    """A cluster's kernels; as many objects as wanted may share a `KernelSet`.

    value_width: of a head's values in the model, where our own attention pads them to the width of its keys, which
        DeepSeek's kernel does not need; None: as wide as the events say.

    ValueError from `load` if the set's own cluster cannot be had.
    """

    def __init__(self, cluster: Cluster, kernel_set: KernelSet | None = None, value_width: int | None = None) -> None:
        self.cluster = cluster
        self._value_width = value_width
        self.kernel_set = kernel_set or published.load()
        self._tables: dict[tuple[str, bool], ProductTable] = {}
        self._passes: dict[tuple[str, str], list[tuple[float, float]]] = {}

    # As written.

    def seconds(self, kernel: Kernel, num_taken: int = 0) -> float:
        """A kernel as our code calls it.

        num_taken: processors of the device that communication holds meanwhile.

        ValueError for a product of a type without a rate.
        """
        num_bytes = kernel.read_bytes + kernel.written_bytes
        if kernel.work == "product" and not is_vector(kernel):
            near = self.product_seconds(kernel.dtype, shape_of_kernel(kernel), num_taken)
        elif kernel.work == "attention":
            near = self.attention_seconds(kernel, num_taken)
        else:
            far = self.far_seconds(self.cluster.passes.far, num_bytes, kernel.far_bytes)
            return self.pass_seconds(kernel.name, kernel.dtype, num_bytes) + far
        return near + self.far_seconds(self.cluster.products.far, num_bytes, kernel.far_bytes)

    @staticmethod
    def far_seconds(rows: Sequence[FarTime], num_bytes: int, far_bytes: int) -> float:
        """What far operands take besides, of an operation over so many bytes."""
        if not rows or not far_bytes:
            return 0.0
        return far_bytes * interpolated([(row.num_bytes, row.ns_per_byte) for row in rows], max(num_bytes, 1)) * 1e-9

    def product_seconds(self, dtype: str, shape: Shape, num_taken: int = 0) -> float:
        """A product at a published rate of its kind."""
        return self._table(dtype, is_weight(dtype, shape)).seconds(shape) * self._crowded(num_taken)

    def attention_seconds(self, kernel: Kernel, num_taken: int = 0) -> float:
        """Attention at the rate of the nearest measured widths, interpolated by length."""
        rate = attention_rate(self.cluster.attention.measured, kernel, self.cluster)
        moved = (kernel.read_bytes + kernel.written_bytes) / self.cluster.bytes_per_s
        return max(kernel.flops / rate * self._crowded(num_taken), moved, self.least_s)

    def pass_seconds(self, name: str, dtype: str, num_bytes: int) -> float:
        """A pass over memory: by what was measured of the operation, or at the bandwidth that is reached."""
        rows = self._pass_rows(name, dtype)
        if not rows:
            return max(num_bytes / self.cluster.bytes_per_s, self.least_s)
        return max(num_bytes / interpolated(rows, num_bytes), self.least_s)

    @property
    def least_s(self) -> float:
        """What any operation takes on the device, however small."""
        return self.cluster.passes.least_us * 1e-6

    def core_seconds(self, kernel: Kernel, kernels: str, num_taken: int = 0) -> float:
        """A product or attention by itself, in one of the three sets."""
        if kernels == AS_WRITTEN:
            return self.seconds(kernel, num_taken)
        if kernels == BOUND:
            whole = self._unpadded(kernel) if kernel.work == "attention" else kernel
            return whole.flops / self.cluster.compute.peak(kernel.dtype)
        if kernel.work == "attention":
            return self.published_attention_seconds(self._unpadded(kernel), num_taken)
        if is_vector(kernel):
            return 0.0
        return self.published_product_seconds(kernel.dtype, shape_of_kernel(kernel), num_taken)

    # By node.

    def node_seconds(self, events: Iterable[Event], enter: Enter, kernels: str, num_taken: int = 0) -> float:
        """A node of a layer: the events between its `Enter` and the next, communication left out.

        kernels: one of `KERNELS`.

        ValueError for another word, and as `seconds` raises it.
        """
        events = list(events)
        work = [event for event in events if isinstance(event, Kernel)]
        if kernels == AS_WRITTEN:
            return sum(self.seconds(kernel, num_taken) for kernel in work)
        if kernels == PUBLISHED:
            return self._published(work, enter, num_taken)
        if kernels == BOUND:
            return self._bound(events, work, enter)
        raise ValueError(f"kernels={kernels} is not one of {', '.join(KERNELS)}")

    def _published(self, work: Sequence[Kernel], enter: Enter, num_taken: int) -> float:
        multiplying = [each for each in work if each.work == "product" and each.flops and not is_vector(each)]
        products = [(each.dtype, shape_of_kernel(each)) for each in multiplying]
        attention = [self._unpadded(each) for each in work if each.work == "attention"]
        is_of_layer = enter.layer in WHOLE_LAYERS and enter.node not in ALONE
        if not products and not attention:
            return 0.0 if is_of_layer or not work else max(map(_moved, work)) / self.cluster.bytes_per_s
        multiplied = sum(self.published_product_seconds(dtype, shape, num_taken) for dtype, shape in products)
        attended = sum(self.published_attention_seconds(kernel, num_taken) for kernel in attention)
        if is_of_layer and enter.kind in PASSES:
            part = self.kernel_set.part(
                "attention" if attention or enter.node in OF_ATTENTION else "experts", enter.kind
            )
            return multiplied + attended + self._published_rest(part, products, attention)
        moved = published.traffic(products, [kernel.sizes for kernel in attention], enter.kind).other
        return multiplied + attended + moved / self.cluster.bytes_per_s

    def published_product_seconds(self, dtype: str, shape: Shape, num_taken: int = 0) -> float:
        """A product by DeepSeek's kernels: as far above or below this cluster's table as the trace's is of its own's.

        Types that the trace has no large products of are at the table's rate. What our code multiplies in float32 (a
        router) has bfloat16 operands in the trace, and a float32 result.
        """
        if not self.cluster.host.is_device:
            dtype = NARROWED.get(dtype, dtype)
        ours = self.product_seconds(dtype, shape, num_taken)
        if dtype != TRACED_DTYPE:
            return ours
        theirs, taken = self._theirs, self.kernel_set.num_units_taken
        return ours * self._traced(is_weight(dtype, shape)).seconds(shape) / theirs.product_seconds(dtype, shape, taken)

    def published_attention_seconds(self, kernel: Kernel, num_taken: int = 0) -> float:
        """Attention by DeepSeek's kernels: as far from this cluster's rate as the trace's is from its own cluster's."""
        theirs, taken = self._theirs, self.kernel_set.num_units_taken
        traced = kernel.flops / attention_rate(self.kernel_set.attention, kernel, theirs.cluster)
        plain = kernel.flops / attention_rate(theirs.cluster.attention.measured, kernel, theirs.cluster)
        return self.attention_seconds(kernel, num_taken) * traced / (plain * theirs._crowded(taken))

    def _unpadded(self, attention: Kernel) -> Kernel:
        """Attention with values as wide as the model's."""
        *others, qk_width, v_width = attention.sizes
        width = min(self._value_width or v_width, v_width)
        products = (3, 2) if attention.backward else (1, 1)
        share = (products[0] * qk_width + products[1] * width) / (products[0] * qk_width + products[1] * v_width)
        flops = round(attention.flops * share)
        return dataclasses.replace(attention, sizes=(*others, qk_width, width), flops=flops)

    def _published_rest(self, part: Part, products: Sequence[tuple[str, Shape]], attention: Sequence[Kernel]) -> float:
        here = published.traffic(products, [kernel.sizes for kernel in attention], part.kind)
        there = self._part_traffic(part)
        seconds = 0.0
        for name in ("cast", "permute", "other"):
            if traced := getattr(there, name):
                seconds += getattr(part, f"{name}_ms") * 1e-3 * getattr(here, name) / traced
        return seconds * self._theirs.cluster.bytes_per_s / self.cluster.bytes_per_s

    def _part_traffic(self, part: Part) -> published.Traffic:
        rate = self.kernel_set.attention[0]
        sizes = (part.num_sequences, self.kernel_set.num_heads, *2 * (rate.num_keys,), rate.qk_width, rate.v_width)
        shapes = [(row.dtype, shape_of(row)) for row in part.products]
        return published.traffic(shapes, [sizes] if part.num_sequences else [], part.kind)

    def _bound(self, events: Sequence[Event], work: Sequence[Kernel], enter: Enter) -> float:
        multiplied = sum(kernel.flops / self.cluster.compute.peak(kernel.dtype) for kernel in work if kernel.flops)
        return max(multiplied, node_bytes(events, work, enter.kind) / (self.cluster.memory.peak_gb_per_s * 1e9))

    # Tables.

    def _table(self, dtype: str, weight: bool) -> ProductTable:
        dtype = {"float16": "bfloat16"}.get(dtype, dtype)
        if (dtype, weight) not in self._tables:
            rows = self._rows(dtype, weight)
            tile = self.cluster.products.tile_rows, self.cluster.products.tile_columns
            units = self.cluster.compute.num_units
            peak = self.cluster.compute.peak(dtype)
            table = ProductTable(rows, peak, self.cluster.bytes_per_s, tile, units, self.least_s)
            self._tables[dtype, weight] = table
        return self._tables[dtype, weight]

    def _rows(self, dtype: str, weight: bool) -> list[ProductRate]:
        """Measured rows of a type and kind; failing these, of the type; failing these, another type's by the peaks."""
        measured = self.cluster.products.measured
        of_type = [row for row in measured if row.dtype == dtype]
        if not of_type:
            peak = self.cluster.compute.peak(dtype)
            other = min(
                {row.dtype for row in measured},
                key=lambda name: (abs(math.log(self.cluster.compute.peak(name) / peak)), name),
            )
            share = peak / self.cluster.compute.peak(other)
            of_type = [
                ProductRate(dtype, row.m, row.n, row.k, row.tflops * share, row.groups, row.result)
                for row in measured
                if row.dtype == other
            ]
        return [row for row in of_type if is_weight(dtype, shape_of(row)) == weight] or of_type

    def _traced(self, weight: bool) -> ProductTable:
        """The trace's FP8 products, at the processors that were left to compute."""
        if ("trace", weight) not in self._tables:
            rows = [row for part in self.kernel_set.parts for row in part.products if row.dtype == TRACED_DTYPE]
            rows = [row for row in rows if is_weight(TRACED_DTYPE, shape_of(row)) == weight]
            cluster = self._theirs.cluster
            tile = cluster.products.tile_rows, cluster.products.tile_columns
            units = cluster.compute.num_units - self.kernel_set.num_units_taken
            peak = cluster.compute.peak(TRACED_DTYPE)
            table = ProductTable(rows, peak, cluster.bytes_per_s, tile, units, cluster.passes.least_us * 1e-6)
            self._tables["trace", weight] = table
        return self._tables["trace", weight]

    @cached_property
    def _theirs(self) -> Rates:
        """Rates of the cluster that the kernel set ran on."""
        return Rates(load(self.kernel_set.cluster), self.kernel_set)

    def _pass_rows(self, name: str, dtype: str) -> list[tuple[float, float]]:
        """(bytes, bytes/s) of the operation with this type, else of the operation, else of any with the type."""
        if (name, dtype) not in self._passes:
            measured = self.cluster.passes.measured
            for asked in ((name, dtype), (name, None), ("any", dtype), ("any", None)):
                if rows := [row for row in measured if row.name == asked[0] and asked[1] in (row.dtype, None)]:
                    break
            self._passes[name, dtype] = sorted((row.num_bytes, row.gb_per_s * 1e9) for row in rows)
        return self._passes[name, dtype]

    def _crowded(self, num_taken: int) -> float:
        """Times longer that what multiplies takes while communication holds so many processors."""
        units = self.cluster.compute.num_units
        return units / max(units - num_taken, 1)


def shape_of_kernel(kernel: Kernel) -> Shape:
    """The shape of a product's kernel, and from its bytes what becomes of the result: of grouped products whether rows
    or depth were dealt out, of which types the result is, whether it is added to what is there."""
    groups, m, n, k = kernel.sizes
    if kernel.flops == 2 * groups * m * n * k:  # a batch, whose products each have m rows
        m *= groups
    width = WIDTHS.get(kernel.dtype, BF16)
    if not m * n * k:
        return Shape(groups, m, n, k)
    candidates = []
    for by_depth in (False, True)[: 1 + (groups > 1)]:
        operands = width * ((m + n) * k if by_depth else (m + groups * n) * k)
        results = m * n * (groups if by_depth else 1)
        result = kernel.written_bytes // results
        for is_added in (False, True):
            missed = abs(kernel.read_bytes - operands - is_added * result * results)
            shape = Shape(groups, m, n, k, by_depth, result or width, is_added)
            candidates.append((result not in RESULT_BYTES[width], missed, by_depth, shape))
    return min(candidates, key=lambda candidate: candidate[:3])[3]


def is_vector(kernel: Kernel) -> bool:
    """Whether one side of a product is a vector, so that it is a pass over the other one: a sum, as a norm's gradient
    has it."""
    return kernel.work == "product" and 1 in kernel.sizes[1:3]


def is_weight(dtype: str, shape: Shape) -> bool:
    """Whether a product of a narrow type has a wide result, as weight gradients have, which are added up in float32."""
    return WIDTHS.get(dtype, BF16) < WIDTHS["float32"] <= shape.result_bytes


def attention_rate(rows: Sequence[AttentionRate], kernel: Kernel, cluster: Cluster) -> float:
    """Operations/s of attention like a kernel's: the rows of its type (failing these, another one's by the peaks) whose
    widths are nearest, interpolated over the logarithm of the length."""
    *_, keys, qk_width, v_width = kernel.sizes
    of_type = [row for row in rows if row.dtype == kernel.dtype] or list(rows)
    share = cluster.compute.peak(kernel.dtype) / cluster.compute.peak(of_type[0].dtype)

    def distance(row: AttentionRate) -> float:
        return math.dist((math.log(row.qk_width), math.log(row.v_width)), (math.log(qk_width), math.log(v_width)))

    least = min(map(distance, of_type))
    near = sorted((row for row in of_type if distance(row) <= least + 1e-9), key=lambda row: row.num_keys)
    points = [
        (row.num_keys, (row.backward_tflops if kernel.backward else row.forward_tflops) * 1e12 * share) for row in near
    ]
    return interpolated(points, keys)


def node_bytes(events: Sequence[Event], work: Sequence[Kernel], kind: str) -> int:
    """Bytes that a node must move if nothing between its input and its output touches memory: weights, the first
    operand or what it frees of other nodes, the last result or what it leaves behind. Of weight gradients all operands
    and results. A node without a product moves what its largest kernel does."""
    products = [kernel for kernel in work if kernel.work == "product" and kernel.flops]
    if not products:
        return max(map(_moved, work), default=0)
    shapes = [(kernel, shape_of_kernel(kernel)) for kernel in products]
    if kind == "W":
        return sum(shape.num_bytes(kernel.dtype) for kernel, shape in shapes)
    weights = sum(WIDTHS[kernel.dtype] * shape.groups * shape.n * shape.k for kernel, shape in shapes)
    (_, first), (_, last) = shapes[0], shapes[-1]
    level = low = 0
    for event in events:
        if isinstance(event, Memory):
            level += event.num_bytes
            low = min(low, level)
    freed, kept = -low, level - low
    return weights + max(BF16 * first.m * first.k, freed) + max(last.result_bytes * last.m * last.n, kept)


def _moved(kernel: Kernel) -> int:
    return kernel.read_bytes + kernel.written_bytes
