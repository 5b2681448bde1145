"""Which rank does what: pure arithmetic over the axes pp, dp, ep and the nodes; no torch, no processes.

Ranks run with pp slowest, then dp, and ep fastest: `rank = pp_rank * dp + dp_rank`, `ep_rank = dp_rank % ep`. Expert
parallelism is folded into data parallelism: the dp ranks of one pipeline stage are cut into runs of ep ranks, and each
run holds every expert once. Nodes are runs of `world_size / nodes` consecutive ranks.

A mirrored mesh is DualPipe's: the ranks at pp_rank r and at pp - 1 - r hold the same two stages (r and pp - 1 - r), so
a parameter's replicas are found at both (DeepSeek-V3 report, section 3.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

DISPATCHES = ("local", "flat", "two_hop")
KINDS = ("dense", "expert", "ep", "node", "rail")
# Of these, through which each way of dispatching sends tokens.
DISPATCH_KINDS: dict[str, tuple[str, ...]] = {"local": (), "flat": ("ep",), "two_hop": ("node", "rail")}


@dataclass(frozen=True)
class ParallelConfig:
    """`parallel`: how many ranks there are, and how tokens come to their experts.

    The number of processes is `parallel.pp` x `parallel.dp`.

    Attributes:
        pp: ranks of a pipeline.
        dp: data-parallel ranks per stage; unless it is set WORLD_SIZE / `parallel.pp` under torchrun, else
            `parallel.ep`.
        ep: ranks that share one set of experts; divides `parallel.dp`; 1 in a dense model.
        nodes: machines, of which the ranks are consecutive; unless it is set those of torchrun, else 1.
        dispatch: tokens to experts: `local` (`parallel.ep=1` only), `flat` (one all-to-all), `two_hop` (once per node,
            then inside it). `auto` becomes `local` with `parallel.ep=1`, `flat` on one machine, `two_hop` on several.
        elastic: after the loss of a rank a launcher may go on with fewer, in the next smaller topology that is legal;
            changes nothing else (docs/jobs.md).
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    nodes: int = 1
    dispatch: str = "auto"
    elastic: bool = False

    def __post_init__(self) -> None:
        if self.dispatch == "auto":
            taken = "local" if self.ep == 1 else "flat" if self.nodes == 1 else "two_hop"
            object.__setattr__(self, "dispatch", taken)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.nodes

    @property
    def nodes_per_ep_group(self) -> int:
        """Number of nodes over which the ep ranks that together hold every expert once are spread."""
        return max(1, self.ep // self.ranks_per_node)


def check(config: ParallelConfig, mirrored: bool = False) -> None:
    """Raise ValueError, naming field, value and rule, unless a mesh of these sizes exists."""
    for field in ("pp", "dp", "ep", "nodes"):
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"parallel.{field}={value!r} must be a whole number")
        if value < 1:
            raise ValueError(f"parallel.{field}={value} must be at least 1")
    if config.dispatch not in DISPATCHES:
        raise ValueError(f"parallel.dispatch={config.dispatch!r} is not one of {', '.join(DISPATCHES)}")
    if config.dp % config.ep:
        raise ValueError(f"parallel.ep={config.ep} does not divide parallel.dp={config.dp}")
    if config.dispatch == "local" and config.ep > 1:
        raise ValueError(f"parallel.dispatch=local needs every expert on every rank, so parallel.ep=1, not {config.ep}")
    if config.world_size % config.nodes:
        raise ValueError(
            f"parallel.nodes={config.nodes} does not divide the number of ranks, "
            f"parallel.pp={config.pp} times parallel.dp={config.dp}"
        )
    if config.ranks_per_node % config.ep and config.ep % config.ranks_per_node:
        raise ValueError(
            f"parallel.ep={config.ep} and the {config.ranks_per_node} ranks of a node (parallel.nodes={config.nodes}): "
            "one must divide the other"
        )
    if mirrored and config.pp % 2:
        raise ValueError(f"parallel.pp={config.pp} must be even: each pipeline rank needs a mirror rank (DualPipe)")


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the mesh. Raises ValueError for sizes that `check` refuses and for a rank outside the mesh."""

    config: ParallelConfig
    rank: int
    mirrored: bool = False
    shared_ends: bool = False

    def __post_init__(self) -> None:
        check(self.config, self.mirrored)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside the mesh of {self.world_size} ranks")

    @property
    def world_size(self) -> int:
        return self.config.world_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.config.dp

    @property
    def dp_rank(self) -> int:
        return self.rank % self.config.dp

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.config.ep

    @property
    def node(self) -> int:
        return self.rank // self.config.ranks_per_node

    @cached_property
    def dense_replicas(self) -> tuple[int, ...]:
        """Ranks that hold the same dense parameters: every dp rank of this pp rank, and of its mirror."""
        dp = self.config.dp
        return tuple(pp_rank * dp + dp_rank for pp_rank in self._same_stages() for dp_rank in range(dp))

    @cached_property
    def embedding_replicas(self) -> tuple[int, ...]:
        """Ranks that hold the same embedding: the dense replicas, and with `shared_ends` those of both ends together.

        Multi-token prediction embeds tokens beside the head; where the first and the last stage lie on different
        ranks, both hold the table. Of no meaning to a rank between the ends.
        """
        if not self.shared_ends or self.pp_rank not in (0, self.config.pp - 1):
            return self.dense_replicas
        dp, last = self.config.dp, (self.config.pp - 1) * self.config.dp
        return tuple(sorted({*range(dp), *range(last, last + dp)}))

    @cached_property
    def expert_replicas(self) -> tuple[int, ...]:
        """Ranks that hold the same experts: the dense replicas with this rank's ep_rank."""
        return tuple(rank for rank in self.dense_replicas if rank % self.config.dp % self.config.ep == self.ep_rank)

    @cached_property
    def ep_ranks(self) -> tuple[int, ...]:
        """The run of ranks that together holds every expert of this stage once; tokens travel among them."""
        first = self.rank - self.ep_rank
        return tuple(range(first, first + self.config.ep))

    @cached_property
    def node_ranks(self) -> tuple[int, ...]:
        """The members of `ep_ranks` on this rank's node."""
        return tuple(rank for rank in self.ep_ranks if rank // self.config.ranks_per_node == self.node)

    @cached_property
    def rail_ranks(self) -> tuple[int, ...]:
        """The members of `ep_ranks`, one per node, that have this rank's index among the members on their node."""
        step = len(self.node_ranks)
        return self.ep_ranks[self.ep_rank % step :: step]

    def own_group(self, kind: str) -> tuple[int, ...]:
        """This rank's group of a kind in KINDS, or "embedding"."""
        by_kind = {
            "dense": self.dense_replicas,
            "expert": self.expert_replicas,
            "ep": self.ep_ranks,
            "node": self.node_ranks,
            "rail": self.rail_ranks,
            "embedding": self.embedding_replicas,
        }
        return by_kind[kind]

    def groups(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """Every group of a kind in the mesh, the same on all ranks and in one order (by first rank)."""
        groups: list[tuple[int, ...]] = []
        placed: set[int] = set()
        for rank in range(self.world_size):
            if rank not in placed:  # every rank is in one group of a kind
                groups.append(replace(self, rank=rank).own_group(kind))
                placed.update(groups[-1])
        return tuple(groups)

    def _same_stages(self) -> tuple[int, ...]:
        """The pp ranks that hold this rank's stages."""
        if not self.mirrored:
            return (self.pp_rank,)
        return tuple(sorted((self.pp_rank, self.config.pp - 1 - self.pp_rank)))
