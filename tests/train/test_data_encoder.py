"""Fill-in-the-middle and the split of merged tokens: documents come back, shares hold, draws are the document's."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import all_bytes, prepared, text
from train.data.config import FIM_TOKENS, DataConfig
from train.data.prepare.encode import document_hash
from train.data.prepare.encoder import MIN_FIM_CHARACTERS, Encoder, Variations
from train.data.prepare.one_source import prepare
from train.data.rows.tokens import Tokens
from train.data.tokenizer import END_OF_DOCUMENT, Tokenizer

# Lines that end in all kinds of punctuation, so that merged tokens are learned.
WORDS = ["if x", "f(a", "end", "λ — 海水"]
MARKS = [":", ").", ";", "。", " !", ""]
BREAKS = ["\n", "\n\n", "\r\n", " "]


def code(seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(part) for _ in range(200) for part in (WORDS, MARKS, BREAKS))


CODE = [code(seed) for seed in range(30)]
TOKENIZER = Tokenizer.train(CODE, 360, FIM_TOKENS)
BEGIN, HOLE, END = (TOKENIZER.vocab[name] for name in FIM_TOKENS)


def encode(text: str, **variations: object) -> list[int]:
    encoder = Encoder(TOKENIZER, Variations(fim_tokens=FIM_TOKENS, **variations))  # type: ignore[arg-type]
    return encoder.encode([text], [document_hash(text.encode())])[0].tolist()


def recovered(ids: list[int]) -> str:
    """The document of a row of ids: prefix, middle, suffix."""
    if ids[0] != BEGIN:
        return TOKENIZER.decode(ids)
    hole, end = ids.index(HOLE), ids.index(END)
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
    assert prefix and suffix and middle
    return "".join(TOKENIZER.decode(part) for part in (prefix, middle, suffix))


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(min_size=1, max_size=200) | st.sampled_from(CODE),
    seed=st.integers(0, 99), fim=st.sampled_from([0.0, 0.5, 1.0]), split=st.sampled_from([0.0, 0.4, 1.0]),
)  # fmt: skip
def test_the_document_comes_back(text: str, seed: int, fim: float, split: float) -> None:
    text = text.encode("utf-8", "ignore").decode()  # a lone surrogate is no text
    ids = encode(text, fim_rate=fim, split_merged_rate=split, seed=seed)
    assert ids == encode(text, fim_rate=fim, split_merged_rate=split, seed=seed)
    if text:
        assert recovered(ids) == text
    assert TOKENIZER.eod not in ids
    if len(text) < MIN_FIM_CHARACTERS or fim == 0:
        assert not {BEGIN, HOLE, END} & set(ids)
    elif fim == 1:
        assert [ids.count(id) for id in (BEGIN, HOLE, END)] == [1, 1, 1]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_documents_is_the_rate(rate: float) -> None:
    texts = [f"{i} {text(i, 12)}" for i in range(3000)]
    long = [each for each in texts if len(each) >= MIN_FIM_CHARACTERS]
    encoder = Encoder(TOKENIZER, Variations(rate, FIM_TOKENS))
    hashes = [document_hash(each.encode()) for each in long]
    chosen = [ids[0] == BEGIN for ids in encoder.encode(long, hashes)]
    # 5 standard deviations of a binomial
    assert abs(sum(chosen) - rate * len(long)) < 5 * math.sqrt(len(long) * rate * (1 - rate))
    other = Encoder(TOKENIZER, Variations(rate, FIM_TOKENS, seed=1)).encode(long, hashes)
    assert [ids[0] == BEGIN for ids in other] != chosen


def test_cuts_are_uniform_over_characters() -> None:
    long = "".join(chr(0x61 + i % 26) for i in range(400))
    starts, stops = [], []
    for seed in range(2000):
        ids = encode(long, fim_rate=1.0, seed=seed)
        hole, end = ids.index(HOLE), ids.index(END)
        starts.append(len(TOKENIZER.decode(ids[1:hole])))
        stops.append(starts[-1] + len(TOKENIZER.decode(ids[end + 1 :])))
    # The smaller and the larger of two uniform places: means of a third and two thirds, deviation 1 / sqrt(18).
    for places, mean in ((starts, 400 / 3), (stops, 800 / 3)):
        assert abs(np.mean(places) - mean) < 5 * 400 / math.sqrt(18 * 2000)
        assert min(places) >= 1 and max(places) <= 399


def test_merged_tokens_are_split_at_the_rate_and_nothing_else_is() -> None:
    ids = np.concatenate([TOKENIZER.encode([each])[0] for each in CODE]).tolist()
    every = [encode(each, split_merged_rate=1.0) for each in CODE]
    some = [encode(each, split_merged_rate=0.3) for each in CODE]
    # The twin, by the tokens' texts: marks, perhaps behind a space, then line ends.
    merged = [
        id
        for id in ids
        if (text := TOKENIZER.decode([id])).endswith(("\n", "\r")) and text.strip() and "\ufffd" not in text
    ]
    assert len(set(merged)) > 5 and len(merged) > 500
    for each, whole in zip(CODE, every, strict=True):
        assert TOKENIZER.decode(whole) == each
        assert not set(whole) & set(merged)
    count = sum(id in set(merged) for row in some for id in row)
    assert abs(count - 0.7 * len(merged)) < 5 * math.sqrt(len(merged) * 0.3 * 0.7)


def test_equal_documents_are_treated_alike_wherever_they_lie() -> None:
    encoder = Encoder(TOKENIZER, Variations(0.5, FIM_TOKENS, 0.5))
    hashes = [document_hash(each.encode()) for each in CODE]
    there = encoder.encode(CODE, hashes)
    back = encoder.encode(CODE[::-1], hashes[::-1])[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(there, back, strict=True))


def test_preparation_does_both_whatever_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.prepare.one_source._TASK_BYTES", 900)
    folders = []
    for workers in (1, 2):
        config, _ = prepared(
            tmp_path / "text", fim_rate=0.4, split_merged_rate=0.3, vocab_size=320, num_workers=workers,
            dir=str(tmp_path / str(workers)),
        )  # fmt: skip
        folders.append(all_bytes(config.folder))
    assert folders[0] == folders[1]
    tokenizer = Tokenizer.load(config.folder / "tokenizer.json")
    begin = tokenizer.vocab[FIM_TOKENS[0]]
    tokens = Tokens.open(config.folder, "train")
    firsts = [
        int(tokens.read(each.first_token, each.first_token + 1)[0]) for each in tokens.documents(0, tokens.num_tokens)
    ]
    assert 0 < firsts.count(begin) < len(firsts)
    plain, _ = prepared(tmp_path / "plain", vocab_size=320)
    assert FIM_TOKENS[0] not in Tokenizer.load(plain.folder / "tokenizer.json").vocab


def test_what_a_tokenizer_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("a line of text.\n" * 200)
    Tokenizer.train(CODE, 300).save(tmp_path / "t.json")
    given = {
        "source": str(source),
        "dir": str(tmp_path / "out"),
        "tokenizer": str(tmp_path / "t.json"),
        "num_workers": 1,
    }
    for more, why in (
        ({"fim_rate": 0.1}, r"data.fim_tokens names <｜fim▁begin｜>, which the tokenizer lacks"),  # noqa: RUF001
        ({"vocab_size": 280}, r"data.vocab_size=280 is below the \d+ tokens"),
        ({"end_of_document": "<none>"}, r"data.end_of_document"),
        ({"end_of_document": "a"}, r"data.end_of_document=a comes out of plain text"),
        ({"fim_rate": 0.1, "fim_tokens": ("a", "b", "e")}, r"names a, which the tokenizer takes for plain text"),
    ):
        with pytest.raises(ValueError, match=why):
            prepare(DataConfig(**{"vocab_size": 400, **given, **more}), lambda line: None)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("fim_rate", 1.5, "data.fim_rate=1.5 is a share"),
        ("fim_rate", float("nan"), "data.fim_rate=nan is a share"),
        ("split_merged_rate", -0.1, "data.split_merged_rate=-0.1 is a share"),
        ("fim_tokens", ("a", "b"), "must be three different tokens"),
        ("fim_tokens", ("a", "b", "a"), "must be three different tokens"),
        ("max_epochs", 0, "data.max_epochs=0 must be above 0"),
    ],
)
def test_illegal_settings_are_refused(field: str, value: object, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace(".", r"\.")):
        DataConfig(**{field: value})  # type: ignore[arg-type]


def pieces(text: str) -> list[str]:
    """What the pre-tokeniser makes of a text."""
    found = TOKENIZER._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc123def", ["abc", "123", "def"]),
        ("12345678", ["123", "456", "78"]),
        ("one two", ["one", " two"]),
        ("海水 tide", ["海水", " tide"]),
        ("かなカナ漢字x", ["かなカナ漢字", "x"]),
        ("end).\n\nnext", ["end", ").\n\n", "next"]),
        ("a = b;\r\n  c", ["a", " =", " b", ";\r\n", " ", " c"]),
        (".append(x)", [".append", "(x", ")"]),
        ("naïve café", ["naïve", " café"]),
        ("x \n\n y", ["x", " \n\n", " y"]),
        ("tail   ", ["tail", "   "]),
        (END_OF_DOCUMENT, ["<|", "endoftext", "|>"]),
    ],
)
def test_text_is_split_by_the_published_rules(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected
