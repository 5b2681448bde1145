"""Expert loads over time as pictures: one PNG per layer, inside the page, one pixel per expert and stretch of steps."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

from train.track.metrics_file import Loads

MAX_COLUMNS = 240
NUM_COLORS = 255
REACH = 2.0  # the scale runs from 1/4 of the mean over the mean to 4 times it: 2 to the power of this
# Blue to pale to orange: told apart by all kinds of colour-blind readers. None of them at load 0.
_STOPS = np.array(
    [[5, 48, 97], [67, 147, 195], [209, 229, 240], [247, 247, 247], [253, 219, 199], [214, 96, 77], [103, 0, 31]]
)


def palette() -> np.ndarray:
    """[256, 3] bytes: NUM_COLORS from low to high load, then the colour of an expert that got nothing."""
    at = np.linspace(0, len(_STOPS) - 1, NUM_COLORS)
    colors = np.stack([np.interp(at, np.arange(len(_STOPS)), _STOPS[:, part]) for part in range(3)], axis=1)
    return np.concatenate([colors, [[20, 20, 20]]]).round().astype(np.uint8)


def relative(loads: list[Loads], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [columns], load over the mean [experts, columns]) of one router; stretches of steps are averaged."""
    counts = np.array([each.loads[layer] for each in loads], dtype=float)
    tokens = np.array([each.tokens for each in loads], dtype=float)
    means = counts.mean(axis=1, keepdims=True)
    shares = np.divide(counts, means, out=np.ones_like(counts), where=means > 0)
    if len(loads) > MAX_COLUMNS:
        edges = np.linspace(0, len(loads), MAX_COLUMNS + 1).astype(int)
        shares = np.add.reduceat(shares, edges[:-1]) / np.diff(edges)[:, None]
        tokens = tokens[edges[1:] - 1]
    return tokens, shares.T


def picture(shares: np.ndarray) -> str:
    """A data URI: loads over the mean [experts, columns] by logarithm in colour, expert 0 at the top."""
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log2(shares), -REACH, REACH)
    cells = np.round((logs + REACH) / (2 * REACH) * (NUM_COLORS - 1)).astype(np.uint8)
    cells[shares == 0] = NUM_COLORS
    return "data:image/png;base64," + base64.b64encode(_png(cells)).decode()


def _png(cells: np.ndarray) -> bytes:
    """An indexed PNG (W3C, third edition, section 11.2) of palette numbers [height, width]."""
    height, width = cells.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    lines = b"".join(b"\0" + row.tobytes() for row in cells)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"PLTE", palette().tobytes()), chunk(b"IDAT", zlib.compress(lines, 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")
