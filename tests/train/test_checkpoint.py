"""Checkpoints over gloo ranks: any layout into any other, the moment of the save, failing ranks, damaged files."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.shards import Piece
from tests.spawn import STOP_S, Ranks
from tests.train.checkpoint_cases import (
    check_filled,
    empty_pieces,
    load_case,
    open_checkpoints,
    rank_and_size,
    save_case,
    sizes,
    state,
    truth,
)
from train.checkpoint import saver, step_folders
from train.checkpoint.agreement import CheckpointError, DiskError
from train.checkpoint.goes_on import read_state
from train.checkpoint.reader import read_metadata
from train.checkpoint.saver import Checkpoints
from train.checkpoint.writer import FlatWriter

NUM_CASES = 12


def _save_all(root: Path) -> None:
    checkpoints = open_checkpoints(root, keep_latest_k=0)
    for case in range(NUM_CASES):
        save_case(checkpoints, case, case)
    checkpoints.wait()


def _load_all(root: Path, seed: int) -> Path | None:
    checkpoints = open_checkpoints(root)
    for case in range(NUM_CASES):
        load_case(checkpoints, step_folders.step_folder(root, case), case, seed)
    return checkpoints.latest()


@pytest.mark.parametrize("saved_on", [4, 3, 1])
def test_any_layout_loads_under_any_other_bit_for_bit(ranks: Ranks, tmp_path: Path, saved_on: int) -> None:
    ranks.run(_save_all, tmp_path, world_size=saved_on)
    for world_size in (1, 2, 3, 4):
        latest = ranks.run(_load_all, tmp_path, world_size, world_size=world_size)
        assert latest == [tmp_path / f"step-{NUM_CASES - 1:08d}"] * world_size


def test_without_a_process_group(ranks: Ranks, tmp_path: Path) -> None:
    _save_all(tmp_path)
    _load_all(tmp_path, seed=5)
    ranks.run(_load_all, tmp_path, 6, world_size=2)


def _save_replicas(root: Path) -> None:
    checkpoints = open_checkpoints(root)
    tensor = torch.arange(100_000, dtype=torch.float32)
    checkpoints.save(state(1), {"bias": [Piece(0, tensor)]}, {"bias": tensor.numel()})
    checkpoints.wait()


def test_what_all_ranks_hold_is_written_once(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_save_replicas, tmp_path, world_size=4)
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert 400_000 < num_bytes < 500_000
    metadata = read_metadata(tmp_path / "step-00000001")
    assert len(metadata.state_dict_metadata["bias"].chunks) == 1


class Gate:
    """Holds every write of tensors back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        original = FlatWriter.write_data

        def held(writer: FlatWriter, *args: Any) -> Any:
            assert self.open.wait(STOP_S)
            return original(writer, *args)

        patch.setattr(FlatWriter, "write_data", held)


def _modify_after_save(root: Path) -> None:
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        checkpoints = open_checkpoints(root)
        for step in (1, 2):  # The second save writes from the copies' memory of the first.
            value = torch.full((50,), float(10 * step + rank))
            checkpoints.save(state(step), {"w": [Piece(50 * rank, value)]}, {"w": 200})
            value.fill_(-1)
            gate.open.set()
            checkpoints.wait()
            gate.open.clear()
    for step in (1, 2):
        loaded = torch.zeros(200)
        checkpoints.load(step_folders.step_folder(root, step), {"w": [Piece(0, loaded)]}, {"w": 200})
        assert loaded.view(4, 50).unique(dim=1).flatten().tolist() == [10.0 * step + other for other in range(4)]


