"""The kit for files: what is replaced is whole, what is damaged is named, what is locked is refused or waited for."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing as mp
import os
import random
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest

from train.files import (
    CRC32,
    SHA256,
    DamagedFileError,
    FileRecord,
    SummedFile,
    aside,
    check_contents,
    check_read_back,
    check_sizes,
    checksum_of,
    locked,
    new_folder,
    record_of,
    replace_durably,
    replacing,
    sync,
    write_durably,
)

PLAIN = {CRC32: lambda data: f"{zlib.crc32(data):08x}", SHA256: lambda data: hashlib.sha256(data).hexdigest()}


def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that change names or wait for the disk, as they come: the call and the last part of the path."""
    seen: list[str] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def call(first: Any, *rest: Any, **keys: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            seen.append(f"{name} {os.path.basename(path)}")
            return original(first, *rest, **keys)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        watch(name)
    return seen


@pytest.mark.parametrize("algorithm", PLAIN)
@pytest.mark.parametrize("num_bytes", [0, 1, 5_000_000])
def test_a_record_is_size_and_checksum_of_the_whole(tmp_path: Path, algorithm: str, num_bytes: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    expected = FileRecord(num_bytes, algorithm, PLAIN[algorithm](data))
    with SummedFile(tmp_path / "parts", algorithm) as file:
        for start in range(0, num_bytes, 700_001):
            assert file.write(memoryview(data)[start : start + 700_001]) == len(data[start : start + 700_001])
    assert file.record == expected == record_of(tmp_path / "parts", algorithm)
    assert write_durably(tmp_path / "whole", data, algorithm) == expected
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes() == data


@pytest.mark.parametrize("algorithm", PLAIN)
def test_a_summed_file_goes_on_where_another_stopped(tmp_path: Path, algorithm: str) -> None:
    path, data = tmp_path / "file", random.Random(1).randbytes(9000)
    path.write_bytes(data[:6000] + b"torn")
    file = SummedFile(path, algorithm, keep_bytes=6000)
    file.write(data[6000:])
    assert file.close_and_compare() == FileRecord(9000, algorithm, PLAIN[algorithm](data))
    assert path.read_bytes() == data
    with pytest.raises(OSError, match="has 9000 bytes, not the 9001 that were written"):
        SummedFile(path, algorithm, keep_bytes=9001)


def test_what_the_disk_gives_back_otherwise_is_an_error(tmp_path: Path) -> None:
    file = SummedFile(tmp_path / "file", CRC32)
    file.write(b"salt")
    file.close()
    (tmp_path / "file").write_bytes(b"silt")
    for compare in (file.close_and_compare, lambda: check_read_back(tmp_path / "file", file.record)):
        with pytest.raises(
            OSError, match=r"file reads back as 4 bytes with CRC-32 \w{8}, 4 bytes with CRC-32 \w{8} were"
        ):
            compare()


def test_damage_is_named(tmp_path: Path) -> None:
    records = {name: write_durably(tmp_path / name, name.encode(), SHA256) for name in ("a", "b", "c")}
    check_sizes(tmp_path, records)
    check_contents(tmp_path, records)
    (tmp_path / "b").write_bytes(b"x")
    check_sizes(tmp_path, records)
    check_contents(tmp_path, records, ["a", "c"])
    with pytest.raises(DamagedFileError, match="b is damaged: it has 1 bytes with SHA-256") as caught:
        check_contents(tmp_path, records)
    assert caught.value.path == tmp_path / "b"
    (tmp_path / "a").write_bytes(b"aa")
    with pytest.raises(DamagedFileError, match="a is damaged: it has 2 bytes, was saved with 1"):
        check_sizes(tmp_path, records)
    (tmp_path / "a").unlink()
    for check in (check_sizes, check_contents):
        with pytest.raises(DamagedFileError, match="a is missing"):
            check(tmp_path, records)


def test_checksums_of_values_do_not_know_the_order_of_keys() -> None:
    one, other = {"a": 1, "b": [1, {"c": None}]}, {"b": [1, {"c": None}], "a": 1}
    assert checksum_of(one, SHA256) == checksum_of(other, SHA256) != checksum_of({**one, "a": 2}, SHA256)
    assert checksum_of([1], CRC32) == f"{zlib.crc32(b'[1]'):08x}"


def test_a_replaced_file_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    seen = disk_calls(monkeypatch)
    replace_durably(path, b"new")
    assert seen == ["fsync .file.partial", "replace .file.partial", f"fsync {tmp_path.name}"]
    seen.clear()
    with replacing(path, durable=False) as partial:
        partial.write_bytes(b"newer")
    assert seen == ["replace .file.partial"]
    assert path.read_bytes() == b"newer"


def test_a_replacement_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        replace_durably(path, b"new")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"file": b"old"}


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("number", "tolerated"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False), (errno.ENOSPC, False)]
)
def test_file_systems_that_do_not_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tolerated: bool
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if tolerated:
        sync(tmp_path)
        replace_durably(tmp_path / "file", b"x")
    else:
        for attempt in (lambda: sync(tmp_path), lambda: write_durably(tmp_path / "file", b"x", CRC32)):
            with pytest.raises(OSError, match=os.strerror(number)):
                attempt()


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    with pytest.raises(KeyError), new_folder(final) as partial:
        (partial / "half").write_bytes(b"x")
        assert partial == aside(final) and not final.exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    aside(final).mkdir()
    (aside(final) / "of a killed process").write_bytes(b"x")
    seen = disk_calls(monkeypatch)
    with new_folder(final) as partial:
        (partial / "file").write_bytes(b"x")
    assert seen == ["fsync file", "fsync .final.partial", "rename .final.partial", f"fsync {tmp_path.name}"]
    assert [path.name for path in final.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="final exists already"), new_folder(final):
        pass
    with pytest.raises(ValueError, match="in/a/file cannot be written"), new_folder(final / "file" / "in/a/file"):
        pass


def hold(path: Path, pipe: Any) -> None:
    with locked(path, "in use"):
        pipe.send("held")
        signal.pause()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_is_one_process_alone_and_dies_with_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock" if kind == "file" else tmp_path
    fork = mp.get_context("fork")
    ours, theirs = fork.Pipe()
    holder = fork.Process(target=hold, args=(path, theirs))
    holder.start()
    assert ours.recv() == "held"
    with pytest.raises(ValueError, match="who holds it"), locked(path, "who holds it"):
        pass
    said: list[str] = []

    def wait(sentence: str) -> None:
        said.append(sentence)
        holder.kill()

    with locked(path, "waiting", wait):
        assert said == ["waiting"]
        with pytest.raises(ValueError, match="in use"), locked(path, "in use"):
            pass
    with locked(path, "in use", said.append):
        pass
    assert said == ["waiting"]
    holder.join()


def test_a_lock_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "lock"
    with pytest.raises(ValueError, match="nowhere/lock cannot be locked: No such file"), locked(path, "in use"):
        pass
