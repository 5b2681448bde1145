"""What a killed, doubled or broken preparation leaves behind."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.spawn import STOP_S
from tests.train.data_texts import all_bytes, write_folder, write_mixture
from train.data.config import DataConfig
from train.data.prepare.encode import Encoded
from train.data.prepare.one_source import prepare
from train.data.prepare.writer import Writer
from train.data.rows.tokens import Tokens

ROOT = Path(__file__).parents[2]
START = """
import sys
from train.data.prepare import one_source
from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
one_source._TASK_BYTES, one_source._JOURNAL_EVERY_S = 3000, 0  # a journal for every few documents
source, folder, workers, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = DataConfig(source=source, dir=folder, vocab_size=280, valid_fraction=0.3, shard_tokens=3000,
                    num_workers=workers, deduplicate=True)
"""
# Ends itself by SIGKILL before the n-th of the calls that change what lies on the disk.
KILL = """
import os, pathlib, signal
import train.data.prepare.one_source
from train.data.prepare.writer import Writer
calls = 0
def deadly(owner, name):
    real = getattr(owner, name)
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(owner, name, call)
for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "replace"), (pathlib.Path, "mkdir"),
                    (pathlib.Path, "unlink"), (Writer, "add"), (Writer, "counts"),
                    (train.data.tokenizer.Tokenizer, "save")):
    deadly(owner, name)
