"""One task of tokenising: some documents to the ids of their tokens, a pure function of the files."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from train.data.encoder import Encoder, Variations
from train.data.source import Piece, read_range
from train.data.tokenizer import Tokenizer


class Task(NamedTuple):
    """Documents that one worker encodes in one go; `paths` has one file per piece."""

    tokenizer: str  # path
    tokenizer_digest: str
    end_of_document: str
    dtype: str
    variations: Variations
    pieces: tuple[Piece, ...]
    paths: tuple[str, ...]


class Encoded(NamedTuple):
    """The documents of one task, in order.

    ids: [sum(num_tokens)] of the task's dtype, each document followed by its end-of-document id.
    num_tokens: int64 [num_documents], the end included.
    hashes: uint64 [num_documents], of the documents' bytes.
    pieces: int64 [num_documents, 3]: file, first byte, byte after the last.
    skipped: (why, file, first byte) of the pieces that are no documents.
    num_bytes: source bytes that the task covers, skipped ones included.
    """

    ids: np.ndarray
    num_tokens: np.ndarray
    hashes: np.ndarray
    pieces: np.ndarray
    skipped: list[tuple[str, int, int]]
    num_bytes: int


def document_hash(data: bytes) -> int:
    """64 uniform bits of a document's bytes: they decide its split."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_text(path: str, start: int, stop: int) -> tuple[str, bytes]:
    """A document's text and bytes. ValueError with one word when it is none: unreadable, undecodable or empty."""
    try:
        data = read_range(path, start, stop)
    except OSError:
        raise ValueError("unreadable") from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError("undecodable") from None
    if "\0" in text:  # text files have none; binary ones that happen to decode nearly always do
        raise ValueError("undecodable")
    if not text or text.isspace():
        raise ValueError("empty")
    return text, data


def encode(task: Task) -> Encoded:
    """Read and encode the documents of one task. Never raises for what the files hold."""
    encoder = _encoder(task.tokenizer, task.tokenizer_digest, task.end_of_document, task.variations)
    texts: list[str] = []
    hashes: list[int] = []
    kept: list[Piece] = []
    skipped: list[tuple[str, int, int]] = []
    for piece, path in zip(task.pieces, task.paths, strict=True):
        try:
            text, data = read_text(path, piece.start, piece.stop)
        except ValueError as why:
            skipped.append((str(why), piece.file, piece.start))
            continue
        texts.append(text)
        hashes.append(document_hash(data))
        kept.append(piece)
    end = np.array([encoder.tokenizer.eod])
    parts = [part for ids in encoder.encode(texts, hashes) for part in (ids, end)]
    return Encoded(
        ids=(np.concatenate(parts) if parts else np.empty(0)).astype(task.dtype),
        num_tokens=np.array([len(ids) + 1 for ids in parts[::2]], dtype=np.int64),
        hashes=np.array(hashes, dtype=np.uint64),
        pieces=np.array(kept, dtype=np.int64).reshape(len(kept), 3),
        skipped=skipped,
        num_bytes=sum(piece.stop - piece.start for piece in task.pieces),
    )


@functools.lru_cache(maxsize=1)
def _encoder(path: str, digest: str, end_of_document: str, variations: Variations) -> Encoder:
    """A worker meets the same tokenizer in every task and reads it once; `digest` tells a path's next tenant."""
    return Encoder(Tokenizer.load(path, end_of_document), variations)
