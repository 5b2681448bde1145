"""The tokenizer of a model in Hugging Face's layout: `tokenizer.json` and the files that say how it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from train.data.meta import TOKENIZER
from train.data.tokenizer import Tokenizer

SETTINGS, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
# All that belongs to a tokenizer; those beside the first may be missing.
FILES = (TOKENIZER, SETTINGS, SPECIAL_TOKENS)


def check(path: Path, vocab_size: int, end_of_document: str | None = None) -> None:
    """ValueError unless this is a tokenizer all of whose tokens the model has, and which has the end of a document.

    end_of_document: its name; None takes one that is known.
    """
    found = Tokenizer.load(path, end_of_document).vocab_size
    if found > vocab_size:
        raise ValueError(f"{path} has {found} tokens, more than model.vocab_size={vocab_size}")


def write(path: Path, folder: Path, max_tokens: int, end_of_document: str | None = None) -> int:
    """Write the tokenizer's files beside a model that takes `max_tokens`; returns the token that ends a document.

    end_of_document: its name; None takes one that is known.

    Files that lie beside `path` in the same layout are kept as they are.
    """
    tokenizer = Tokenizer.load(path, end_of_document)
    end = tokenizer.end_of_document
    made = {
        SETTINGS: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_tokens,
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
        },
        SPECIAL_TOKENS: {"eos_token": end},
    }
    shutil.copyfile(path, folder / TOKENIZER)
    carried = (path.parent / SETTINGS).exists()
    for name, body in made.items():
        if not carried:
            (folder / name).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
        elif (path.parent / name).exists():
            shutil.copyfile(path.parent / name, folder / name)
    return tokenizer.eod


def carry(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files of a model's folder as they are; which there were."""
    found = [name for name in FILES if (source / name).exists()] if (source / TOKENIZER).exists() else []
    for name in found:
        shutil.copyfile(source / name, folder / name)
    return found
