"""SIGKILL during saves: at every single operation on the disk, and of one rank among several at random moments.

The processes that die are forked from one that has torch loaded, so hundreds of deaths take seconds.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.ranks import HeldPort
from parallel.everyone import Everyone
from parallel.shards import Piece
from tests.spawn import STOP_S
from tests.train.checkpoint_cases import state
from train.checkpoint import step_folders
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.goes_on import read_state
from train.checkpoint.saver import Checkpoints
from train.files import check_contents

# Every call by which a save (or the deletion of an old one) changes the disk.
DISK_CALLS = [
    *((os, name) for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")),
    (io, "open"),
]
NUMEL = 64


def values(tokens: int, numel: int = NUMEL) -> torch.Tensor:
    """What the checkpoint with this count of tokens holds."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(tokens))


def die_at(nth: int) -> None:
    """Let this process kill itself just before its nth change of the disk (from 0)."""
    count = itertools.count()

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name in DISK_CALLS:
        setattr(owner, name, deadly(getattr(owner, name)))


def save_until_dead(root: Path, nth: int, done: Any) -> None:
    """Three saves, the last of a step that exists already; each that returned is reported."""
    die_at(nth)
    checkpoints = Checkpoints(root, CheckpointConfig(keep_latest_k=1))
    for tokens, step in enumerate((10, 20, 20), start=1):
        checkpoints.save(state(step, tokens=tokens), {"w": [Piece(0, values(tokens))]}, {"w": NUMEL})
        checkpoints.wait()
        done.send(tokens)


def check_resumable(root: Path, at_least: int) -> None:
    """Every step folder is whole, the newest save that returned (or a later one) loads, a new save leaves no trash."""
    checkpoints = Checkpoints(root, CheckpointConfig(keep_latest_k=1))
    complete, broken = step_folders.survey(root)
    assert not broken, broken
    latest = checkpoints.latest()
    assert (latest is None and at_least == 0) or latest in complete
    if latest is not None:
        tokens = read_state(latest).consumed_tokens
        assert tokens >= at_least, (tokens, at_least)
        loaded = torch.zeros(NUMEL)
        checkpoints.load(latest, {"w": [Piece(0, loaded)]}, {"w": NUMEL})
        assert torch.equal(loaded, values(tokens))
    checkpoints.save(state(30, tokens=4), {"w": [Piece(0, values(4))]}, {"w": NUMEL})
    checkpoints.wait()
    assert {path.name for path in root.iterdir()} == {"step-00000030", "latest"}


def die_everywhere(folder: str) -> None:
    """One process per operation on the disk; ends with the first process that lives through all saves."""
    fork = mp.get_context("fork")
    for nth in itertools.count():
        root = Path(folder) / str(nth)
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=save_until_dead, args=(root, nth, theirs))
        process.start()
        theirs.close()
        process.join()
        returned = [0]
        while ours.poll():
            try:
                returned.append(ours.recv())
            except EOFError:
                break
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        check_resumable(root, returned[-1])
        if process.exitcode == 0:
            assert returned == [0, 1, 2, 3]
            print(f"died {nth} times")
            return


def save_forever(root: Path, rank: int, world_size: int, port: int) -> None:
    """Resume from the latest checkpoint and save one step after the other, all ranks together."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    checkpoints = Checkpoints(root, CheckpointConfig(keep_latest_k=2), Everyone.of(dist.new_group(backend="gloo")))
    latest = checkpoints.latest()
    first = 1
    if latest is not None:
        first = read_state(latest).step + 1
        loaded = torch.zeros(5000)
        checkpoints.load(latest, {"w": [Piece(5000 * rank, loaded)]}, {"w": 5000 * world_size})
        assert torch.equal(loaded, values(first - 1, 5000 * world_size)[5000 * rank : 5000 * (rank + 1)])
    for step in itertools.count(first):
        mine = values(step, 5000 * world_size)[5000 * rank : 5000 * (rank + 1)].clone()
        checkpoints.save(state(step, tokens=step), {"w": [Piece(5000 * rank, mine)]}, {"w": 5000 * world_size})


def latest_name(root: Path) -> str:
    try:
        return (root / "latest").read_text().strip()
    except FileNotFoundError:
        return ""


def kill_ranks(folder: str, num_kills: int, world_size: int, seed: int) -> None:
    """Kill one random rank a random time after a save, then the others, and start again in the same folder."""
    draw = random.Random(seed)
    root = Path(folder)
    fork = mp.get_context("fork")
    for _ in range(num_kills):
        before = latest_name(root)
        with HeldPort() as port:
            job = [fork.Process(target=save_forever, args=(root, rank, world_size, port)) for rank in range(world_size)]
            for process in job:
                process.start()
            deadline = time.monotonic() + STOP_S
            while latest_name(root) == before:
                assert all(process.is_alive() for process in job) and time.monotonic() < deadline, "no save came"
                time.sleep(0.002)
            time.sleep(draw.random() * 0.1)
            draw.shuffle(job)
            assert all(process.is_alive() for process in job)
            for process in job:
                process.kill()
                time.sleep(draw.choice((0, 0.02)))  # Time for the others to notice.
            for process in job:
                process.join()
        assert not step_folders.survey(root)[1]
        for path in step_folders.survey(root)[0]:
            check_contents(path, step_folders.read_manifest(path))
    print(f"killed {num_kills} jobs, came to {latest_name(root)}")


def _in_a_process(call: str) -> str:
    code = f"import torch; torch.set_num_threads(1)\nfrom tests.train import test_checkpoint_kill as t\nt.{call}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=STOP_S)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout


def test_death_at_every_operation_on_the_disk(tmp_path: Path) -> None:
    said = _in_a_process(f"die_everywhere({str(tmp_path)!r})")
    assert int(said.split()[1]) > 50  # The patches did hit what a save does.


def test_a_rank_killed_at_random_moments(tmp_path: Path) -> None:
    assert "killed 8 jobs" in _in_a_process(f"kill_ranks({str(tmp_path)!r}, num_kills=8, world_size=3, seed=11)")
