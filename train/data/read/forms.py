"""What a file holds: plain text, JSON lines, JSON documents or Parquet. Its first bytes decide, its name only helps.

Data sets come as JSON lines in `.json.gz` (C4, Dolma), as one array in `.jsonl`, as JSON lines in `.txt`. Taken by
their names they would be trained on as raw text. JSON under a name that says nothing of it is read as JSON where its
objects have `data.text_field`; where they are alike and have not, `data.format` has to say what is meant.
"""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import NamedTuple

from train.data.config import DataConfig
from train.data.read.blocks import JSON, LINES, MARK, ROWS, TEXT, DamagedError
from train.data.read.documents import among
from train.data.read.streams import PARQUET, FileStream, compression_of, split_name

# What a name says of a file, by its last ending but for a compression; any other says nothing.
FORMS = {".jsonl": LINES, ".ndjson": LINES, ".json": JSON, ".parquet": ROWS, ".pq": ROWS}
# As the report calls them.
SPOKEN = {TEXT: "plain text", LINES: "JSON lines", JSON: "JSON documents", ROWS: "tables"}
# How much is looked at: a little shows that a file is no JSON, more is needed for the first lines of one.
_GLANCE_BYTES, _LOOK_BYTES, _MOST_BYTES = 4096, 1 << 16, 1 << 20
_NUM_LINES = 32
# What files in other encodings begin with: the longer ones first.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def form_of(path: Path, name: str, expected: tuple[int, int], config: DataConfig) -> str:
    """TEXT, LINES, JSON or ROWS: as `data.format` says, or where that is `auto` as the file's first bytes say.

    name: the file's, relative to its source. expected: its stamp when it was listed.

    Raises OSError, and DamagedError for a file that cannot be read, that is in another encoding than UTF-8, or that
    `data.format` has to decide on.
    """
    named = FORMS.get(os.path.splitext(split_name(name)[0])[1].lower(), TEXT)
    if config.format != "auto":
        return config.format
    with path.open("rb") as file:
        if file.read(len(PARQUET)) == PARQUET:
            return ROWS
        file.seek(0)
        if named == ROWS:
            if compression_of(file, name):
                raise DamagedError("unreadable", "Parquet has its own compression, and cannot be read through another")
            return ROWS
    start, is_whole = _start(path, expected)
    for mark, encoding in _ENCODINGS.items():
        if start.startswith(mark):
            raise DamagedError("undecodable", f"it begins as {encoding} does: convert it if it is text")
    found = _look(start.removeprefix(MARK).decode(errors="ignore"), is_whole)
    if named in (LINES, JSON):
        return found.form if found else named
    return _under_another_name(found, config.text_field)


class _Found(NamedTuple):
    """JSON by its structure: its form, and the first documents of it."""

    form: str
    documents: list[object]
    num_lines: int = 1


def _start(path: Path, expected: tuple[int, int]) -> tuple[bytes, bool]:
    """(first bytes of the uncompressed file, whether that is all of it): more of them where it may be JSON."""
    data = b""
    with FileStream(path, expected) as stream:
        for num_bytes in (_GLANCE_BYTES, _LOOK_BYTES, _MOST_BYTES):
            while len(data) < num_bytes:
                try:
                    part = stream.read(num_bytes - len(data))
                except DamagedError:  # whoever reads the file will say so; what comes before decides
                    return data, True
                if not part:
                    return data, True
                data += part
            if not data.removeprefix(MARK).lstrip().startswith((b"{", b"[")):
                break
            if num_bytes == _LOOK_BYTES and data.lstrip().count(b"\n") >= 2:
                break
    return data, False


def _look(text: str, is_whole: bool) -> _Found | None:
    """The structure of a text that begins as JSON; None for one that does not, or is broken at its beginning."""
    text = text.lstrip()
    lines = text.split("\n")
    # The last one is cut, unless the text is whole.
    lines = [line for line in (lines if is_whole or len(lines) == 1 else lines[:-1]) if line.strip()][:_NUM_LINES]
    if text.startswith("{"):
        return _objects(text, lines, is_whole)
    if text.startswith("["):
        return _array(text, lines, is_whole)
    return None


def _objects(text: str, lines: list[str], is_whole: bool) -> _Found | None:
    objects = [value for line in lines if isinstance(value := _whole(line), dict)]
    if objects:  # the lines of a printed document are indented, or end with a comma
        return _Found(LINES, list(objects), len(lines))
    try:
        return _Found(JSON, [json.JSONDecoder().raw_decode(text)[0]])
    except (ValueError, RecursionError):
        if is_whole:
            return None
    return _Found(JSON if "\n" in text.strip() else LINES, [])  # longer than what was looked at


def _array(text: str, lines: list[str], is_whole: bool) -> _Found | None:
    if len(lines) > 1 and all(isinstance(_whole(line), list) for line in lines[:2]):
        return _Found(LINES, [], len(lines))
    rest = text[1:].lstrip()
    if rest.startswith("]"):
        return _Found(JSON, [])
    try:
        value, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return None if is_whole else _Found(JSON, [])
    return _Found(JSON, [value]) if rest[end:].lstrip()[:1] in (",", "]", "") else None


def _whole(line: str) -> object:
    """A line's value, None where it is none: at its beginning, as lines of JSON are."""
    if not line.startswith(("{", "[")):
        return None
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value


def _under_another_name(found: _Found | None, text_field: str) -> str:
    """What a file is whose name says plain text, or nothing."""
    objects = [each for each in (found.documents if found else []) if isinstance(each, dict)]
    if found is None or not objects or 2 * len(objects) < found.num_lines:
        return TEXT
    if 2 * sum(isinstance(each.get(text_field), str) for each in objects) >= len(objects):
        return found.form
    if len(objects) > 1 and all(each.keys() == objects[0].keys() for each in objects):
        raise DamagedError(
            "ambiguous",
            f"its lines are JSON objects with no {text_field}{among(objects[0])}, and its name does not say so",
        )
    return TEXT
