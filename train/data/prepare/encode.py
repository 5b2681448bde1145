"""One task of tokenising: some blocks to the ids of their documents' tokens, a pure function of the blocks."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from train.data.prepare.encoder import Encoder, Variations
from train.data.read.blocks import Block, Position, Trouble
from train.data.read.documents import Document, documents
from train.data.tokenizer import Tokenizer


class Encoding(NamedTuple):
    """How documents become ids: all that a worker needs beside the blocks."""

    tokenizer: str  # path
    tokenizer_digest: str
    end_of_document: str
    dtype: str
    variations: Variations
    text_field: str
    max_document_bytes: int


class Task(NamedTuple):
    """Blocks that one worker encodes in one go."""

    encoding: Encoding
    blocks: tuple[Block, ...]


class Encoded(NamedTuple):
    """The documents of one task, in order.

    ids: [sum(num_tokens)] of the encoding's dtype, each document followed by its end-of-document id.
    num_tokens: int64 [num_documents], the end included.
    num_bytes: int64 [num_documents], of the documents' texts.
    hashes: uint64 [num_documents], of the documents' texts.
    places: int64 [num_documents, 3]: file, start, stop (see Document).
    troubles: what was passed over or noted.
    disk_bytes: how much of the source's files the task covers.
    next: where the source goes on behind the task.
    """

    ids: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    places: np.ndarray
    troubles: list[Trouble]
    disk_bytes: int
    next: Position


def document_hash(data: bytes) -> int:
    """64 uniform bits of a document's text: they decide its split, and tell equal documents."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def encode(task: Task) -> Encoded:
    """Parse and encode the documents of one task. Never raises for what the blocks hold."""
    encoding = task.encoding
    encoder = _encoder(encoding.tokenizer, encoding.tokenizer_digest, encoding.end_of_document, encoding.variations)
    kept: list[Document] = []
    troubles: list[Trouble] = []
    for block in task.blocks:
        for found in documents(block, encoding.text_field, encoding.max_document_bytes):
            if isinstance(found, Document):
                kept.append(found)
            else:
                troubles.append(found)
    hashes = [document_hash(document.data) for document in kept]
    end = np.array([encoder.tokenizer.eod])
    ids_of_each = encoder.encode([document.text for document in kept], hashes)
    parts = [part for ids in ids_of_each for part in (ids, end)]
    return Encoded(
        ids=(np.concatenate(parts) if parts else np.empty(0)).astype(encoding.dtype),
        num_tokens=np.array([len(ids) + 1 for ids in parts[::2]], dtype=np.int64),
        num_bytes=np.array([len(document.data) for document in kept], dtype=np.int64),
        hashes=np.array(hashes, dtype=np.uint64),
        places=np.array([document[2:] for document in kept], dtype=np.int64).reshape(len(kept), 3),
        troubles=troubles,
        disk_bytes=sum(block.disk_bytes for block in task.blocks),
        next=task.blocks[-1].next,
    )


@functools.lru_cache(maxsize=1)
def _encoder(path: str, digest: str, end_of_document: str, variations: Variations) -> Encoder:
    """A worker meets the same tokenizer in every task and reads it once; `digest` tells a path's next tenant."""
    return Encoder(Tokenizer.load(path, end_of_document), variations)
