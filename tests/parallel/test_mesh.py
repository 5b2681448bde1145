"""The mesh over all small shapes, against a twin that lists what each rank holds; expert placement likewise."""

from __future__ import annotations

import itertools

import pytest

from parallel.expert import placement
from parallel.expert.placement import Placement
from parallel.mesh import KINDS, Mesh, ParallelConfig, check

SIZES = range(1, 9)
SHAPES = [
    (ParallelConfig(pp, dp, ep, nodes), mirrored)
    for pp, dp, ep, nodes, mirrored in itertools.product(SIZES, SIZES, SIZES, range(1, 17), (False, True))
]


def legal_by_the_words(config: ParallelConfig, mirrored: bool) -> bool:
    """The rules once more, by listing: whole nodes, whole expert groups, neither cutting the other unevenly."""
    ranks = range(config.pp * config.dp)
    if config.dp % config.ep or len(ranks) % config.nodes or (mirrored and config.pp % 2):
        return False
    per_node = len(ranks) // config.nodes
    nodes = [set(ranks[i : i + per_node]) for i in range(0, len(ranks), per_node)]
    for first in range(0, len(ranks), config.ep):
        shares = [len(node & set(range(first, first + config.ep))) for node in nodes]
        if len({share for share in shares if share}) > 1:
            return False
        if sum(share > 0 for share in shares) > 1 and max(shares) != per_node:
            return False
    return True


LEGAL = [shape for shape in SHAPES if legal_by_the_words(*shape)]


def stages_of(mesh: Mesh) -> frozenset[int]:
    """Pipeline stages whose parameters a rank holds."""
    pp_rank = mesh.rank // mesh.config.dp
    return frozenset({pp_rank, mesh.config.pp - 1 - pp_rank} if mesh.mirrored else {pp_rank})


def share_of(mesh: Mesh) -> int:
    """Which share of the experts a rank holds."""
    return mesh.rank % mesh.config.dp % mesh.config.ep


def test_legal_shapes_are_those_of_the_rules() -> None:
    for config, mirrored in SHAPES:
        try:
            check(config, mirrored)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == legal_by_the_words(config, mirrored), (config, mirrored)
    assert len(LEGAL) > 500


def test_coordinates_number_the_ranks() -> None:
    for config, mirrored in LEGAL:
        meshes = [Mesh(config, rank, mirrored) for rank in range(config.world_size)]
        assert [(m.pp_rank, m.dp_rank) for m in meshes] == list(itertools.product(range(config.pp), range(config.dp)))
        assert [m.ep_rank for m in meshes] == [share_of(m) for m in meshes]
        assert sorted({m.node for m in meshes}) == list(range(config.nodes))
        assert [m.node for m in meshes] == sorted(m.node for m in meshes)


def test_replica_groups_are_the_ranks_that_hold_the_same() -> None:
    for config, mirrored in LEGAL:
        meshes = [Mesh(config, rank, mirrored) for rank in range(config.world_size)]
        for mesh in meshes:
            same_dense = [other.rank for other in meshes if stages_of(other) == stages_of(mesh)]
            same_experts = [rank for rank in same_dense if share_of(meshes[rank]) == share_of(mesh)]
            assert list(mesh.dense_replicas) == same_dense
            assert list(mesh.expert_replicas) == same_experts


def test_expert_groups_hold_every_expert_of_one_stage_once() -> None:
    for config, mirrored in LEGAL:
        for rank in range(config.world_size):
            mesh = Mesh(config, rank, mirrored)
            members = [Mesh(config, other, mirrored) for other in mesh.ep_ranks]
            assert sorted(share_of(member) for member in members) == list(range(config.ep))
            assert {member.pp_rank for member in members} == {mesh.pp_rank}
            assert list(mesh.node_ranks) == [member.rank for member in members if member.node == mesh.node]
            # The rail meets each node of the group once, and with the node it reaches every member.
            rail = [Mesh(config, other, mirrored) for other in mesh.rail_ranks]
            assert sorted(other.node for other in rail) == sorted({member.node for member in members})
            assert sorted(itertools.chain(*(other.node_ranks for other in rail))) == list(mesh.ep_ranks)
            assert len({other.node_ranks.index(other.rank) for other in rail}) == 1
            assert config.nodes_per_ep_group == len(rail)