"""


def start(source: Path, folder: Path, workers: int = 1, kill_at: int = 0) -> subprocess.Popen[str]:
    code = START + (KILL if kill_at else "") + "prepare(config)"
    arguments = [sys.executable, "-c", code, str(source), str(folder), str(workers), str(kill_at)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def clean(source: Path, folder: Path) -> dict[str, bytes]:
    config = DataConfig(
        source=str(source),
        dir=str(folder),
        vocab_size=280,
        valid_fraction=0.3,
        shard_tokens=3000,
        num_workers=1,
        deduplicate=True,
    )
    prepare(config, lambda line: None)
    return all_bytes(folder)


def test_a_kill_before_any_change_of_the_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source, folder = write_folder(tmp_path / "text", 20), tmp_path / "tokens"
    num_kills = 0
    for kill_at in range(1, 200, 3):  # over what the kills before have left
        child = start(source, folder, kill_at=kill_at)
        _, errors = child.communicate(timeout=STOP_S)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, errors
        num_kills += 1
        if (folder / "meta.json").exists():  # killed behind the last rename: whole
            Tokens.open(folder, "train", verify=True)
            (folder / "meta.json").unlink()
        else:
            for split in ("train", "valid"):
                with pytest.raises(ValueError, match="holds no prepared tokens"):
                    Tokens.open(folder, split)
    assert num_kills > 8
    assert all_bytes(folder) == clean(source, tmp_path / "clean")


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes through /proc")
def test_a_kill_at_any_moment_ends_the_workers_and_the_next_call_finishes(tmp_path: Path) -> None:
    source, folder = write_folder(tmp_path / "text", 60, least_words=1000, most_words=2000), tmp_path / "tokens"
    for seed in range(2):
        child = start(source, folder, workers=2)
        workers: list[int] = []
        while child.poll() is None and len(workers) < 2:
            workers = children(child.pid)
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.8))
        child.kill()
        child.communicate()
        until = time.monotonic() + STOP_S
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < until, "a worker outlived its parent"
            time.sleep(0.02)
        if not (folder / "meta.json").exists():
            with pytest.raises(ValueError, match="holds no prepared tokens"):
                Tokens.open(folder, "train")
    last = start(source, folder, workers=2)
    assert last.communicate(timeout=STOP_S) and last.returncode == 0
    assert all_bytes(folder) == clean(source, tmp_path / "clean")


def test_killed_calls_go_on_where_they_were(tmp_path: Path) -> None:
    """Each call lives for a few documents only, with another number of workers: one that started again never ends."""
    source, folder = tmp_path / "mixture", tmp_path / "tokens"
    write_mixture(source, num_documents=25)
    (source / "z.jsonl").write_bytes((source / "b.jsonl").read_bytes())  # left out, also by a call that goes on
    random_, num_kills = random.Random(3), 0
    while True:
        child = start(source, folder, workers=random_.choice([1, 1, 1, 2]), kill_at=random_.randint(15, 40))
        _, errors = child.communicate(timeout=STOP_S)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, errors
        num_kills += 1
        assert num_kills < 30
    assert num_kills > 5  # so the whole takes more than any call could do
    assert all_bytes(folder) == clean(source, tmp_path / "clean")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_change_nothing(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    source, folder = tmp_path / "mixture", tmp_path / "tokens"
    write_mixture(source, seed, num_documents=600)
    num_kills = 0
    while not num_kills:  # a call may be done before it is struck
        shutil.rmtree(folder, ignore_errors=True)
        while not (folder / "meta.json").exists():
            child = start(source, folder, workers=random_.randint(1, 3))
            wait_for_journals(child, folder / "partial" / "journal.npz", random_.randint(1, 30))
            time.sleep(random_.uniform(0, 0.05))
            child.kill()
            _, errors = child.communicate()
            assert child.returncode in (0, -signal.SIGKILL), errors
            num_kills += child.returncode != 0
    assert all_bytes(folder) == clean(source, tmp_path / "clean")


def wait_for_journals(child: subprocess.Popen[str], path: Path, number: int) -> None:
    """Return when the call has replaced its journal so many times, or has ended."""
    seen: set[int] = set()
    while len(seen) <= number and child.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.002)


def stopped_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "text", **settings: object
) -> tuple[DataConfig, dict[str, bytes]]:
    """A folder in which a call has died after some documents, and what an undisturbed one makes of the same."""
    source = tmp_path / name
    if not source.exists():
        write_folder(source, 30)
    monkeypatch.setattr("train.data.prepare.one_source._TASK_BYTES", 900)
    monkeypatch.setattr("train.data.prepare.one_source._JOURNAL_EVERY_S", 0)
    values = {"vocab_size": 280, "valid_fraction": 0.3, "shard_tokens": 300, "num_workers": 1}
    config = DataConfig(**{"source": str(source), "dir": str(tmp_path / "tokens"), **values, **settings})
    whole = dataclasses.replace(config, dir=str(tmp_path / "whole"), on_bad_document="skip")
    prepare(whole, lambda line: None)
    with monkeypatch.context() as patch:
        left = [7]

        def dying(self: Writer, encoded: Encoded) -> np.ndarray:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return add(self, encoded)

        add = Writer.add
        patch.setattr(Writer, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, lambda line: None)
    return config, all_bytes(whole.folder)


def again(config: DataConfig) -> tuple[dict[str, bytes], list[str]]:
    said: list[str] = []
    prepare(config, said.append)
    return all_bytes(config.folder), said


def test_what_lies_behind_the_journal_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = stopped_halfway(tmp_path, monkeypatch)
    last = [max((config.folder / "partial").glob(f"{split}-0*.bin")) for split in ("train", "valid")]
    for path in (*last, *(config.folder / "partial").glob("*-documents.bin"), config.folder / "partial" / "hashes.bin"):
        path.write_bytes(path.read_bytes() + b"torn")
    (config.folder / "partial" / "train-00099.bin").write_bytes(b"torn")
    found, said = again(config)
    assert found == whole and said[0].startswith("going on in")


@pytest.mark.parametrize("fault", ["journal", "journal cut", "shard", "documents", "hashes", "tokenizer", "gone"])
def test_what_cannot_be_gone_on_with_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    config, whole = stopped_halfway(tmp_path, monkeypatch)
    partial = config.folder / "partial"
    name = {
        "shard": "train-00000.bin", "documents": "valid-documents.bin", "hashes": "hashes.bin",
        "gone": "train-00000.bin", "tokenizer": "tokenizer.json",
    }.get(fault, "journal.npz")  # fmt: skip
    content = bytearray((partial / name).read_bytes())
    if fault == "gone":
        (partial / name).unlink()
    elif fault == "journal":
        content[len(content) // 2] ^= 1
        (partial / name).write_bytes(content)
    else:
        (partial / name).write_bytes(content[: len(content) // 2])
    found, said = again(config)
    assert found == whole
    assert not any(each.startswith("going on") for each in said)


def test_another_source_or_other_settings_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = stopped_halfway(tmp_path, monkeypatch)
    path = min((tmp_path / "text").rglob("*.txt"))
    os.utime(path, ns=(1, 1))
    _, said = again(config)
    assert said[0].startswith("preparing")
    shutil.rmtree(config.folder)
    config, _ = stopped_halfway(tmp_path, monkeypatch)
    _, said = again(dataclasses.replace(config, valid_fraction=0.4))
    assert said[0].startswith("preparing")


def test_a_refused_preparation_goes_on_when_it_may_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "text", 30)
    (source / "zz.txt").write_bytes(b"\xff")
    config, whole = stopped_halfway(tmp_path, monkeypatch, on_bad_document="refuse")
    with pytest.raises(ValueError, match=r"zz.txt .*: not UTF-8 text"):
        prepare(config, lambda line: None)
    found, said = again(dataclasses.replace(config, on_bad_document="skip"))
    assert found == whole and said[0].startswith("going on in")
    shutil.rmtree(config.folder)
    shutil.rmtree(tmp_path / "whole")
    (source / "00.txt").write_bytes(b"\xff")  # skipped before the kill: a call that refuses does not go on behind it
    config, _ = stopped_halfway(tmp_path, monkeypatch)
    said = []
    with pytest.raises(ValueError, match=r"00.txt .*: not UTF-8 text"):
        prepare(dataclasses.replace(config, on_bad_document="refuse"), said.append)
    assert said[0].startswith("preparing")


def test_two_calls_at_once_prepare_once(tmp_path: Path) -> None:
    source, folder = write_folder(tmp_path / "text", 30, least_words=500, most_words=1000), tmp_path / "tokens"
    both = [start(source, folder) for _ in range(2)]
    said = [child.communicate(timeout=STOP_S) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert sum("trained a tokenizer" in out for out, _ in said) == 1
    assert sum("nothing to do" in out for out, _ in said) == 1
    assert all_bytes(folder) == clean(source, tmp_path / "clean")


def test_a_worker_that_dies_is_a_sentence_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "text", 10)
    config = DataConfig(source=str(source), dir=str(tmp_path / "t"), vocab_size=280, valid_fraction=0.3, num_workers=2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("false"))
        with pytest.raises(ValueError, match=r"a tokenising worker died .exit code 1"):
            prepare(config, lambda line: None)
    assert prepare(config, lambda line: None).splits["train"].num_tokens > 0


def test_workers_do_without_torch() -> None:
    """Each worker imports what tokenising needs: torch would cost more than a core gains on small data."""
    code = "import sys, train.data.prepare.workers, train.data.prepare.one_source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ)).returncode == 0
