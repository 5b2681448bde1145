"""leveldb's log format: records written by a plain writer come back, from the end too, and never half of one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.track.leveldb_log import BLOCK_BYTES, last_records


def write(records: list[bytes]) -> bytes:
    """wandb's 7 bytes, then every record cut where a block ends (leveldb's doc/log_format.md; checksums left 0)."""
    out = bytearray(b"preface")
    for record in records:
        rest, is_first = record, True
        while is_first or rest:
            room = BLOCK_BYTES - len(out) % BLOCK_BYTES
            if room < 7:
                out += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[(is_first, not rest)]
            out += struct.pack("<IHB", 0, len(part), kind) + part
            is_first = False
            if not rest:
                break
    return bytes(out)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200) | st.integers(0, 80_000), max_size=12),
    cut=st.integers(0, 400_000),
    num_blocks=st.integers(1, 4),
)
def test_whole_records_come_back(
    sizes: list[int], cut: int, num_blocks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "records"
    records = [bytes([index]) * size for index, size in enumerate(sizes)]
    whole = write(records)
    path.write_bytes(whole)
    assert list(last_records(path, num_blocks=1000)) == records
    # From the end: the last ones, at least all that fit into the blocks before the last.
    tail = list(last_records(path, num_blocks))
    assert tail == records[len(records) - len(tail) :]
    held = 0
    for size in reversed(sizes):
        held += size + 7 * (2 + size // BLOCK_BYTES)
        if held > (num_blocks - 1) * BLOCK_BYTES:
            break
    else:
        assert tail == records
    # Torn: a prefix.
    path.write_bytes(whole[: len(whole) - cut] if cut < len(whole) else whole[:7])
    torn = list(last_records(path, num_blocks=1000))
    assert torn == records[: len(torn)] and (cut == 0) <= (len(torn) == len(records))


def test_zeros_at_the_end_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(write([b"one", b"two"]) + bytes(40_000))
    assert list(last_records(path, num_blocks=10)) == [b"one", b"two"]
