"""The one door to the `tokenizers` library: train, load, save, encode and decode byte-level BPE."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from train.files import SHA256, write_durably

END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call the token that ends a document; the first that a tokenizer has is taken.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # noqa: RUF001

# The rules that DeepSeek-V3's tokenizer splits text by before it merges bytes, in their order: what one takes is final.
_NUMBERS = r"\p{N}{1,3}"
_CJK = r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"
_WORDS = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # a mark of ASCII that leads a word
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the space before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation, with the line ends behind it
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # spaces but the last, which leads a word
        r"\s+",
    )
)


class Tokenizer:
    """Text to token ids and back.

    Every text, the names of special tokens included, is plain text: the end-of-document id never comes out of
    `encode`. `vocab_size` is one more than the largest id. `digest` is the SHA-256 of the tokenizer's text form.
    """

    def __init__(self, text: str, end_of_document: str | None = None) -> None:
        """Build from the text of a `tokenizer.json`; `end_of_document` None looks for a known name.

        Raises ValueError when the text is no tokenizer or the end-of-document token is missing.
        """
        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"this is no tokenizer.json: {error}") from None
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        names = _KNOWN_ENDS if end_of_document is None else (end_of_document,)
        found = [name for name in names if name in vocab]
        if not found:
            raise ValueError(f"none of its tokens ends a document: data.end_of_document must be one, not {names}")
        self.text, self.vocab = text, vocab
        self.end_of_document = found[0]
        self.eod: int = vocab[found[0]]
        self.vocab_size = max(vocab.values()) + 1
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        if self.eod in self.encode([self.end_of_document])[0]:
            raise ValueError(
                f"data.end_of_document={self.end_of_document} comes out of plain text: it must be a special token"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ()) -> Tokenizer:
        """Train byte-level BPE; equal texts give equal tokenizers. Too little text gives a smaller vocabulary.

        special_tokens: further ones beside the end of a document, within `vocab_size`.
        """
        backend = Backend(models.BPE())
        rules = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (_NUMBERS, _CJK, _WORDS)]
        # Without a prefix space, so that decoding gives back exactly what was encoded.
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*rules, as_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT, *special_tokens],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str(pretty=False), END_OF_DOCUMENT)

    @classmethod
    def load(cls, path: str | Path, end_of_document: str | None = None) -> Tokenizer:
        """Read a `tokenizer.json`; ValueError names the file when it cannot be used."""
        try:
            return cls(Path(path).read_bytes().decode(), end_of_document)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer {path} cannot be used: {error}") from None

    def save(self, path: Path) -> None:
        """Write the text form, whose SHA-256 is `digest`; the disk has it when this returns."""
        write_durably(path, self.text.encode(), SHA256)

    def id_of(self, token: str) -> int | None:
        """The id of a token of this name, None where there is none."""
        return self.vocab.get(token)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int64, without an end-of-document token."""
        # One text a call: a larger batch would start a thread per core inside each of several worker processes.
        encoded = (self._backend.encode_batch_fast([text], add_special_tokens=False)[0] for text in texts)
        return [np.array(each.ids, dtype=np.int64) for each in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, the names of special tokens included."""
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=False)


class TextStream:
    """The text of token ids that come one by one: a token may end within a character, which is held back until then."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoded again with the tokens said last, as some tokenizers write a token at the start of a text differently.
        self._said: list[int] = []
        self._held: list[int] = []

    def push(self, id: int) -> str:
        """The text that is certain with this token and was not before."""
        self._held.append(id)
        text = self._fresh()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._said, self._held = self._held, []
        return text

    def end(self) -> str:
        """What is still held back; bytes that are no character are shown as U+FFFD."""
        text = self._fresh()
        self._said, self._held = [], []
        return text

    def _fresh(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._said + self._held)[len(decode(self._said)) :]
