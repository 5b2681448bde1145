"""Reads leveldb's log format, in which wandb keeps an offline run: records cut to fit into blocks of 32 KiB.

A block is a row of chunks (checksum 4 bytes, length 2, kind 1, data), filled up with zeros where no header fits; a
record is one chunk of kind 1, or a first (2), middle ones (3) and a last (4). See leveldb's doc/log_format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 32768
HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def last_records(path: Path, num_blocks: int = 32, preamble_bytes: int = 7) -> Iterator[bytes]:
    """The whole records that begin in the last `num_blocks` blocks of a file; a torn tail is left out.

    wandb's file opens with a preamble of its own before the first chunk, inside the first block.
    """
    with path.open("rb") as file:
        start = max(0, path.stat().st_size // BLOCK_BYTES - num_blocks + 1) * BLOCK_BYTES
        file.seek(start)
        data = file.read()
    at = preamble_bytes if start == 0 else 0
    record: bytes | None = None
    while at + HEADER.size <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER.size:
            at += left
            continue
        _, size, kind = HEADER.unpack_from(data, at)
        chunk = data[at + HEADER.size : at + HEADER.size + size]
        at += HEADER.size + size
        if kind in (FULL, FIRST):
            record = chunk
        elif record is not None:
            record += chunk
        if kind in (FULL, LAST) and record is not None and at <= len(data):
            yield record
            record = None
