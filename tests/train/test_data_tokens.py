import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import prepared
from train.data.meta import META
from train.data.rows.tokens import Tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, _ = prepared(tmp_path_factory.mktemp("tokens"))
    return config.folder


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_range_reads_as_one_stream_over_the_shards(folder: Path, data: st.DataObject) -> None:
    tokens = Tokens.open(folder, "train")
    stream = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob("train-0*.bin"))])
    assert len(stream) == tokens.num_tokens
    assert len(list(folder.glob("train-0*.bin"))) > 3
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert (tokens.read(start, stop) == stream[start:stop]).all()


def test_documents_are_those_between_the_end_tokens(folder: Path) -> None:
    tokens = Tokens.open(folder, "train")
    stream = tokens.read(0, tokens.num_tokens)
    owner = np.concatenate([[0], np.cumsum(stream == tokens.eod)[:-1]])  # the slow twin: which document a token is of
    whole = tokens.documents(0, tokens.num_tokens)
    assert len(whole) == tokens.num_documents == owner[-1] + 1
    ends = np.flatnonzero(stream == tokens.eod)
    for start in (*range(0, tokens.num_tokens, 37), *ends, *(ends + 1)):  # within documents, at and behind their ends
        if start + 100 > tokens.num_tokens:
            continue
        assert tokens.documents(start, start + 100) == whole[owner[start] : owner[start + 99] + 1]


def test_ranges_outside_the_split_are_refused(folder: Path) -> None:
    tokens = Tokens.open(folder, "valid")
    for start, stop in ((-1, 3), (0, tokens.num_tokens + 1), (5, 4)):
        with pytest.raises(ValueError, match="not within"):
            tokens.read(start, stop)
        with pytest.raises(ValueError, match="not within"):
            tokens.documents(start, stop)


def damaged(path: Path, fault: str) -> None:
    content = bytearray(path.read_bytes())
    if fault == "removed":
        path.unlink()
        return
    if fault == "cut":
        content = content[:-2]
    elif fault == "longer":
        content += b"\0\0"
    elif fault == "changed":
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fault", ["removed", "cut", "longer", "changed"])
def test_a_shard_that_changes_under_a_run_is_refused_at_the_next_read(tmp_path: Path, fault: str) -> None:
    config, _ = prepared(tmp_path)
    tokens = Tokens.open(config.folder, "train")
    assert len(tokens.read(500, 1000)) == 500
    damaged(config.folder / "train-00001.bin", fault)
    with pytest.raises(ValueError, match=r"train-00001.bin was changed or removed while it was read"):
        tokens.read(999, 1001)
    assert len(tokens.read(0, 500)) == 500  # the others are as they were


@pytest.mark.parametrize("fault", ["removed", "cut", "longer", "changed"])
@pytest.mark.parametrize("name", ["train-00001.bin", "valid-00000.bin", "train-documents.bin", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, fault: str, name: str) -> None:
    config, _ = prepared(tmp_path)
    damaged(config.folder / name, fault)
    for verify in (None, True) if fault == "changed" else (None, True, False):
        with pytest.raises(ValueError, match=name):
            Tokens.open(config.folder, "train", verify=verify)
    if fault == "changed":
        Tokens.open(config.folder, "train", verify=False)  # sizes alone cannot tell


def test_large_data_is_checked_by_size_unless_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr("train.files.record_of", lambda path, algorithm: asked.append(path) or "another")
    with pytest.raises(ValueError, match="checksum"):
        Tokens.open(folder, "train")
    asked.clear()
    monkeypatch.setattr("train.data.rows.tokens._VERIFY_BYTES", 10)
    Tokens.open(folder, "train")
    assert not asked


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prepared tokens"):
        Tokens.open(tmp_path / "nowhere", "train")
    config, _ = prepared(tmp_path)
    with pytest.raises(ValueError, match="split=test is not one of train, valid"):
        Tokens.open(config.folder, "test")
    path = config.folder / META
    form = json.loads(path.read_text())
    path.write_text(json.dumps({**form, "eod": 5}))
    with pytest.raises(ValueError, match="changed after it was written"):
        Tokens.open(config.folder, "train")
    path.write_text(json.dumps(form)[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        Tokens.open(config.folder, "train")
    path.write_text("[]")
    with pytest.raises(ValueError, match="not of the form"):
        Tokens.open(config.folder, "train")


def test_the_fingerprint_tells_other_tokens(tmp_path: Path) -> None:
    prints = set()
    for index, settings_ in enumerate(({}, {"vocab_size": 310}, {"valid_fraction": 0.5}, {})):
        config, _ = prepared(tmp_path / str(index), **settings_)
        prints.add(Tokens.open(config.folder, "valid").fingerprint)
    assert len(prints) == 3  # the first and the last are the same tokens, from another folder
