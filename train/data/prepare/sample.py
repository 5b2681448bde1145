"""Text to train a tokenizer on: a choice of training documents that does not depend on how they are read."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterator

from train.data.config import DataConfig
from train.data.prepare.encode import document_hash
from train.data.read.blocks import Position
from train.data.read.documents import Document, documents
from train.data.read.source import Source

# More text takes longer and hardly shortens the result (3.19 bytes per token from 4 MB or all 12 MB of the standard
# library, 2048 tokens).
SAMPLE_BYTES = 6 << 20
# Larger sources are not read to their end only to choose from them.
_WINDOW_BYTES = 256 << 20


def sample(source: Source, config: DataConfig, threshold: int, num_bytes: int) -> Iterator[str]:
    """Training documents in the order of their places' hashes, until there are so many bytes.

    threshold: documents whose hash is below it validate, and are not shown to the tokenizer. Files are looked through
    in the order of their names' hashes, so that the window of a large source has some of everything.
    """
    kept: list[tuple[int, int, Document]] = []  # a heap, the largest hash first
    total_bytes, seen = 0, set[int]()
    for number, document in enumerate(_window(source, config)):
        content = document_hash(document.data)
        if content < threshold or (config.deduplicate and content in seen):
            continue
        if config.deduplicate:
            seen.add(content)
        name = os.fsencode(source.files[document.file].name)
        place = _hash(b"%s\0%d" % (name, document.start))
        # Documents of one place (a long line, cut) keep their order.
        heapq.heappush(kept, (-place, -number, document))
        total_bytes += len(document.data)
        while total_bytes - len(kept[0][2].data) >= num_bytes:
            total_bytes -= len(heapq.heappop(kept)[2].data)
    for _, _, document in sorted(kept, reverse=True):
        yield document.text


def _window(source: Source, config: DataConfig) -> Iterator[Document]:
    """The documents of the first files, by their names' hashes, up to the window's size."""
    left = _WINDOW_BYTES
    order = sorted(range(len(source.files)), key=lambda file: _hash(os.fsencode(source.files[file].name)))
    for file in order:
        for block in source.blocks(Position(file)):
            for found in documents(block, config.text_field, config.max_document_bytes):
                if isinstance(found, Document):
                    left -= len(found.data)
                    yield found
            if left <= 0:
                return


def _hash(name: bytes) -> int:
    """64 uniform bits of a name, in the order of its digest's bytes."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
