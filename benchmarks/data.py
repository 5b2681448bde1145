"""How fast text becomes tokens, and tokens become rows, on one core.

    python -m benchmarks.data                     the Python standard library's own sources
    python -m benchmarks.data --source PATH       any file or folder of text

Rates are per second of this process's CPU time, so that a busy machine does not change them. The targets: 1 MB/s of
text, 20 M tokens/s of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time

from train.data.config import DataConfig
from train.data.prepare import prepare
from train.data.rows import Rows
from train.data.tokens import Tokens


def rows_per_s(rows: Rows, count: int, at_least_s: float = 1.0) -> float:
    """Rows read per CPU second, `count` at a time, one after the other through the shuffled stream."""
    position, start_s = 0, time.process_time()
    while (elapsed_s := time.process_time() - start_s) < at_least_s:
        rows.rows(position, count)
        position += count
    return position / elapsed_s


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
        again = dataclasses.replace(first, dir=f"{folder}/again", tokenizer=f"{folder}/first/tokenizer.json")
        start_s = time.process_time()
        prepare(again, say=lambda line: None)
        given_s = time.process_time() - start_s
        print(f"prepared with that tokenizer: {given_s:.1f} s, {meta.source_num_bytes / given_s / 1e6:.2f} MB/s")
        tokens = Tokens.open(first.folder, "train")
        print(f"{'seq_len':>8}{'rows a call':>13}{'M tokens/s':>12}")
        for seq_len, count in ((128, 1), (128, 8), (256, 8), (1024, 8), (4096, 1), (4096, 8)):
            rate = rows_per_s(Rows(tokens, seq_len, seed=1), count) * seq_len
            print(f"{seq_len:>8}{count:>13}{rate / 1e6:>12.0f}")


if __name__ == "__main__":
    main()
