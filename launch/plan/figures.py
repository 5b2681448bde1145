"""Groups of a cluster's figures, as settings: what they are, in which unit, and where each group is from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

DTYPES = ("float64", "float32", "bfloat16", "float8_e4m3fn")
# Bytes of an element.
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class DeviceMemory:
    """`memory`: how much a device has, what of it nobody can use, and how fast it is.

    Attributes:
        source: where the figures are from.
        device_gb: bytes of a device that a program can have, in 1e9.
        context_gb: of these, what the driver's context and loaded kernels take, in 1e9 bytes.
        communicator_gb: what each communicator takes on a device, in 1e9 bytes.
        fragmentation_share: part of the rest that an allocator cannot give out.
        peak_gb_per_s: bandwidth by the data sheet, in 1e9 bytes/s, reads and writes together.
        reached_share: part of that which a large pass reaches.
    """

    source: str
    device_gb: float
    context_gb: float
    communicator_gb: float
    fragmentation_share: float
    peak_gb_per_s: float
    reached_share: float

    def usable_bytes(self, num_communicators: int) -> int:
        """What is left for tensors on a device that is in so many communicators."""
        free = self.device_gb - self.context_gb - num_communicators * self.communicator_gb
        return int(free * (1 - self.fragmentation_share) * 1e9)


@dataclass(frozen=True)
class Compute:
    """`compute`: what a device multiplies at best, without sparsity.

    Attributes:
        source: where the figures are from.
        float64: 1e12 operations/s with operands of this type; a multiply and an add are two.
        float32: the same for this type, as a program without TF32 has it.
        bfloat16: the same for this type.
        float8_e4m3fn: the same for this type; where there is none, that of the type it is widened to.
        num_units: processors of a device that take work apart (SMs; cores of a CPU).
    """

    source: str
    float64: float
    float32: float
    bfloat16: float
    float8_e4m3fn: float
    num_units: int

    def peak(self, dtype: str) -> float:
        """Operations/s; ValueError for a type that has no peak."""
        name = {"float16": "bfloat16"}.get(dtype, dtype)
        if name not in DTYPES:
            raise ValueError(f"a product in {dtype} has no rate: a cluster has those of {', '.join(DTYPES)}")
        return float(getattr(self, name)) * 1e12


@dataclass(frozen=True)
class FarTime:
    """What it costs that operands are in no cache of the core.

    Attributes:
        num_bytes: that the operation reads and writes.
        ns_per_byte: for each of them that is far, in addition, 1e-9 s.
        num_threads: with which it was measured.
    """

    num_bytes: int
    ns_per_byte: float
    num_threads: int = 0


@dataclass(frozen=True)
class ProductRate:
    """One measured product.

    Attributes:
        dtype: of the operands.
        m: rows of the result, those of all groups together.
        n: columns of the result.
        k: length of the sums.
        tflops: 1e12 operations/s.
        groups: matrices that the rows are dealt out to.
        result: dtype of the result; float32 results of narrower operands are added to what is there.
        num_threads: with which it was measured, 0 on devices that have no such setting.
    """

    dtype: str
    m: int
    n: int
    k: int
    tflops: float
    groups: int = 1
    result: str = "bfloat16"
    num_threads: int = 0


@dataclass(frozen=True)
class Products:
    """`products`: measured products, from which those of all other shapes are predicted.

    Attributes:
        source: where the figures are from.
        tile_rows: rows of the piece of a result that one processor makes at a time.
        tile_columns: columns of that piece.
        measured: products with their rates.
        far: what far operands cost, where rates are of near ones.
    """

    source: str
    tile_rows: int
    tile_columns: int
    measured: list[ProductRate]
    far: list[FarTime] = field(default_factory=list)


@dataclass(frozen=True)
class AttentionRate:
    """Attention of one width.

    Attributes:
        dtype: of the operands.
        qk_width: of a head's queries and keys.
        v_width: of a head's values.
        num_keys: length of the sequences.
        forward_tflops: 1e12 operations/s, of which two products and half of the square count.
        backward_tflops: the same of the backward, of which five products count, one of them made again.
        num_threads: with which it was measured, 0 on devices that have no such setting.
    """

    dtype: str
    qk_width: int
    v_width: int
    num_keys: int
    forward_tflops: float
    backward_tflops: float
    num_threads: int = 0


@dataclass(frozen=True)
class Attention:
    """`attention`: measured attention.

    Attributes:
        source: where the figures are from.
        measured: rates by width and length.
    """

    source: str
    measured: list[AttentionRate]


@dataclass(frozen=True)
class PassRate:
    """One measured pass over memory.

    Attributes:
        name: torch's name of the operation, `any` for those that are not listed.
        num_bytes: that it reads and writes.
        gb_per_s: 1e9 bytes/s, reads and writes together.
        dtype: of the operands, `any` where it is not told apart.
        num_threads: with which it was measured.
    """

    name: str
    num_bytes: int
    gb_per_s: float
    dtype: str = "any"
    num_threads: int = 0


@dataclass(frozen=True)
class Passes:
    """`passes`: what operations take that multiply nothing, where that is not the memory's bandwidth alone.

    Attributes:
        source: where the figures are from.
        least_us: time that any operation takes on the device.
        measured: rates by operation and size; empty where the memory's bandwidth says it all.
        far: what far operands cost, where rates are of near ones.
    """

    source: str
    least_us: float
    measured: list[PassRate] = field(default_factory=list)
    far: list[FarTime] = field(default_factory=list)


@dataclass(frozen=True)
class CallTime:
    """The host's time for one operation of a piece of our own code, beside what the operation takes by itself.

    Attributes:
        precision: of the run.
        layer: of the piece, as the trace of a plan names it; `optimizer` for the update.
        node: of the layer, in the same way.
        kind: of the pass, `F`, `B`, `W`, of the update `U`.
        call_us: of one operation, views and memory given out among them, 1e-6 s.
    """

    precision: str
    layer: str
    node: str
    kind: str
    call_us: float

    @property
    def key(self) -> tuple[str, str, str, str]:
        """All that it is of."""
        return self.precision, self.layer, self.node, self.kind


@dataclass(frozen=True)
class Host:
    """`host`: what the processor needs to tell the device what to do.

    Attributes:
        source: where the figures are from.
        launch_us: the host's time for one operation of a model in training.
        is_device: the host is the device, which works on an operation before it goes on.
        step_us: of such a host, what a step takes besides its layers and its optimizer.
        calls: of such a host, its time for an operation by piece; for pieces that are not there, `launch_us`.
    """

    source: str
    launch_us: float
    is_device: bool = False
    step_us: float = 0.0
    calls: list[CallTime] = field(default_factory=list)

    def call_us(self, precision: str, layer: str, node: str, kind: str) -> float:
        """For an operation of a piece: as measured there; failing that, in another precision; failing that, in the
        mean of the same kind of pass."""
        asked = precision, layer, node, kind
        for first in (0, 1, 3):
            rows = [row.call_us for row in self.calls if row.key[first:] == asked[first:]]
            if rows:
                return sum(rows) / len(rows)
        return self.launch_us


@dataclass(frozen=True)
class MessageTime:
    """One measured communication.

    Attributes:
        name: `exchange`, `reduce_scatter`, `all_gather` or `send`.
        num_ranks: of the group.
        num_bytes: that leave a rank.
        us: from its start to its end, 1e-6 s.
    """

    name: str
    num_ranks: int
    num_bytes: int
    us: float


@dataclass(frozen=True)
class Level:
    """A level of the network.

    Attributes:
        source: where the figures are from.
        peak_gb_per_s: 1e9 bytes/s of a device's links, one way.
        gb_per_s: what of that a device sends, and receives at the same time, in large messages.
        collective_gb_per_s: the same within a ring of a collective (NCCL's bus bandwidth).
        latency_us: a message's way.
        per_rank_us: what an exchange takes for every peer, however little is sent.
        measured: communications with their times, which then say what the figures above say without them.
    """

    source: str
    peak_gb_per_s: float
    gb_per_s: float
    collective_gb_per_s: float
    latency_us: float
    per_rank_us: float = 0.0
    measured: list[MessageTime] = field(default_factory=list)


@dataclass(frozen=True)
class ExchangeRate:
    """All-to-all of tokens between so many ranks, by kernels made for it.

    Attributes:
        num_ranks: that exchange.
        dispatch_gb_per_s: 1e9 bytes/s through the narrowest level, in FP8; as DeepEP counts, a token's copies for the
            rank's own node included, which go through nothing.
        combine_gb_per_s: the same on the way back, in BF16.
    """

    num_ranks: int
    dispatch_gb_per_s: float
    combine_gb_per_s: float


@dataclass(frozen=True)
class Exchange:
    """`exchange`: all-to-all of tokens by the best published kernels, and what it takes from compute.

    Attributes:
        source: where the figures are from.
        num_units_taken: processors that communication holds while it runs.
        measured: rates by number of ranks.
    """

    source: str
    num_units_taken: int
    measured: list[ExchangeRate]


@dataclass(frozen=True)
class Contention:
    """What ranks of one machine do to each other when they work at once.

    Attributes:
        num_ranks: that work.
        product: times longer that a product takes than alone.
        passes: the same of a pass over memory.
        calls: the same of the host's own time.
    """

    num_ranks: int
    product: float
    passes: float
    calls: float = 1.0


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x between measured points in order of x, straight in logarithms; beyond the ends as at the ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < x <= x1:
            return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))
    return points[-1][1]
