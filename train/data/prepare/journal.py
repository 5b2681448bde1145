"""How far a preparation has come, written aside every few seconds, so that a killed one goes on from there.

One file, replaced as a whole, always behind the data that it speaks of: what the disk has of shards, documents and
hashes beyond it is cut off by whoever goes on.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.meta import SPLITS
from train.data.read.blocks import Position
from train.data.read.trouble import Skipped
from train.files import replace_durably

JOURNAL = "journal.npz"


class Progressed(NamedTuple):
    """Where a preparation stands.

    identity: what it prepares; another one starts again.
    threshold, notes: of the splits (see `train/data/prepare/one_source.py`).
    position: where the source goes on. disk_bytes: how much of its files lies before.
    writer, counts: see `Writer`.
    """

    identity: str
    threshold: int
    notes: tuple[str, ...]
    position: Position
    disk_bytes: int
    troubles: dict[str, Skipped]
    writer: dict[str, Any] | None
    counts: dict[str, np.ndarray]


def save(progressed: Progressed, folder: Path) -> None:
    """Replace the folder's journal; the disk has it when this returns."""
    plain = {**progressed._asdict(), "counts": None}
    plain["troubles"] = {reason: [each.count, each.examples] for reason, each in progressed.troubles.items()}
    body = io.BytesIO()
    state = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
    np.savez(body, state=state, **progressed.counts)  # type: ignore[arg-type]
    replace_durably(folder / JOURNAL, body.getvalue())


def load(folder: Path, identity: str) -> Progressed | None:
    """The folder's journal; None when there is none, it is damaged, or it is of another preparation."""
    try:
        with np.load(folder / JOURNAL) as arrays:  # its checksums tell damage
            plain = json.loads(arrays["state"].tobytes())
            counts = {split: arrays[split] for split in SPLITS if split in arrays}
        plain["troubles"] = {reason: Skipped(count, tuple(some)) for reason, (count, some) in plain["troubles"].items()}
        plain["notes"], plain["position"] = tuple(plain["notes"]), Position(*plain["position"])
        found = Progressed(**{**plain, "counts": counts})
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return found if found.identity == identity else None