def test_what_is_saved_are_the_values_at_the_call(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(_modify_after_save, tmp_path, world_size=4)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    checkpoints = open_checkpoints(tmp_path)
    save_case(checkpoints, 0, 1)
    second = threading.Thread(target=save_case, args=(checkpoints, 1, 2))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert not list(tmp_path.glob("*00000002*"))
    gate.open.set()
    second.join(STOP_S)
    checkpoints.wait()
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-00000001", "step-00000002"}
    load_case(checkpoints, tmp_path / "step-00000001", 0)
    load_case(checkpoints, tmp_path / "step-00000002", 1)


def test_disabled_async_mode_returns_when_the_checkpoint_is_there(tmp_path: Path) -> None:
    save_case(open_checkpoints(tmp_path, async_mode="disabled"), 3, 7)
    assert (tmp_path / "latest").read_text() == "step-00000007\n"


def _full_disk(patch: pytest.MonkeyPatch, at: tuple[Any, str]) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(*at, fail)


FAILURES: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None]]] = {
    "staging": (1, lambda patch: _full_disk(patch, (Checkpoints, "_stage"))),
    "making the folder": (0, lambda patch: _full_disk(patch, (Path, "mkdir"))),
    "planning": (3, lambda patch: _full_disk(patch, (FlatWriter, "prepare_local_plan"))),
    "writing tensors": (2, lambda patch: _full_disk(patch, (FlatWriter, "write_data"))),
    "writing metadata": (0, lambda patch: _full_disk(patch, (FlatWriter, "finish"))),
    "reading back": (3, lambda patch: _full_disk(patch, (FlatWriter, "read_back"))),
    "syncing": (1, lambda patch: _full_disk(patch, (os, "fsync"))),
    "renaming": (0, lambda patch: _full_disk(patch, (os, "rename"))),
    "writing the state": (0, lambda patch: _full_disk(patch, (saver, "write_durably"))),
}


def _fail_on_one_rank(root: Path) -> list[str]:
    checkpoints = open_checkpoints(root, keep_latest_k=1)
    save_case(checkpoints, 0, 1)
    checkpoints.wait()
    texts = []
    for failing, fail in FAILURES.values():
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == failing:
                fail(patch)
            save_case(checkpoints, 1, 2)
            with pytest.raises(CheckpointError) as caught:
                checkpoints.wait()
            dist.barrier()
        texts.append(str(caught.value))
        checkpoints.wait()  # Said once.
        assert checkpoints.latest() == root / "step-00000001"
        load_case(checkpoints, root / "step-00000001", 0)
    save_case(checkpoints, 2, 3)
    assert checkpoints.latest() == root / "step-00000003"
    load_case(checkpoints, root / "step-00000003", 2)
    return texts


def test_a_failure_on_one_rank_is_raised_on_all_and_harms_nothing(ranks: Ranks, tmp_path: Path) -> None:
    texts = ranks.run(_fail_on_one_rank, tmp_path, world_size=4)
    for (failure, (failing, _)), *said in zip(FAILURES.items(), *texts, strict=True):
        assert len(set(said)) == 1, failure
        assert said[0].startswith(f"checkpoint of step 2 could not be written to {tmp_path}: "), failure
        assert "No space left on device" in said[0], failure
        assert f"rank {failing}" in said[0], failure
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "latest"}


def _file_too_large(root: Path) -> str:
    checkpoints = open_checkpoints(root)
    save_case(checkpoints, 0, 1)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        value = torch.zeros(100_000)
        checkpoints.save(state(2), {"w": [Piece(100_000 * dist.get_rank(), value)]}, {"w": 200_000})
        with pytest.raises(DiskError) as caught:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    load_case(checkpoints, root / "step-00000001", 0)
    return str(caught.value)


def test_the_operating_system_refuses_to_write(ranks: Ranks, tmp_path: Path) -> None:
    said = ranks.run(_file_too_large, tmp_path, world_size=2)
    assert said[0] == said[1]
    assert re.fullmatch(
        rf"checkpoint of step 2 could not be written to {tmp_path}: File too large \(on rank 1\) "
        r"\(needs about 80\d\.\d kB\); step 1 is the newest whole one",
        said[0],
    ), said[0]
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "latest"}


