"""A document's text to its ids: as it is, rearranged for fill-in-the-middle, merged tokens split now and then.

What is drawn for a document is a function of (seed, its contents), so neither its place nor a worker matters.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import NamedTuple

import numpy as np

from train.data.tokenizer import Tokenizer

# Shorter documents have no middle worth filling in.
MIN_FIM_CHARACTERS = 32
_BITS = 1 << 64


class Variations(NamedTuple):
    """What preparation does to documents by chance (see DataConfig)."""

    fim_rate: float = 0.0
    fim_tokens: tuple[str, ...] = ()
    split_merged_rate: float = 0.0
    seed: int = 0


class Encoder:
    """Text to ids, without an end-of-document id."""

    def __init__(self, tokenizer: Tokenizer, variations: Variations) -> None:
        """ValueError when the tokenizer lacks a token that fill-in-the-middle needs."""
        self.tokenizer, self._variations = tokenizer, variations
        self._fim = fim_ids(tokenizer, variations.fim_tokens) if variations.fim_rate else ()
        self._parts = _merged_tokens(tokenizer) if variations.split_merged_rate else {}
        self._is_merged = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_merged[list(self._parts)] = True

    def encode(self, texts: list[str], hashes: list[int]) -> list[np.ndarray]:
        """Ids of each text, int64; `hashes` are 64 uniform bits of each document's bytes."""
        return [self._document(text, each) for text, each in zip(texts, hashes, strict=True)]

    def _document(self, text: str, document_hash: int) -> np.ndarray:
        draw = np.frombuffer(
            hashlib.blake2b(b"%d %d" % (self._variations.seed, document_hash), digest_size=32).digest(), dtype="<u8"
        )
        wanted = int(draw[0]) < self._variations.fim_rate * _BITS and len(text) >= MIN_FIM_CHARACTERS
        ids = self._rearranged(text, draw) if wanted else self.tokenizer.encode([text])[0]
        return self._split(ids, draw[3]) if self._parts else ids

    def _rearranged(self, text: str, draw: np.ndarray) -> np.ndarray:
        """Prefix, suffix, middle (report, section 4.1), cut between characters, each part tokenised by itself.

        A cut at a token's border would give its place away, and a model asked to fill in half a word would never have
        seen one (Bavarian et al. 2022, section 3).
        """
        first, second = 1 + int(draw[1]) % (len(text) - 1), 1 + int(draw[2]) % (len(text) - 2)
        second += second >= first  # two different places, none at an end
        start, stop = min(first, second), max(first, second)
        prefix, middle, suffix = self.tokenizer.encode([text[:start], text[start:stop], text[stop:]])
        begin, hole, end = ([id] for id in self._fim)
        return np.concatenate([begin, prefix, hole, suffix, end, middle]).astype(np.int64)

    def _split(self, ids: np.ndarray, key: np.uint64) -> np.ndarray:
        """A random part of the merged tokens in their two parts."""
        places = np.flatnonzero(self._is_merged[ids])
        draws = _mixed(places.astype(np.uint64) + key)
        chosen = places[draws < self._variations.split_merged_rate * _BITS].tolist()
        if not chosen:
            return ids
        pieces, done = [], 0
        for place in chosen:
            pieces += [ids[done:place], self._parts[int(ids[place])]]
            done = place + 1
        return np.concatenate([*pieces, ids[done:]])


def fim_ids(tokenizer: Tokenizer, names: tuple[str, ...]) -> tuple[int, ...]:
    """Ids of begin, hole and end. ValueError when the tokenizer lacks one, or finds one in plain text."""
    for name in names:
        if tokenizer.id_of(name) is None:
            raise ValueError(f"data.fim_tokens names {name}, which the tokenizer lacks: data.fim_rate needs all three")
        if tokenizer.id_of(name) in tokenizer.encode([name])[0]:
            raise ValueError(f"data.fim_tokens names {name}, which the tokenizer takes for plain text")
    return tuple(tokenizer.vocab[name] for name in names)


def _merged_tokens(tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Token id to the ids of its two parts, for every token that joins punctuation and the line ends behind it."""
    found = {}
    for id in range(tokenizer.vocab_size):
        text = tokenizer.decode([id])
        mark = text.rstrip("\r\n")
        body = mark.removeprefix(" ")
        # A decoder writes U+FFFD for bytes that are no whole character: such a token cannot be told apart in text.
        if mark == text or not body or "\ufffd" in text or not all(unicodedata.category(c)[0] in "PS" for c in body):
            continue
        parts = np.concatenate(tokenizer.encode([mark, text[len(mark) :]]))
        if len(parts) > 1 and tokenizer.decode(parts) == text:
            found[id] = parts
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of each (splitmix64, Steele et al. 2014)."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
