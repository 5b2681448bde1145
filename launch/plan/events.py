"""What one rank does in a pass through a piece of the model, as plain data: the trace writes it, the clock reads it.

The events of a pass stand in the order in which the host issues them. A device works on kernels in that order, on its
compute stream; a communication runs on the stream of its group from its `Launch` on, and a `Wait` keeps whatever the
compute stream has behind it until the communication is over. A `Read` asks for numbers that the device will have, and
the host stands still at the `Answer`. A `Turn` is where a pass gives way to another one that runs beside it. Between
`Aside` and `Back` a device works on a stream beside its compute stream.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation of the device.

    Attributes:
        name: torch's name of the operation, such as `mm`.
        work: what kind of rate it runs at: `product`, `attention`, `move` (memory).
        dtype: of the operands, as torch names it, without `torch.`; of an FP8 product `float8_e4m3fn`.
        sizes: of a product (groups, m, n, k), m being the rows of all groups together where rows are grouped; of
            attention (sequences, heads, queries, keys, width of q and k, width of v); else empty.
        flops: floating-point operations; a multiply and an add are two. Of causal attention those that count.
        read_bytes, written_bytes: of memory, if nothing stays in a cache.
        backward: of attention, whether this is its gradient.
        far_bytes: of what is read and written, that was not touched shortly before (`nearness.py`).
    """

    name: str
    work: str
    dtype: str
    sizes: tuple[int, ...]
    flops: int
    read_bytes: int
    written_bytes: int
    backward: bool = False
    far_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Calls:
    """The host calls operations of torch's: kernels, and what asks nothing of the device, such as views.

    It stands before the first of those that follow each other without another piece, turn, communication or read.

    Attributes:
        number: how many.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A communication starts.

    Attributes:
        number: that its `Wait` names; unique within a pass.
        name: `exchange`, `reduce_scatter`, `all_gather`, `all_reduce`, `send` or `receive`.
        group: whose stream it runs on: `rail`, `node`, `ep`, `dense`, `expert`, `embedding`, `world`, or a pipeline's
            link, `link`.
        num_peers: ranks of the group.
        sent_bytes, received_bytes: payload that leaves this rank and arrives at it; what stays on it counts in neither.
    """

    number: int
    name: str
    group: str
    num_peers: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class Wait:
    """What the compute stream gets next needs a communication's result."""

    number: int


@dataclass(frozen=True, slots=True)
class Read:
    """Numbers set out for the host, when what has been issued before is done, `after` included.

    Attributes:
        number: that its `Answer` names; unique within a pass.
        after: the communication that brings them, None if they are made here.
    """

    number: int
    after: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The host goes on when it has the numbers."""

    number: int


@dataclass(frozen=True, slots=True)
class Turn:
    """The pass gives way.

    Attributes:
        slot: in which it then stands, as `parallel.pipeline.overlap` names them.
    """

    slot: str


@dataclass(frozen=True, slots=True)
class Aside:
    """From here on, events are on the stream of a trip.

    Attributes:
        way: which one: `F` or `B`.
        first: the trip begins, and its stream waits for what the compute stream has before.
    """

    way: str
    first: bool


@dataclass(frozen=True, slots=True)
class Back:
    """From here on, events are on the compute stream again.

    Attributes:
        way: on which stream they were.
        last: the trip is over, and the compute stream waits for its stream.
    """

    way: str
    last: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory is taken (bytes above 0) or given back (below 0).

    Attributes:
        num_bytes: of a storage, rounded up as an allocator does (512).
        what: which component it is: `activations`, `dispatch`, `logits`, `gradients` (activation gradients), `kept`
            (for a weight gradient that waits), `work` (gone within its own operation's piece).
        label: of the tensor, for people: its shape and dtype, and the operation that made it.
    """

    num_bytes: int
    what: str
    label: str


@dataclass(frozen=True, slots=True)
class Enter:
    """From here on, events are of this piece.

    Attributes:
        layer: `embedding`, `dense`, `moe`, `head`, `mtp`, `stage` for what all layers of a stage share, or `optimizer`.
        node: of the layer: `attention`, `dispatch`, `experts`, `combine`, `aggregate`, `dense`, `norm`, `loss`, `join`;
            as the layer where it has no parts; of the optimizer `zero_grad` and `update`.
        kind: `F`, `B` or `W`, of the optimizer `U`.
    """

    layer: str
    node: str
    kind: str


Event = Kernel | Calls | Launch | Wait | Read | Answer | Turn | Aside | Back | Memory | Enter


@dataclass(frozen=True)
class LayerPasses:
    """One layer's forward, backward for its input, and weight gradients, of one micro-batch.

    The backward's weight gradients are in lists of their own, one per `Turn` of the backward and one for what is left
    at its end: `weights[i]` is what may be done once the backward has given its i-th turn.
    """

    forward: tuple[Event, ...]
    backward: tuple[Event, ...]
    weights: tuple[tuple[Event, ...], ...]
