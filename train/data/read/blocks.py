"""What readers hand to workers: blocks of raw bytes or rows, each with its place and the place to go on from.

A reader walks through one file, in order and in bounded memory, and never raises for what the file holds: trouble
travels with the blocks. Where blocks end does not matter to the result, only where documents do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK_BYTES = 1 << 20
# A longer line is passed over: nothing that is read in one piece may fill the memory.
MAX_LINE_BYTES = 64 << 20
# A cut looks this far back for the end of a line.
_CUT_WINDOW_BYTES = 16384

# Forms of a block's data, which are also the forms of a file.
TEXT, LINES, JSON, ROWS = "text", "jsonl", "json", "parquet"
# What some programs put before UTF-8.
MARK = b"\xef\xbb\xbf"


class Position(NamedTuple):
    """A place in a source: in the file with this index, the next byte or row, and the lines or documents before it.

    Bytes are those of the uncompressed text.
    """

    file: int = 0
    place: int = 0
    number: int = 0


class Trouble(NamedTuple):
    """A document or file that is passed over, or noted: a reason of `train/data/read/trouble.py`, and where it was."""

    reason: str
    file: int
    where: str = ""
    detail: str = ""


class Block(NamedTuple):
    """Raw documents that lie side by side in one file.

    form: TEXT (bytes, one document), LINES (bytes, whole lines of JSON), or JSON and ROWS (a tuple: bytes, None for
        null, or the trouble with that document).
    at, next: where the block begins, and where reading goes on behind it.
    disk_bytes: how much of the file on the disk it took.
    troubles: what was found around it.
    """

    form: str
    data: bytes | tuple[bytes | Trouble | None, ...]
    at: Position
    next: Position
    disk_bytes: int = 0
    troubles: tuple[Trouble, ...] = ()

    @property
    def weight(self) -> int:
        """Roughly the bytes that travel to a worker."""
        rows = (self.data,) if isinstance(self.data, bytes) else self.data
        return 200 + sum(len(row) for row in rows if isinstance(row, bytes))


class Bytes(Protocol):
    """A stream of bytes that may be damaged: what `fill` needs."""

    def read(self, num_bytes: int) -> bytes:
        """At least one byte and at most `num_bytes`; none at the end. DamagedError when there are no more to be had."""

    def disk_bytes(self) -> int:
        """Bytes of the file on the disk that were taken since the last call."""


class DamagedError(Exception):
    """The rest of a stream cannot be had; `reason` is one of `train/data/read/trouble.py`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class _Feed:
    """Fills a buffer from a stream and remembers how it ended."""

    def __init__(self, stream: Bytes) -> None:
        self._stream = stream
        self.ended = False
        self.error: DamagedError | None = None

    def fill(self, buffer: bytes, num_bytes: int) -> bytes:
        """`buffer` with more bytes behind it until it has `num_bytes`, fewer only where the stream ends."""
        parts, missing = [buffer], num_bytes - len(buffer)
        while missing > 0 and not self.ended:
            try:
                part = self._stream.read(missing)
            except DamagedError as error:
                self.error, part = error, b""
            self.ended = not part
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def end(self, at: Position, where: str, *notes: Trouble) -> Block:
        """The empty block behind a file's last document: the next file comes, after what went wrong here."""
        error = () if self.error is None else (Trouble(self.error.reason, at.file, where, self.error.detail),)
        return Block(TEXT, (), at, Position(at.file + 1), self._stream.disk_bytes(), (*notes, *error))


def text_blocks(stream: Bytes, at: Position, max_document_bytes: int) -> Iterator[Block]:
    """The documents of a text file from `at` on, one a block, cut as `cut_length` says."""
    feed, buffer = _Feed(stream), b""
    while True:
        buffer = feed.fill(buffer, max_document_bytes + 1)  # one more byte shows whether a cut splits a character
        whole = len(buffer) <= max_document_bytes
        if whole and (feed.error or (not buffer and at.number)):
            break
        length = len(buffer) if whole else cut_length(buffer, 0, max_document_bytes)
        behind = Position(at.file, at.place + length, at.number + 1)
        yield Block(TEXT, buffer[:length], at, behind, stream.disk_bytes())
        buffer, at = buffer[length:], behind
        if whole:
            break
    notes = [Trouble("cut", at.file, "", f"{at.place} bytes, into {at.number} documents")] if at.number > 1 else []
    yield feed.end(at, f"from byte {at.place}" if at.place else "", *notes)


def line_blocks(stream: Bytes, at: Position) -> Iterator[Block]:
    """The lines of a file from `at` on, many a block; a line that is too long is passed over without keeping it."""
    feed, buffer = _Feed(stream), b""
    while not feed.ended:
        buffer = feed.fill(buffer, len(buffer) + BLOCK_BYTES)
        length = len(buffer) if feed.ended and not feed.error else buffer.rfind(b"\n") + 1
        troubles: tuple[Trouble, ...] = ()
        data = buffer[:length]
        num_lines = data.count(b"\n")
        if not length and len(buffer) > MAX_LINE_BYTES:
            length, buffer = _skip_line(feed, buffer)
            troubles, num_lines = (Trouble("giant", at.file, f"line {at.number + 1}"),), 1
        else:
            buffer = buffer[length:]
        if length:
            behind = Position(at.file, at.place + length, at.number + num_lines)
            yield Block(LINES, data, at, behind, stream.disk_bytes(), troubles)
            at = behind
    notes = [] if at.place or feed.error else [Trouble("empty", at.file)]
    yield feed.end(at, f"line {at.number + 1}", *notes)


def _skip_line(feed: _Feed, buffer: bytes) -> tuple[int, bytes]:
    """Length of the line that begins in `buffer`, and the bytes that were read behind it."""
    length = 0
    while (line_end := buffer.find(b"\n")) < 0:
        length += len(buffer)
        buffer = feed.fill(b"", BLOCK_BYTES)
        if not buffer:
            return length, b""
    return length + line_end + 1, buffer[line_end + 1 :]


def cut_length(data: bytes, start: int, max_document_bytes: int) -> int:
    """Bytes of the document that begins at `start` in `data`, which holds at least one byte more than the limit.

    It ends behind the last line end within the limit, or, where lines are longer than that, between two UTF-8
    characters.
    """
    limit = start + max_document_bytes
    line_end = data.rfind(b"\n", max(start, limit - _CUT_WINDOW_BYTES), limit)
    if line_end >= 0:
        return line_end + 1 - start
    for back in range(4):  # a UTF-8 character has at most three continuation bytes (0b10xxxxxx)
        if data[limit - back] & 0xC0 != 0x80:
            return max_document_bytes - back
    return max_document_bytes


def cut(data: bytes, max_document_bytes: int) -> list[bytes]:
    """A document's bytes as one document or, when they are too many, as several; together they are the whole."""
    parts, start = [], 0
    while len(data) - start > max_document_bytes:
        length = cut_length(data, start, max_document_bytes)
        parts.append(data[start : start + length])
        start += length
    return [*parts, data[start:]]
