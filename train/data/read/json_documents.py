"""JSON that is not one object a line: a file that is one document, an array of documents, or several behind each other.

Read in bounded memory, whatever the size of the array: one document and a block of the file are held at a time. A
document is one object; its place is its number in the file, from 0.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator

from train.data.read.blocks import BLOCK_BYTES, JSON, MAX_LINE_BYTES, Block, Bytes, DamagedError, Position, Trouble
from train.data.read.documents import BadError, text_of

_SPACE = " \t\r\n"
_MAX_ROWS = 1 << 12


def json_blocks(stream: Bytes, at: Position, text_field: str) -> Iterator[Block]:
    """The documents of a file from number `at.place` on. `stream` is at the file's beginning.

    What cannot be read ends the file: nothing says where the next document would begin.
    """
    reader = _Reader(stream)
    rows: list[bytes | Trouble | None] = []
    size, number = 0, 0
    for value in reader.values():
        number += 1
        if number <= at.place:
            continue
        try:
            row: bytes | Trouble = text_of(value, text_field)
        except BadError as bad:
            row = Trouble(bad.reason, at.file, f"document {number - 1}", bad.detail)
        rows.append(row)
        size += len(row) if isinstance(row, bytes) else 0
        if size >= BLOCK_BYTES or len(rows) >= _MAX_ROWS:
            behind = Position(at.file, number)
            yield Block(JSON, tuple(rows), at, behind, stream.disk_bytes())
            rows, size, at = [], 0, behind
    if rows:
        behind = Position(at.file, number)
        yield Block(JSON, tuple(rows), at, behind, stream.disk_bytes())
        at = behind
    notes = [] if number or reader.error else [Trouble("empty", at.file)]
    if reader.error is not None:
        notes.append(Trouble(reader.error.reason, at.file, f"document {number}", reader.error.detail))
    yield Block(JSON, (), at, Position(at.file + 1), stream.disk_bytes(), tuple(notes))


class _Reader:
    """The JSON values of a stream one by one: those at the top, and in the place of an array its elements."""

    def __init__(self, stream: Bytes) -> None:
        self._stream, self._decode = stream, codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self.error: DamagedError | None = None

    def values(self) -> Iterator[object]:
        """Until the end, or until `error` says what is in the way."""
        try:
            yield from self._values()
        except DamagedError as error:
            self.error = error

    def _values(self) -> Iterator[object]:
        while self._next_char():
            if self._next_char() != "[":
                yield self._value()
                continue
            self._at += 1
            while self._next_char() != "]":
                yield self._value()
                if self._next_char() == ",":
                    self._at += 1
                elif self._next_char() != "]":
                    raise self._broken("neither , nor ] behind an element of its array")
            self._at += 1

    def _next_char(self) -> str:
        """The next character that is no white space, where reading then stands; nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill(1):
                return ""

    def _value(self) -> object:
        wanted = BLOCK_BYTES
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._fill(wanted):  # the value may only be cut by the end of what was read
                    wanted *= 2
                    continue
                said = error.msg if isinstance(error, json.JSONDecodeError) else str(error).splitlines()[0]
                raise self._broken(said) from None
            if end < len(self._text) or not self._fill(1):  # a number may go on behind what was read
                self._at = end
                return value

    def _broken(self, said: str) -> DamagedError:
        if len(self._text) - self._at > MAX_LINE_BYTES:
            return DamagedError("giant", f"a document longer than {MAX_LINE_BYTES >> 20} MiB; the rest is passed over")
        return DamagedError("not_json", f"{said}; the rest is passed over")

    def _fill(self, num_chars: int) -> bool:
        """Read on, at least so many characters while there are any; whether there were."""
        if self._ended or len(self._text) - self._at > MAX_LINE_BYTES:
            return False
        parts, read = [self._text[self._at :]], 0
        while read < num_chars and not self._ended:
            data = self._stream.read(BLOCK_BYTES)
            try:
                parts.append(self._decode(data, final=not data))
            except UnicodeDecodeError as error:
                raise DamagedError("undecodable", f"{error.reason}; the rest is passed over") from None
            self._ended = not data
            read += len(parts[-1])
        self._text, self._at = "".join(parts), 0
        return read > 0
