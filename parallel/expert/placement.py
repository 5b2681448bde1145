"""Which rank of an expert-parallel group holds which experts: pure arithmetic.

Experts are dealt out in runs: ep rank r holds experts `r * E/ep` to `(r + 1) * E/ep - 1`, so a node holds a run too,
and a routing group (`n_group` runs of experts, the unit of group-limited routing) lies on one node whenever the number
of nodes divides n_group.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.mesh import Mesh, ParallelConfig


def check(config: ParallelConfig, n_routed_experts: int, n_group: int) -> None:
    """Raise ValueError unless these experts can be placed on this mesh (whose own sizes `mesh.check` has passed).

    Besides equal shares, a routing group must lie on one node, because the limit on groups is there to limit the nodes
    that a token visits. With n_group=1 nothing is limited and experts may lie anywhere.
    """
    if n_routed_experts % config.ep:
        raise ValueError(f"parallel.ep={config.ep} does not divide model.n_routed_experts={n_routed_experts}")
    if n_group > 1 and n_group % config.nodes_per_ep_group:
        raise ValueError(
            f"model.n_group={n_group}: an expert group must not span nodes, so the {config.nodes_per_ep_group} nodes "
            f"over which parallel.ep={config.ep} spreads the experts (parallel.nodes={config.nodes}) must divide it"
        )


@dataclass(frozen=True)
class Placement:
    """The experts of one expert-parallel group of `num_nodes` nodes, seen from its rank `ep_rank`."""

    num_experts: int
    ep: int
    ep_rank: int
    num_nodes: int

    @classmethod
    def of(cls, mesh: Mesh, num_experts: int) -> Placement:
        """Raises ValueError when ep does not divide the number of experts."""
        check(mesh.config, num_experts, n_group=1)
        return cls(num_experts, mesh.config.ep, mesh.ep_rank, mesh.config.nodes_per_ep_group)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep

    @property
    def first_expert(self) -> int:
        return self.ep_rank * self.num_local_experts

    @property
    def ranks_per_node(self) -> int:
        """Ranks of this expert-parallel group on one node."""
        return self.ep // self.num_nodes

    @property
    def experts_per_node(self) -> int:
        return self.num_experts // self.num_nodes

    @property
    def node(self) -> int:
        """Index of this rank's node among the group's nodes."""
        return self.ep_rank // self.ranks_per_node