def test_groups_of_a_kind_partition_the_world_in_one_order() -> None:
    for config, mirrored in [shape for shape in LEGAL if shape[0].world_size <= 12]:
        for kind in KINDS:
            seen = {Mesh(config, rank, mirrored).groups(kind) for rank in range(config.world_size)}
            assert len(seen) == 1
            (groups,) = seen
            assert sorted(itertools.chain(*groups)) == list(range(config.world_size))
            assert all(list(group) == sorted(group) for group in groups)
            for group in groups:
                assert all(Mesh(config, rank, mirrored).own_group(kind) == group for rank in group)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ParallelConfig(dp=4, ep=3), "parallel.ep=3 does not divide parallel.dp=4"),
        (ParallelConfig(dp=4, nodes=3), "parallel.nodes=3 does not divide the number of ranks"),
        (ParallelConfig(dp=6, ep=2, nodes=2), "parallel.ep=2 and the 3 ranks of a node"),
        (ParallelConfig(dp=0), "parallel.dp=0 must be at least 1"),
        (ParallelConfig(pp=-2), "parallel.pp=-2 must be at least 1"),
        (ParallelConfig(ep=True), "parallel.ep=True must be a whole number"),
        (ParallelConfig(nodes=1.0), "parallel.nodes=1.0 must be a whole number"),  # type: ignore[arg-type]
        (ParallelConfig(dispatch="deepep"), "parallel.dispatch='deepep' is not one of local, flat, two_hop"),
        (ParallelConfig(dp=2, ep=2, dispatch="local"), "parallel.dispatch=local needs .* parallel.ep=1, not 2"),
    ],
)
def test_illegal_sizes_are_refused_by_name_value_and_rule(config: ParallelConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(config)


def test_mirrors_need_an_even_pipeline_and_ranks_lie_inside() -> None:
    with pytest.raises(ValueError, match=r"parallel\.pp=3 must be even"):
        check(ParallelConfig(pp=3), mirrored=True)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank {rank} is outside the mesh of 4 ranks"):
            Mesh(ParallelConfig(dp=4), rank)


def test_experts_are_placed_in_runs_and_routing_groups_stay_on_a_node() -> None:
    for config, _ in LEGAL[::3]:
        for num_experts, n_group in itertools.product((1, 2, 4, 8, 12, 24), (1, 2, 3, 4, 8)):
            if num_experts % n_group:
                continue
            meshes = [Mesh(config, rank) for rank in Mesh(config, 0).ep_ranks]
            try:
                placement.check(config, num_experts, n_group)
            except ValueError as error:
                assert "parallel.ep=" in str(error)
                accepted = False
            else:
                accepted = True
            if num_experts % config.ep:
                assert not accepted
                continue
            places = [Placement.of(mesh, num_experts) for mesh in meshes]
            owned = [range(p.first_expert, p.first_expert + p.num_local_experts) for p in places]
            assert list(itertools.chain(*owned)) == list(range(num_experts))
            node_of = {expert: mesh.node for mesh, run in zip(meshes, owned, strict=True) for expert in run}
            size = num_experts // n_group
            groups = [{node_of[e] for e in range(first, first + size)} for first in range(0, num_experts, size)]
            assert accepted == (n_group == 1 or all(len(nodes) == 1 for nodes in groups)), (config, num_experts)
            for place, mesh in zip(places, meshes, strict=True):
                assert place.num_nodes * place.ranks_per_node == config.ep
                assert place.ranks_per_node == len(mesh.node_ranks)
                assert place.node == mesh.rail_ranks.index(mesh.rank)
                assert place.experts_per_node == sum(node == mesh.node for node in node_of.values())


def test_experts_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"parallel\.ep=3 does not divide model\.n_routed_experts=8"):
        placement.check(ParallelConfig(dp=3, ep=3), 8, 1)
    with pytest.raises(ValueError, match=r"model\.n_group=2: an expert group must not span nodes, so the 4 nodes"):
        placement.check(ParallelConfig(dp=4, ep=4, nodes=4), 8, 2)
