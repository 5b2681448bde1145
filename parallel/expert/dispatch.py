"""Tokens to their experts and back: what every way of travelling shares.

A dispatch is a chain of hops. Each hop copies rows (`Copies.spread`) and exchanges the copies inside one group; at the
end the received rows are spread over this rank's experts. The way back runs the chain in reverse and sums the copies
of each row (`Copies.fold`) after every exchange. The two are each other's transpose, so one pair of walks serves all
four directions: dispatch and the backward of combine go out, combine and the backward of dispatch come back.

Legend: T tokens of this rank, K experts per token, d hidden size, R rows that reach this rank's experts.

All methods are generators that yield while their rows are on the way (see parallel.collectives); every rank of the
expert-parallel group must run them in the same order. They take and return plain tensors: no autograd. They yield once
per trip, for its slowest hop. What is short, counts and hops inside a node, is waited for at once: whoever gives a turn
away for it launches its rows a whole computation later, and nothing is under way meanwhile.

How many rows travel, only the device knows: `dispatch` reads the counts of each hop to the host, once. The ways back
know everything from the plan and read nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.collectives import Handle, Steps, exchange, exchange_counts
from parallel.expert.copies import Copies, arrange, reach, tally
from parallel.expert.placement import Placement
from parallel.host import Host
from parallel.watch import Need, Watch, Watched


@dataclass(frozen=True)
class Hop:
    """One exchange: the copies that leave, how many go to and come from each rank, which ranks are on other nodes.

    takes_turn: whether others compute while it is under way.
    """

    copies: Copies
    group: dist.ProcessGroup
    send_counts: list[int]
    recv_counts: list[int]
    is_remote: list[bool]
    takes_turn: bool = True


@dataclass(frozen=True)
class Plan:
    """Where each token's copies went: made by `dispatch`, only read afterwards.

    rows_per_expert: rows of each local expert, in the order of the rows; sums to R. Some may be empty (`Copies.spaced`).
    """

    hops: tuple[Hop, ...]
    experts: Copies
    rows_per_expert: list[int]


Dispatched = tuple[Tensor, Tensor, Plan]


class Codec(Protocol):
    """What rows are while they travel out, to the experts. On the way back they travel as they are.

    row_multiple: rows of each expert come in multiples of it; what an expert lacks is made up by empty rows.
    """

    row_multiple: int

    def encode(self, rows: Tensor) -> Tensor:
        """rows [N, d] -> what is sent of them [N, ...]."""
        ...

    def arrive(self, payload: Tensor, source: Tensor, splits: list[int], dtype: torch.dtype) -> Tensor:
        """What has arrived [N, ...] -> rows [R, d] as the experts take them, `splits` of each expert: row r is
        payload[source[r]], and empty where source[r] is N. They have `dtype`, whatever they lie in memory as."""
        ...


class AsTheyAre:
    """Rows travel as rows."""

    row_multiple = 1

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def arrive(self, payload: Tensor, source: Tensor, splits: list[int], dtype: torch.dtype) -> Tensor:
        return payload.index_select(0, source)


def owners(ids: Tensor, num_each: int) -> Tensor:
    """Place of each expert when places hold runs of `num_each` experts; -1 stays negative."""
    return ids.div(num_each, rounding_mode="floor")


class Dispatch(ABC):
    """Base of the ways in which tokens travel. `placement` says which experts this rank holds."""

    def __init__(
        self,
        placement: Placement,
        host: Host | None = None,
        watch: Watch | None = None,
        codec: Codec | None = None,
    ) -> None:
        """host: where counts are read; None for a CPU's. watch: through which this rank waits for others.

        codec: of what is sent out, once per row and not per copy; None sends rows as they are.
        """
        self._codec = codec or AsTheyAre()
        self.placement = placement
        self._host, self._watch = host or Host(), watch or Watch()
        self.num_local_experts = placement.num_local_experts
        self.first_expert = placement.first_expert
        self.internode_bytes = 0
        self._num_tokens = 0
        self._num_visits: Tensor | int = 0

    def take_internode_bytes(self) -> int:
        """Payload bytes (rows, weights, expert ids; not the counts) sent to other nodes since the last call."""
        taken, self.internode_bytes = self.internode_bytes, 0
        return taken

    def take_node_visits(self) -> tuple[Tensor | int, int]:
        """(nodes visited by this rank's tokens, number of those tokens) since the last call.

        A token visits every node that has at least one of its experts, its own node too. The visits stay on the device.
        """
        taken = self._num_visits, self._num_tokens
        self._num_visits, self._num_tokens = 0, 0
        return taken

    @abstractmethod
    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        """Bring every token to its experts.

        x: [T, d]; weights: [T, K]; indices: int64 [T, K], global expert numbers, distinct within a token; -1 is none.
        Returns rows [R, d], the routing weight of each row [R], and the plan. Rows are sorted by local expert, then by
        the source's rank, then by token.
        """

    def combine(self, rows: Tensor, plan: Plan) -> Steps[Tensor]:
        """rows [R, d] -> [T, d]: the plain sum of each token's rows, zero for a token without any."""
        return self._walk_back(rows, plan)

    def dispatch_backward(self, d_rows: Tensor, d_row_weights: Tensor, plan: Plan) -> Steps[tuple[Tensor, Tensor]]:
        """d_rows [R, d], d_row_weights [R] -> dx [T, d], d_weights [T, K]."""
        dx, d_weights = plan.experts.fold(d_rows), plan.experts.fold_weights(d_row_weights)
        for hop in reversed(plan.hops):
            arriving = self._send_back(hop, d_weights), self._send_back(hop, dx)
            if hop.takes_turn:
                yield
            d_weights = hop.copies.fold_weights(arriving[0].wait())
            dx = hop.copies.fold(arriving[1].wait())
        return dx, d_weights

    def combine_backward(self, dy: Tensor, plan: Plan) -> Steps[Tensor]:
        """dy [T, d] -> d_rows [R, d]."""
        rows = self._codec.encode(dy)
        for hop in plan.hops:
            arriving = self._send(hop, hop.copies.spread(rows))
            if hop.takes_turn:
                yield
            rows = arriving.wait()
        return self._codec.arrive(rows, plan.experts.source, plan.rows_per_expert, dy.dtype)

    def _arrived(
        self,
        payload: Tensor,
        weights: Tensor,
        experts: Copies,
        tokens_per_expert: list[int],
        hops: tuple[Hop, ...],
        dtype: torch.dtype,
    ) -> Dispatched:
        """What `dispatch` returns, of the payload and weights that have reached this rank, a row for each token."""
        experts, rows_per_expert = experts.spaced(tokens_per_expert, self._codec.row_multiple)
        rows = self._codec.arrive(payload, experts.source, rows_per_expert, dtype)
        return rows, experts.spread_weights(weights), Plan(hops, experts, rows_per_expert)

    def _walk_back(self, rows: Tensor, plan: Plan) -> Steps[Tensor]:
        y = plan.experts.fold(rows)
        for hop in reversed(plan.hops):
            arriving = self._send_back(hop, y)
            if hop.takes_turn:
                yield
            y = hop.copies.fold(arriving.wait())
        return y

    def _nodes_reached(self, indices: Tensor) -> Tensor:
        """indices [T, K] -> bool [T, nodes]; counted for `take_node_visits`."""
        reached = reach(owners(indices, self.placement.experts_per_node), self.placement.num_nodes)
        self._num_tokens += indices.shape[0]
        self._num_visits = self._num_visits + reached.sum()
        return reached

    def _exchange_counts(
        self, name: str, leaving: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, list[Any], list[Any]]:
        """Exchange counts [group size, ...]: those that arrive, and as numbers those that leave and that arrive.

        No turn is given for them, though the host stands still: forwards alone count, so that the turns of a forward
        and a backward would no longer fall together, and rows would wait exposed for longer than the host does.
        """
        counts = Need("experts", "the numbers of the experts' rows from {peers}", group)
        arriving = self._watch.launch(counts, lambda: exchange_counts(leaving, group))
        reading = self._host.start(name, lambda: (leaving, arriving.wait()))
        to_rank, from_rank = reading.wait()
        return arriving.wait(), to_rank, from_rank

    def _send(self, hop: Hop, payload: Tensor) -> Watched[Tensor]:
        """Payload [sum(send_counts), ...] out along a hop."""
        rows = Need("experts", "the experts' rows from {peers}", hop.group)
        return self._watch.launch(rows, lambda: self._transfer(hop, payload, hop.send_counts, hop.recv_counts))

    def _send_back(self, hop: Hop, payload: Tensor) -> Watched[Tensor]:
        """Payload [sum(recv_counts), ...] back along a hop."""
        rows = Need("experts", "the rows back from the experts of {peers}", hop.group)
        return self._watch.launch(rows, lambda: self._transfer(hop, payload, hop.recv_counts, hop.send_counts))

    def _transfer(self, hop: Hop, payload: Tensor, send_counts: list[int], recv_counts: list[int]) -> Handle:
        """The one place where payload leaves this rank: what travels is counted here."""
        remote_rows = sum(count for count, remote in zip(send_counts, hop.is_remote, strict=True) if remote)
        row_bytes = payload[:1].numel() * payload.element_size() if remote_rows else 0
        self.internode_bytes += remote_rows * row_bytes
        return exchange(payload, send_counts, recv_counts, hop.group)


class LocalDispatch(Dispatch):
    """All experts on this rank: tokens are only sorted. Also the twin that the other two are held against."""

    def __init__(self, num_experts: int, host: Host | None = None, codec: Codec | None = None) -> None:
        super().__init__(Placement(num_experts, ep=1, ep_rank=0, num_nodes=1), host, codec=codec)

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        yield from ()
        self._nodes_reached(indices)
        (tokens_per_expert,) = self._host.read("expert counts", tally(indices, self.num_local_experts))
        copies = arrange(indices >= 0, indices, sum(tokens_per_expert), weighted=True)
        return self._arrived(self._codec.encode(x), weights, copies, tokens_per_expert, (), x.dtype)
