"""Two-hop dispatch: one copy per (token, node) across nodes, then one per (token, rank) inside the node.

The first hop runs on the rail: from each rank to the ranks with the same index on the other nodes. The second runs
inside the node, and at its end a row is copied once per local expert. On the way back rows are summed at each level, so
a token's result crosses to another node once too (DeepSeek-V3 report, section 3.2.2). The sums are therefore
re-associated: first over a rank's experts, then over a node's ranks, then over nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.collectives import Steps
from parallel.expert.copies import arrange, inverse, one_per_place, reach, regroup, tally
from parallel.expert.dispatch import Codec, Dispatch, Dispatched, Hop, owners
from parallel.expert.placement import Placement
from parallel.process import Groups


class TwoHopDispatch(Dispatch):
    """Rail first, then the node.

    Bytes to other nodes, dispatch: bytes of a row as the codec sends it + K * (bytes of a weight + bytes of an expert
    id) for each (token, other node) such that at least one of the token's experts lives there; combine: d * bytes per
    element for each of the same.
    """

    def __init__(self, num_experts: int, groups: Groups, codec: Codec | None = None) -> None:
        super().__init__(Placement.of(groups.mesh, num_experts), groups.host, groups.watch, codec)
        self.rail, self.node = groups.rail, groups.node
        self.has_rail = self.placement.num_nodes > 1
        self.is_remote = [node != self.placement.node for node in range(self.placement.num_nodes)]
        self.id_dtype = torch.int16 if self.placement.experts_per_node <= torch.iinfo(torch.int16).max else torch.int32

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Steps[Dispatched]:
        place, local = self.placement, [False] * self.placement.ranks_per_node

        reached = self._nodes_reached(indices)
        leaving = reached.sum(0)
        _, send_counts, recv_counts = self._exchange_counts("rail counts", leaving, self.rail)
        copies = one_per_place(reached, sum(send_counts))
        rail = Hop(copies, self.rail, send_counts, recv_counts, self.is_remote, takes_turn=self.has_rail)
        # What the next hop needs to be planned leaves before the rows, so that it is planned while they travel.
        ids = _within(copies.spread(indices), leaving, place.experts_per_node)
        routes_arriving = self._send(rail, _pack(copies.spread(weights), ids.to(self.id_dtype)))
        rows_arriving = self._send(rail, copies.spread(self._codec.encode(x)))
        if rail.takes_turn:
            yield
        weights, ids = _unpack(routes_arriving.wait(), weights.dtype, self.id_dtype)

        reached = reach(owners(ids, self.num_local_experts), place.ranks_per_node)
        by_source = torch.stack([block.sum(0) for block in reached.split(recv_counts)], 1)  # [rank, source node]
        # Beside them what each rank's experts will get, so that the last step needs no counts of its own.
        by_expert = tally(ids, place.experts_per_node).view(place.ranks_per_node, self.num_local_experts)
        leaving = by_source.sum(1)
        counts, to_rank, from_rank = self._exchange_counts(
            "node counts", torch.cat([by_source, by_expert], 1), self.node
        )
        send_counts, recv_counts = ([sum(row[: place.num_nodes]) for row in rows] for rows in (to_rank, from_rank))
        tokens_per_expert = [sum(counts) for counts in list(zip(*from_rank, strict=True))[place.num_nodes :]]
        copies = one_per_place(reached, sum(send_counts))
        node = Hop(copies, self.node, send_counts, recv_counts, local, takes_turn=not self.has_rail)
        ids = _within(copies.spread(ids), leaving, self.num_local_experts)
        routes_arriving = self._send(node, _pack(copies.spread(weights), ids.to(self.id_dtype)))
        rows_arriving = self._send(node, copies.spread(rows_arriving.wait()))
        if node.takes_turn:
            yield
        weights, ids = _unpack(routes_arriving.wait(), weights.dtype, self.id_dtype)

        # Rows came from (rail, source node); the promised order is by the source's rank, (source node, rail).
        position = inverse(regroup(counts[:, : place.num_nodes], sum(recv_counts))).unsqueeze(1)
        keys = ids * max(1, ids.shape[0]) + position
        experts = arrange(ids >= 0, keys, sum(tokens_per_expert), weighted=True)
        return self._arrived(rows_arriving.wait(), weights, experts, tokens_per_expert, (rail, node), x.dtype)


def _within(ids: Tensor, counts: Tensor, num_each: int) -> Tensor:
    """Renumber the expert ids [C, K] of copies for place p (counts[p] of them, in order): 0..num_each-1, others -1."""
    first = torch.arange(counts.numel(), device=ids.device) * num_each
    first = first.repeat_interleave(counts, output_size=ids.shape[0]).unsqueeze(1)
    local = ids - first
    return torch.where((ids >= first) & (local < num_each), local, -1)


def _pack(weights: Tensor, ids: Tensor) -> Tensor:
    """weights [C, K], ids [C, K] -> bytes [C, K * (bytes of both)], so that both travel in one message."""
    return torch.cat([_dense(weights).view(torch.uint8), _dense(ids).view(torch.uint8)], 1)


def _unpack(packed: Tensor, weight_dtype: torch.dtype, id_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack`; ids as int64."""
    num_ids = packed.shape[1] // (weight_dtype.itemsize + id_dtype.itemsize)
    weights, ids = packed.split([num_ids * weight_dtype.itemsize, num_ids * id_dtype.itemsize], 1)
    return _dense(weights).view(weight_dtype), _dense(ids).view(id_dtype).long()


def _dense(x: Tensor) -> Tensor:
    # Not `contiguous`: that keeps any stride of an axis of length one, and `view(dtype)` then refuses it.
    return x.clone(memory_format=torch.contiguous_format)
