"""What a part has found, as rows: a table for people, an object for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, FAILED, INFO = "ok", "FAILED", ""


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        what: was measured, in words.
        value: as it was found.
        unit: of the value.
        beside: what it is compared with; None for nothing.
        beside_what: where that is from: `planned`, `CPU`, `transformers`.
        verdict: whether it is as it must be: `ok` or `FAILED`; empty where nothing is demanded.
        note: a sentence.
    """

    what: str
    value: float | str | None = None
    unit: str = ""
    beside: float | None = None
    beside_what: str = ""
    verdict: str = INFO
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What a part has found, in what time, and how it ended where it has not come to its end."""

    rows: Sequence[Row]
    seconds: float
    ended: str = ""


def verdict(is_right: bool) -> str:
    """The word for a demand."""
    return OK if is_right else FAILED


def write(folder: Path, about: Mapping[str, Any], parts: Mapping[str, Found]) -> bool:
    """`gpu-check.md` and `gpu-check.json`, over those of an earlier part; whether all is as it must be."""
    body = {"about": dict(about), "parts": {name: asdict(found) for name, found in parts.items()}}
    (folder / "gpu-check.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu-check.md").write_text(markdown(about, parts), encoding="utf-8")
    return all(not found.ended and all(row.verdict != FAILED for row in found.rows) for found in parts.values())


def markdown(about: Mapping[str, Any], parts: Mapping[str, Found]) -> str:
    """The table, part after part."""
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| part | what | found | beside | ratio | verdict | note |", "|---|---|---|---|---|---|---|"]
    for name, found in parts.items():
        lines += [_line(name, row) for row in found.rows]
        end = found.ended or f"done in {found.seconds:.0f} s"
        lines.append(_cells(name, "the part itself", f"{found.seconds:.0f} s", "", "", verdict(not found.ended), end))
    return "\n".join(lines) + "\n"


def _line(part: str, row: Row) -> str:
    beside = "" if row.beside is None else f"{_text(row.beside)} {row.unit} {row.beside_what}"
    ratio = f"{row.value / row.beside:.2f}" if isinstance(row.value, float | int) and row.beside else ""
    return _cells(part, row.what, f"{_text(row.value)} {row.unit}", beside, ratio, row.verdict, row.note)


def _text(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.5g}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ").strip() for cell in cells) + " |"
