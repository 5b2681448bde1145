"""The one door to pyarrow: a column of text from Parquet files and from tables of other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from train.data.read.blocks import BLOCK_BYTES, ROWS, Block, DamagedError, Position, Trouble
from train.data.read.documents import among

_MAX_ROWS = 1 << 14


def table_blocks(path: Path, num_bytes: int, at: Position, text_field: str) -> Iterator[Block]:
    """The rows of a Parquet file from `at` on. A row group that cannot be read is passed over, the others are not.

    num_bytes: size of the file. Memory: one page of the column and a batch of about a megabyte. OSError when the file
    cannot be opened.
    """
    behind = Position(at.file + 1)
    with path.open("rb") as stream:
        try:
            file = pq.ParquetFile(
                stream, memory_map=False, pre_buffer=False, buffer_size=BLOCK_BYTES, page_checksum_verification=True
            )
            metadata = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            groups = [(group.num_rows, group.total_byte_size) for group in metadata]
            check_column(file.schema_arrow, text_field)
        except DamagedError as error:
            yield Block(ROWS, (), at, behind, num_bytes, (Trouble(error.reason, at.file, "", error.detail),))
            return
        except Exception as error:  # pyarrow raises what its many parts raise, MemoryError for absurd sizes included
            yield Block(ROWS, (), at, behind, num_bytes, (Trouble("corrupt", at.file, "", _short(error)),))
            return
        first, per_row = 0, num_bytes / max(1, sum(rows for rows, _ in groups))
        for index, (num_rows, group_bytes) in enumerate(groups):
            stop = first + num_rows
            if at.place < stop:
                batch_rows = max(1, min(_MAX_ROWS, BLOCK_BYTES * num_rows // max(1, group_bytes)))
                for block in _group_blocks(file, index, at, (first, stop), batch_rows, text_field):
                    rows = block.next.place - block.at.place
                    yield block._replace(disk_bytes=int(rows * per_row))
                    at = block.next
            first = stop
    notes = () if first else (Trouble("empty", at.file, "", "no rows"),)
    yield Block(ROWS, (), at, behind, 0, notes)


def _group_blocks(
    file: pq.ParquetFile, index: int, at: Position, rows: tuple[int, int], batch_rows: int, text_field: str
) -> Iterator[Block]:
    """Rows `at.place` to `rows[1]` of the row group `index`, which holds the file's rows from `rows[0]` on."""
    place, (first, stop) = max(at.place, rows[0]), rows
    why = "fewer rows than it says"
    try:
        for batch in file.iter_batches(batch_rows, row_groups=[index], columns=[text_field]):
            num_rows = min(batch.num_rows, stop - first)
            if first + num_rows > place:
                values = column_bytes(batch.column(0))[place - first : num_rows]
                behind = Position(at.file, first + num_rows)
                yield Block(ROWS, values, at._replace(place=place), behind)
                place = behind.place
            first += num_rows
    except Exception as error:  # as above
        why = _short(error)
    if place < stop:
        trouble = Trouble("corrupt", at.file, f"rows {place} to {stop - 1}", why)
        yield Block(ROWS, (), at._replace(place=place), Position(at.file, stop), 0, (trouble,))


def check_column(schema: pa.Schema, text_field: str) -> None:
    """DamagedError, with the reason `missing` or `wrong_type`, when a table's `text_field` does not hold text."""
    if text_field not in schema.names:
        raise DamagedError("missing", f"no column {text_field}{among(schema.names)}")
    kind = schema.field(text_field).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    raw = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(holds(inner) for holds in (*texts, *raw)):
        raise DamagedError("wrong_type", f"column {text_field} is {kind}")


def column_bytes(column: pa.Array | pa.ChunkedArray) -> tuple[bytes | None, ...]:
    """The values of a column of text, as the bytes that the file holds: nobody has looked whether they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    return tuple(column.to_pylist())


def _short(error: Exception) -> str:
    """The first line of a library's words."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
