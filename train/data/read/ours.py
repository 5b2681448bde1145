"""What Halocline writes itself and nobody means as text: runs, checkpoints, models, prepared tokens.

A source such as `data.source=.` may hold the folders that preparing and training it make, and would never be the same
again. They are known by what lies in them, whatever they are called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from train.data.meta import META, is_meta


def is_ours(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder, which has files and folders of these names, was written by a run or one of the verbs."""
    known = set(names)
    return (
        (META in known and is_meta(_json(folder / META)))
        # Prepared tokens in the making, and those of a blend.
        or ("partial" in known and (folder / "partial" / "journal.npz").exists())
        or ("blend.json" in known and {"settings", "tokenizer"} <= _json(folder / "blend.json").keys())
        # A run, from the moment at which its first rank starts.
        or ("logs" in known and (folder / "logs" / "rank_0.log").exists())
        # A job of a sweep that has ended, and the sweep's own folder.
        or ("outcome.json" in known and {"status", "config"} <= _json(folder / "outcome.json").keys())
        or {"results.csv", ".lock"} <= known
        # A checkpoint, and a folder of checkpoints.
        or ("manifest.json" in known and {"files", "crc32"} <= _json(folder / "manifest.json").keys())
        or ("latest" in known and re.fullmatch(rb"step-\d{8,}\n", _start(folder / "latest")) is not None)
        # A model in Hugging Face's layout, ours or another one's.
        or ("config.json" in known and any(name.endswith(".safetensors") for name in known))
    )


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
