"""What a source held and what became of it: counts, bytes, lengths. The same numbers whoever prepared it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.data.meta import SPLITS, Split
from train.data.read.forms import SPOKEN
from train.data.read.source import Source
from train.data.read.streams import split_name
from train.data.read.trouble import BAD, Skipped

REPORT = "report.json"
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def report_of(
    folder: Path, num_files: int, splits: Mapping[str, Split], skipped: Mapping[str, Skipped]
) -> dict[str, Any]:
    """The report of the source whose document tables lie in `folder`: plain values, for a JSON file.

    documents: how many were written. duplicates: how many had the text of one before, written or not. bytes: of the
    documents' texts. tokens: with one end of document each. document_tokens: lengths without it; a percentile is the
    smallest length that this share of the documents does not exceed; `histogram` counts lengths from one power of two
    (the key) up to the next.
    """
    num_bytes = sum(split.num_bytes for split in splits.values())
    num_tokens = sum(split.num_tokens for split in splits.values())
    return {
        "files": num_files,
        "documents": sum(split.num_documents for split in splits.values()),
        "duplicates": skipped["duplicate"].count,
        "cut": skipped["cut"].count,
        "skipped": {reason: skipped[reason].count for reason in BAD if skipped[reason].count},
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / num_tokens,
        "document_tokens": _lengths(np.concatenate([_split_lengths(folder, split) for split in SPLITS])),
    }


def read_as(source: Source) -> dict[str, dict[str, int]]:
    """How many files were read as what, by the endings of their names: form -> ending -> files. Looks into each file.

    Files that cannot be read are left out: they are counted as trouble.
    """
    found: dict[str, dict[str, int]] = {}
    for index, file in enumerate(source.files):
        form = source.form(index)
        if form is not None:
            inner, compression = split_name(file.name)
            endings = found.setdefault(SPOKEN[form], {})
            ending = os.path.splitext(inner)[1].lower() + compression
            endings[ending] = endings.get(ending, 0) + 1
    return {form: dict(sorted(endings.items())) for form, endings in sorted(found.items())}


def _split_lengths(folder: Path, split: str) -> np.ndarray:
    """Tokens of each document of a split, int64, its end not counted."""
    path = folder / f"{split}-documents.bin"
    if not path.stat().st_size:
        return np.empty(0, dtype=np.int64)
    ends = np.memmap(path, dtype="<i8", mode="r").reshape(-1, 4)[:, 0]
    return np.diff(ends, prepend=0) - 1


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    lengths = np.sort(lengths)
    ranks = {share: max(0, -(-share * len(lengths) // 100) - 1) for share in _PERCENTILES}
    octaves = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    counts = np.bincount(octaves)
    return {
        "mean": float(lengths.sum() / len(lengths)),
        "least": int(lengths[0]),
        **{f"p{share}": int(lengths[rank]) for share, rank in ranks.items()},
        "most": int(lengths[-1]),
        "histogram": {str(1 << octave): int(count) for octave, count in enumerate(counts) if count},
    }
