"""How fast text becomes tokens, and tokens become rows, on one core.

    python -m benchmarks.data                     the Python standard library's own sources
    python -m benchmarks.data --source PATH       any file or folder of text

Rates are per second of this process's CPU time, so that a busy machine does not change them. The same documents are
also prepared as JSON lines, plain and compressed, and as Parquet; reading and parsing alone is timed beside. The
targets: 1 MB/s of text, 20 M tokens/s of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
from train.data.read.blocks import Position
from train.data.read.documents import Document, documents
from train.data.read.source import open_source, walk
from train.data.rows.epochs import Rows
from train.data.rows.tokens import Tokens


def rows_per_s(rows: Rows, count: int, at_least_s: float = 1.0) -> float:
    """Rows read per CPU second, `count` at a time, one after the other through the shuffled stream."""
    position, start_s = 0, time.process_time()
    while (elapsed_s := time.process_time() - start_s) < at_least_s:
        rows.rows(position, count)
        position += count
    return position / elapsed_s


def forms(source: DataConfig, folder: Path) -> dict[str, Path]:
    """The documents of a source, written again in other forms."""
    blocks = walk(open_source(source), Position())
    found = (each for block in blocks for each in documents(block, "text", source.max_document_bytes))
    texts = [each.text for each in found if isinstance(each, Document)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    places = {form: folder / f"source.{form}" for form in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")}
    places["jsonl"].write_bytes(lines)
    places["jsonl.gz"].write_bytes(gzip.compress(lines))
    places["jsonl.zst"].write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": texts}), places["parquet"])
    return places


def read_s(config: DataConfig) -> float:
    """CPU seconds to read and parse all documents, without a tokenizer."""
    start_s = time.process_time()
    for block in walk(open_source(config), Position()):
        for _ in documents(block, config.text_field, config.max_document_bytes):
            pass
    return time.process_time() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=None)
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory() as folder:
        first = DataConfig(source=source, dir=f"{folder}/first", num_workers=1)
        start_s = time.process_time()
        meta = prepare(first, say=lambda line: None)
        whole_s = time.process_time() - start_s
        print(f"text {meta.source_num_bytes / 1e6:.1f} MB, {meta.source_num_files} files; {sys.platform}, one core")
        print(f"trained tokenizer, {meta.vocab_size} tokens, then prepared: {whole_s:.1f} s in all")
        print(f"{'form':<12}{'read and parsed':>16}{'prepared':>12}   MB/s of text, tokenizer given")
        given = dataclasses.replace(first, tokenizer=f"{folder}/first/tokenizer.json")
        sources = {"source": first.source, **{form: str(path) for form, path in forms(first, Path(folder)).items()}}
        for form, path in sources.items():
            again = dataclasses.replace(given, source=path, dir=f"{folder}/{form}")
            text_mb = meta.report["bytes"] / 1e6
            alone_s = read_s(again)
            start_s = time.process_time()
            prepare(again, say=lambda line: None)
            print(f"{form:<12}{text_mb / alone_s:>16.1f}{text_mb / (time.process_time() - start_s):>12.2f}", flush=True)
        tokens = Tokens.open(first.folder, "train")
        print(f"{'seq_len':>8}{'rows a call':>13}{'M tokens/s':>12}")
        for seq_len, count in ((128, 1), (128, 8), (256, 8), (1024, 8), (4096, 1), (4096, 8)):
            rate = rows_per_s(Rows(tokens, seq_len, seed=1), count) * seq_len
            print(f"{seq_len:>8}{count:>13}{rate / 1e6:>12.0f}")


if __name__ == "__main__":
    main()