def test_what_the_disk_does_not_give_back_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FlatWriter.finish

    def spoil(writer: FlatWriter, *args: Any, **kwargs: Any) -> None:
        original(writer, *args, **kwargs)
        file = next(tmp_path.glob(".step-*/*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)

    monkeypatch.setattr(FlatWriter, "finish", spoil)
    checkpoints = open_checkpoints(tmp_path)
    save_case(checkpoints, 5, 1)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp reads back as"):
        checkpoints.wait()
    assert not list(tmp_path.iterdir())


def test_a_hole_between_pieces_is_refused(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    for pieces in (
        [Piece(0, torch.ones(3)), Piece(5, torch.ones(5))],
        [Piece(0, torch.ones(9))],
        [Piece(1, torch.ones(9))],
    ):
        checkpoints.save(state(1), {"w": pieces}, {"w": 10})
        with pytest.raises(CheckpointError, match="w: elements"):
            checkpoints.wait()
    checkpoints.save(state(1), {"w": [Piece(5, torch.ones(6))]}, {"w": 10})
    with pytest.raises(CheckpointError, match="not a range of its 10 elements"):
        checkpoints.wait()
    assert checkpoints.latest() is None


def _refuse_damaged(root: Path, seed: int) -> None:
    """Damage every file in turn, in a copy; every rank must refuse it by name and keep its pieces."""
    draw = random.Random(seed)
    rank = rank_and_size()[0]
    checkpoints = open_checkpoints(root)
    good = root / "step-00000005"
    for name in sorted(path.name for path in good.iterdir()):
        for damage in ("flip", "truncate", "append", "delete"):
            content = bytearray((good / name).read_bytes())
            at = draw.randrange(len(content))
            bad = root / f"bad-{name}-{damage}"
            if rank == 0:
                shutil.copytree(good, bad)
                if damage == "flip":
                    content[at] ^= 1 << draw.randrange(8)
                elif damage == "truncate":
                    del content[at:]
                else:
                    content += b"\0"
                (bad / name).unlink() if damage == "delete" else (bad / name).write_bytes(content)
            if dist.is_initialized():
                dist.barrier()
            tensors = truth(5)
            buffers, pieces = empty_pieces(tensors, seed)
            with pytest.raises(ValueError, match=name):
                checkpoints.load(bad, pieces, sizes(tensors))
            check_filled(tensors, buffers, {})


@pytest.mark.parametrize("world_size", [1, 3])
def test_damaged_files_are_refused_by_name(ranks: Ranks, tmp_path: Path, world_size: int) -> None:
    checkpoints = open_checkpoints(tmp_path)
    save_case(checkpoints, 5, 5)
    checkpoints.wait()
    ranks.run(_refuse_damaged, tmp_path, world_size, world_size=world_size)


def test_damaged_state_is_refused_by_name(tmp_path: Path) -> None:
    save_case(open_checkpoints(tmp_path, async_mode="disabled"), 0, 1)
    path = tmp_path / "step-00000001" / "state.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 2'))
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        read_state(path.parent)


def _load_other(root: Path, change: str) -> str:
    checkpoints = open_checkpoints(root)
    first = dist.get_rank() == 0
    value = torch.zeros(10, dtype=torch.int64 if change == "dtype" and first else torch.float32)
    name = "other" if change == "name" and first else "w"
    numel = 12 if change == "size" and first else 10
    with pytest.raises(ValueError) as caught:
        checkpoints.load(root / "step-00000001", {name: [Piece(0, value)]}, {name: numel})
    assert not value.any()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("name", "other is not in the checkpoint"),
        ("size", "w has 12 elements here and 10 in the checkpoint"),
        ("dtype", "w is torch.int64 here and torch.float32 in the checkpoint"),
    ],
)
def test_other_tensors_are_refused_on_all_ranks(ranks: Ranks, tmp_path: Path, change: str, said: str) -> None:
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state(1), {"w": [Piece(0, torch.ones(10))]}, {"w": 10})
    checkpoints.wait()
    assert ranks.run(_load_other, tmp_path, change, world_size=2) == [f"{said} (on rank 0)"] * 2


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match=r"(posix|os)\.system"):
        read_metadata(tmp_path)
