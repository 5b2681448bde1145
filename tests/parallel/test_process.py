"""Process groups: membership in every mesh, alone and under torchrun's environment, and what a death does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch.ranks import HeldPort
from parallel import process, warm_up
from parallel.mesh import KINDS, Mesh, ParallelConfig
from tests.spawn import Ranks

ROOT = Path(__file__).parents[2]


def members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def groups_of(config: ParallelConfig, mirrored: bool) -> None:
    groups = process.start(config, mirrored=mirrored)
    mesh = Mesh(config, dist.get_rank(), mirrored)
    for kind in KINDS:
        group = getattr(groups, kind)
        assert members(group) == mesh.own_group(kind)
        total = torch.tensor([1 << mesh.rank])
        dist.all_reduce(total, group=group)
        assert int(total) == sum(1 << rank for rank in mesh.own_group(kind))
    (world,), (checkpoint,) = groups.world.groups, groups.checkpoint.groups
    assert members(world) == members(checkpoint) == tuple(range(config.world_size))
    assert len({*map(id, (world, checkpoint)), *(id(getattr(groups, name)) for name in KINDS)}) == 7
    assert groups.device == torch.device("cpu")
    process.stop(groups)


def under_torchrun() -> bool:
    """Without a default group: started from the environment, and ended with the groups."""
    groups = process.start(ParallelConfig(dp=2, ep=2))
    assert groups.started_default and members(groups.ep) == (0, 1)
    process.stop(groups)
    return dist.is_initialized()


def wrong_size(config: ParallelConfig) -> str:
    with pytest.raises(ValueError) as error:
        process.start(config)
    return str(error.value)


def test_every_rank_is_in_its_groups(ranks: Ranks) -> None:
    for config, mirrored in [
        (ParallelConfig(dp=4, ep=2, nodes=2), False),
        (ParallelConfig(dp=4, ep=4, nodes=2), False),
        (ParallelConfig(pp=2, dp=2, ep=2), True),
        (ParallelConfig(pp=4), True),
    ]:
        ranks.run(groups_of, config, mirrored, world_size=4)


def test_starts_from_the_environment_and_leaves_nothing(ranks: Ranks) -> None:
    assert ranks.run(under_torchrun, world_size=2, with_group=False) == [False, False]


def test_a_mesh_of_another_size_is_refused_before_connecting(ranks: Ranks) -> None:
    for with_group in (True, False):
        said = ranks.run(wrong_size, ParallelConfig(pp=2, dp=2), world_size=2, with_group=with_group)
        assert said == ["parallel.pp=2 times parallel.dp=2 must equal the number of processes, 2"] * 2


def test_one_process_is_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    groups = process.start(ParallelConfig())
    assert members(groups.ep) == (0,)
    process.stop(groups)
    assert not dist.is_initialized()


def test_what_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set but MASTER_ADDR is not"):
        process.start(ParallelConfig(dp=2))
    with pytest.raises(ValueError, match="device='tpu' is not one of cpu, cuda"):
        process.start(ParallelConfig(), device="tpu")


SCRIPT = """
import os, signal, torch
from parallel import process, warm_up
from parallel.collectives import all_gather
from parallel.mesh import ParallelConfig
groups = process.start(ParallelConfig(dp=3))
groups.world.all_gather(torch.ones(1), groups.watch, "numbers", "numbers from {peers}")
print("ready", flush=True)
if groups.mesh.rank == 2:
    signal.pause()
# Ranks 0 and 1 wait for rank 2, which never answers.
all_gather(torch.ones(1), groups.dense).wait()
"""


def test_a_killed_rank_ends_the_others_within_seconds() -> None:
    """The time-out of the groups is ten minutes; nobody may need it."""
    env = dict(os.environ, WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    with HeldPort() as port:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env=dict(env, MASTER_PORT=str(port), RANK=str(rank)),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(3)
        ]
        try:
            assert all(rank.stdout is not None and rank.stdout.readline() == "ready\n" for rank in started)
            started[2].send_signal(signal.SIGKILL)
            errors = [rank.communicate(timeout=300)[1] for rank in started[:2]]
            assert [rank.returncode for rank in started[:2]] == [1, 1]
            # By the death and not by their time-out.
            assert all("RuntimeError" in text and "imed out" not in text for text in errors)
        finally:
            for rank in started:
                rank.kill()
                rank.communicate()


def _warmed_up() -> list[Any]:
    """What a rank reads as it uses its communicators, twice as on any other day."""
    groups = process.start(ParallelConfig(pp=1, dp=4, ep=2, nodes=2), "cpu")
    warm_up.use_communicators(groups)
    warm_up.use_communicators(groups)
    process.stop(groups)
    return [groups.watch.waiting, groups.host.num_reads["first messages"]]


def test_every_communicator_is_used_once_before_the_first_step(ranks: Ranks) -> None:
    # Twice: dense, expert, with two calls each, the node (rails have one rank), world with two; not the flat exchange.
    assert ranks.run(_warmed_up, world_size=4, with_group=False) == [[None, 2 * (2 + 2 + 1 + 2)]] * 4
