"""Small folders of text for the tests of the data room."""

from __future__ import annotations

import random
from pathlib import Path

from train.data.config import DataConfig
from train.data.meta import Meta
from train.data.prepare import prepare

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
    """Every file of a folder with its contents."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
