"""Small folders of text for the tests of the data room."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from train.data.config import DataConfig
from train.data.meta import Meta
from train.data.prepare.contents import STAMPS
from train.data.prepare.one_source import prepare
from train.data.read.streams import OPENERS, split_name
from train.data.rows.tokens import Tokens
from train.data.tokenizer import Tokenizer

WORDS = ["the", "tide", "turns", "λ = ∂s/∂z", "naïve —", "海水", "🌊", "<|endoftext|>", "\tif x:\r\n", "salt"]


def text(seed: int, num_words: int) -> str:
    """Some words, lines and characters of one to four bytes."""
    random_ = random.Random(seed)
    return "".join(random_.choice(WORDS) + random_.choice([" ", " ", "\n"]) for _ in range(num_words))


def write_folder(root: Path, num_documents: int, seed: int = 0, least_words: int = 5, most_words: int = 120) -> Path:
    """A folder with sub-folders of `num_documents` different text files."""
    random_ = random.Random(seed)
    for index in range(num_documents):
        path = root / f"part{index % 3}" / f"{random_.randrange(10**6):06d}-{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{index} {text(seed * 1000 + index, random_.randint(least_words, most_words))}".encode())
    return root


def prepared(tmp_path: Path, num_documents: int = 40, **settings: object) -> tuple[DataConfig, Meta]:
    """Prepare a fresh folder of text with small shards."""
    source = write_folder(tmp_path / "text", num_documents)
    values = {"vocab_size": 300, "valid_fraction": 0.3, "shard_tokens": 500, "num_workers": 1}
    config = DataConfig(**{"source": str(source), "dir": str(tmp_path / "tokens"), **values, **settings})
    return config, prepare(config, say=lambda line: None)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its contents, but for the note that spares reading the source again."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != STAMPS)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_mixture(root: Path, seed: int = 0, num_documents: int = 8) -> dict[str, list[str]]:
    """A folder with every format, the compressed ones too; the documents of each file, in order."""
    found: dict[str, list[str]] = {}
    root.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(MIXTURE):
        count = 1 if split_name(name)[0].endswith(".txt") else num_documents
        found[name] = [f"{index} {number} {text(seed * 977 + index * 31 + number, 20)}" for number in range(count)]
        write_as(root / name, found[name])
    return found


MIXTURE = [f"{form}{ending}" for form in ("a.txt", "b.jsonl", "c.ndjson") for ending in ("", *OPENERS)]
MIXTURE.append("d.parquet")
COMPRESS = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}  # fmt: skip


def write_as(path: Path, texts: list[str], field: str = "text", row_group_size: int = 3) -> None:
    """Documents in the form and the compression that the file's name says."""
    inner, compression = split_name(path.name)
    if inner.endswith((".parquet", ".pq")):
        table = pa.table({"number": list(range(len(texts))), field: texts})
        pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)
        return
    lines = "".join(json.dumps({"number": n, field: each}) + "\n" for n, each in enumerate(texts))
    body = lines if inner.endswith((".jsonl", ".ndjson")) else "".join(texts)
    path.write_bytes(COMPRESS[compression](body.encode()))


def texts_of(folder: Path) -> dict[str, list[str]]:
    """The documents in a prepared folder as text, by the source's file, in the order of their places."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    found: dict[str, list[tuple[int, str]]] = {}
    for split in ("train", "valid"):
        if Meta.load(folder).splits[split].num_tokens:
            tokens = Tokens.open(folder, split)
            for each in tokens.documents(0, tokens.num_tokens):
                ids = tokens.read(each.first_token, each.stop_token - 1)
                found.setdefault(each.file, []).append((each.first_byte, tokenizer.decode(ids)))
    return {file: [text for _, text in sorted(each, key=lambda pair: pair[0])] for file, each in found.items()}
