"""A block's documents: text with its place, or the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from train.data.read.blocks import JSON, LINES, MARK, TEXT, Block, Trouble, cut

# Of an object's fields so many are named where the one with the text is missing.
_NUM_NAMES, _NAME_CHARS = 8, 40


class Document(NamedTuple):
    """One document: its text, the same as UTF-8, and its place in the file.

    start, stop: bytes of a text file, bytes of the line in JSON lines, rows of a table, numbers (from 0) of JSON
    documents; several documents have the same place where a line's or row's text was cut.
    """

    text: str
    data: bytes
    file: int
    start: int
    stop: int


class BadError(Exception):
    """There is no text: a reason of `train/data/read/trouble.py`, and what else is known."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def documents(block: Block, text_field: str, max_document_bytes: int) -> Iterator[Document | Trouble]:
    """The documents of a block, in order, and what is wrong with the others. Never raises for what a file holds."""
    if isinstance(block.data, tuple):
        called = "document" if block.form == JSON else "row"
        for row, value in enumerate(block.data, block.at.place):
            if isinstance(value, Trouble):
                yield value
                continue
            yield from _parts(value, block.at.file, row, row + 1, f"{called} {row}", max_document_bytes)
    elif block.form == LINES:
        yield from _line_documents(block.data, block, text_field, max_document_bytes)
    elif block.form == TEXT:
        yield _text_document(block.data, block.at.file, block.at.place)
    yield from block.troubles


def _text_document(data: bytes, file: int, start: int) -> Document | Trouble:
    skipped = len(MARK) if start == 0 and data.startswith(MARK) else 0
    data = data[skipped:]
    try:
        text = _decoded(data)
        if "\0" in text:  # text files have none; binary ones that happen to decode nearly always do
            raise BadError("undecodable", "it holds a zero byte")
    except BadError as bad:
        return Trouble(bad.reason, file, f"from byte {start}" if start else "", bad.detail)
    return Document(text, data, file, start + skipped, start + skipped + len(data))


def _line_documents(
    data: bytes, block: Block, text_field: str, max_document_bytes: int
) -> Iterator[Document | Trouble]:
    file, start, number = block.at
    for line in data.split(b"\n"):
        stop, number = min(start + len(line) + 1, block.at.place + len(data)), number + 1
        # The mark that some programs put before UTF-8 is no part of the first object.
        stripped = (line.removeprefix(MARK) if number == 1 else line).strip()
        if stripped:
            try:
                value = _field(stripped, text_field)
            except BadError as bad:
                yield Trouble(bad.reason, file, f"line {number}", bad.detail)
            else:
                yield from _parts(value, file, start, stop, f"line {number}", max_document_bytes)
        start = stop


def _parts(
    data: bytes | None, file: int, start: int, stop: int, where: str, max_document_bytes: int
) -> Iterator[Document | Trouble]:
    """The text of one line or row, cut where it is too long."""
    if data is None:
        yield Trouble("missing", file, where, "null")
        return
    parts = cut(data, max_document_bytes)
    for part in parts:
        try:
            yield Document(_decoded(part), part, file, start, stop)
        except BadError as bad:
            yield Trouble(bad.reason, file, where, bad.detail)
    if len(parts) > 1:
        yield Trouble("cut", file, where, f"{len(data)} bytes, into {len(parts)} documents")


def _decoded(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadError("undecodable", f"{error.reason} at its byte {error.start}") from None
    if not text or text.isspace():
        raise BadError("empty")
    return text


def _field(line: bytes, text_field: str) -> bytes:
    """The text in one line's object, as UTF-8."""
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadError("undecodable", f"{error.reason} at its byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadError("not_json", f"{error.msg} at its character {error.pos}") from None
    except (ValueError, RecursionError) as error:  # digits without end, brackets without end
        raise BadError("not_json", str(error).splitlines()[0]) from None
    return text_of(entry, text_field)


def text_of(entry: object, text_field: str) -> bytes:
    """The text in a JSON document, as UTF-8. BadError where there is none, which names the fields that there are."""
    if not isinstance(entry, dict):
        raise BadError("wrong_type", f"{_kind(entry)}, not an object")
    if text_field not in entry:
        raise BadError("missing", f"no {text_field}{among(entry)}")
    value = entry[text_field]
    if not isinstance(value, str):
        raise BadError("missing" if value is None else "wrong_type", f"{text_field} is {_kind(value)}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # \ud800 alone is JSON, and no character
        raise BadError("undecodable", f"{error.reason} at its character {error.start}") from None


def among(names: Iterable[str]) -> str:
    """The end of a phrase on a field or column that is missing: those that there are."""
    found = [str(name)[:_NAME_CHARS] for name in names]
    more = f" and {len(found) - _NUM_NAMES} more" if len(found) > _NUM_NAMES else ""
    return f" among {', '.join(found[:_NUM_NAMES])}{more}" if found else " and no other field"


def _kind(value: object) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
