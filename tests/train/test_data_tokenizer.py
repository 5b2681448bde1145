import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import text
from train.data.tokenizer import END_OF_DOCUMENT, Tokenizer

TEXTS = [text(seed, 200) for seed in range(20)]
TOKENIZER = Tokenizer.train(TEXTS, 300)


@settings(deadline=None, max_examples=100)
@given(st.text() | st.text(alphabet=list("<|endoftext|> \n\ra")) | st.just(f"a{END_OF_DOCUMENT}b"))
def test_any_text_comes_back_and_never_ends_a_document(some: str) -> None:
    some = some.encode("utf-8", "ignore").decode()  # a lone surrogate is no text
    ids = TOKENIZER.encode([some])[0]
    assert TOKENIZER.decode(ids) == some
    assert TOKENIZER.eod not in ids
    assert (ids < TOKENIZER.vocab_size).all()


def test_training_is_a_function_of_the_texts_whatever_the_threads() -> None:
    code = (
        "from train.data.tokenizer import Tokenizer; from tests.train.test_data_tokenizer import TEXTS;"
        "print(Tokenizer.train(TEXTS, 300).digest)"
    )
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        root = Path(__file__).parents[2]
        seen = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=root, check=True, capture_output=True, text=True
        )
        assert seen.stdout.strip() == TOKENIZER.digest
    assert Tokenizer.train([*TEXTS, "quite other words " * 50], 300).digest != TOKENIZER.digest


def test_the_vocabulary_is_as_large_as_asked_for_or_as_the_text_allows() -> None:
    assert TOKENIZER.vocab_size == 300
    assert Tokenizer.train(["ab"], 400).vocab_size == 258  # bytes, end of document, "ab"
    assert Tokenizer.train([], 400).vocab_size == 257


def test_a_saved_tokenizer_loads_as_itself(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.digest, loaded.eod, loaded.vocab_size) == (TOKENIZER.digest, TOKENIZER.eod, TOKENIZER.vocab_size)


def test_a_given_tokenizer_neither_truncates_nor_pads(tmp_path: Path) -> None:
    form = json.loads(TOKENIZER.text)
    form["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    form["padding"] = {
        "strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_DOCUMENT,
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(form))
    ids = Tokenizer.load(tmp_path / "t.json").encode(["the tide turns"])[0]
    assert ids.tolist() == TOKENIZER.encode(["the tide turns"])[0].tolist()


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    for name, content, why in (
        ("none.json", None, "No such file"),
        ("text.json", "hello", "no tokenizer.json"),
        ("bytes.json", b"\xff\xfe", "decode"),
        ("eod.json", TOKENIZER.text.replace(END_OF_DOCUMENT, "<other>"), "data.end_of_document"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=why) as error:
            Tokenizer.load(tmp_path / name)
        assert name in str(error.value)
    assert Tokenizer.load(tmp_path / "eod.json", "<other>").eod == TOKENIZER.eod
