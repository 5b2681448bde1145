import dataclasses
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import all_bytes, prepared, text, write_folder
from train.data.config import DataConfig
from train.data.meta import Meta
from train.data.prepare.encode import document_hash
from train.data.prepare.one_source import prepare
from train.data.read.blocks import Position, cut
from train.data.read.source import open_source
from train.data.rows.tokens import Tokens
from train.data.tokenizer import Tokenizer


def quiet(line: str) -> None:
    """Prepare without words."""


def straight(config: DataConfig, split: str) -> list[int]:
    """The slow twin: every document in order of its path, cut as configured, encoded alone, then the end token."""
    source = open_source(config)
    tokenizer = Tokenizer.load(config.folder / "tokenizer.json")
    ids: list[int] = []
    for file in source.files:
        content = (Path(str(config.source)) / file.name).read_bytes()
        for data in cut(content, config.max_document_bytes):
            if (document_hash(data) < int(config.valid_fraction * 2.0**64)) == (split == "valid"):
                ids += [*tokenizer.encode([data.decode()])[0].tolist(), tokenizer.eod]
    return ids


@pytest.mark.parametrize("seed", range(6))
def test_the_shards_hold_what_the_slow_twin_reads(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    monkeypatch.setattr("train.data.prepare.one_source._TASK_BYTES", int(random.integers(100, 5000)))
    config, meta = prepared(
        tmp_path,
        num_documents=int(random.integers(20, 80)),
        vocab_size=int(random.integers(257, 320)) + seed // 4 * 70000,
        shard_tokens=int(random.integers(1, 900)),
        max_document_bytes=int(random.integers(64, 700)),
        valid_fraction=float(random.uniform(0.2, 0.8)),
    )
    assert not meta.notes
    assert meta.dtype == ("<u4" if seed >= 4 else "<u2")
    for split in ("train", "valid"):
        tokens = Tokens.open(config.folder, split)
        ids = straight(config, split)
        assert tokens.read(0, tokens.num_tokens).tolist() == ids
        counts = meta.splits[split]
        assert counts.num_documents == ids.count(tokens.eod)
        shares = [count / len(ids) for count in Counter(ids).values()]
        assert counts.unigram_entropy_nats == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    total = sum(path.stat().st_size for path in Path(str(config.source)).rglob("*.txt"))
    assert sum(split.num_bytes for split in meta.splits.values()) == meta.source_num_bytes == total


def test_documents_decode_to_the_bytes_they_came_from(tmp_path: Path) -> None:
    config, _ = prepared(tmp_path, max_document_bytes=300)
    tokenizer = Tokenizer.load(config.folder / "tokenizer.json")
    seen: dict[str, dict[int, bytes]] = {}
    for split in ("train", "valid"):
        tokens = Tokens.open(config.folder, split)
        for document in tokens.documents(0, tokens.num_tokens):
            ids = tokens.read(document.first_token, document.stop_token)
            assert ids[-1] == tokens.eod
            decoded = tokenizer.decode(ids[:-1]).encode()
            assert len(decoded) == document.stop_byte - document.first_byte
            seen.setdefault(document.file, {})[document.first_byte] = decoded
    source = Path(str(config.source))
    whole = {name: b"".join(parts[start] for start in sorted(parts)) for name, parts in seen.items()}
    assert whole == all_bytes(source)


def test_the_result_is_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.prepare.one_source._TASK_BYTES", 900)  # some twenty tasks
    results = []
    for workers in (1, 2, 3):
        config, _ = prepared(tmp_path / "text", num_workers=workers, dir=str(tmp_path / str(workers)))
        results.append(all_bytes(config.folder))
    assert results[0] == results[1] == results[2]
    assert "meta.json" in results[0]


def test_adding_documents_moves_none(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "text", 60)
    sides = []
    for index in range(2):
        config = DataConfig(
            source=str(source), dir=str(tmp_path / str(index)), vocab_size=280, valid_fraction=0.3, num_workers=1
        )
        prepare(config, quiet)
        tokens = {split: Tokens.open(config.folder, split) for split in ("train", "valid")}
        sides.append(
            {each.file: split for split, some in tokens.items() for each in some.documents(0, some.num_tokens)}
        )
        for more in range(30):
            (source / f"{more}.txt").write_text(text(10**6 + more, 30))
        (source / "copy.txt").write_bytes((source / "0.txt").read_bytes())
    assert len(sides[0]) == 60
    assert sides[0].items() <= sides[1].items()
    assert sides[1]["copy.txt"] == sides[1]["0.txt"]
    # 0.3 of 60 documents; 5 standard deviations of a binomial
    assert abs(sum(side == "valid" for side in sides[0].values()) - 18) < 5 * math.sqrt(60 * 0.3 * 0.7)


@pytest.mark.parametrize(("fraction", "bare"), [(1e-9, "valid"), (1 - 1e-9, "train")])
def test_few_documents_still_fill_both_splits(tmp_path: Path, fraction: float, bare: str) -> None:
    config, meta = prepared(tmp_path, num_documents=5, valid_fraction=fraction)
    assert meta.splits[bare].num_documents == 1
    assert sum(split.num_documents for split in meta.splits.values()) == 5
    assert f"left no document to {bare}" in meta.notes[0]
    hashes = sorted(document_hash(each) for each in all_bytes(Path(str(config.source))).values())
    only = Tokens.open(config.folder, bare).documents(0, 1)[0].file
    assert document_hash((Path(str(config.source)) / only).read_bytes()) == hashes[0 if bare == "valid" else -1]


def test_one_document_is_refused_unless_nothing_validates(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    source.write_text("only one\n")
    config = DataConfig(source=str(source), dir=str(tmp_path / "a"), num_workers=1)
    with pytest.raises(ValueError, match=r"one document.*data.valid_fraction=0.05"):
        prepare(config, quiet)
    meta = prepare(dataclasses.replace(config, valid_fraction=0.0), quiet)
    assert meta.splits["valid"].num_tokens == 0
    with pytest.raises(ValueError, match=r"no valid tokens.*data.valid_fraction=0"):
        Tokens.open(config.folder, "valid")


@settings(deadline=None, max_examples=100)
@given(
    parts=st.lists(st.text(min_size=1, max_size=200) | st.just("\n") | st.just("海" * 90), min_size=1, max_size=30),
    limit=st.integers(64, 400),
)
def test_a_giant_document_is_cut_at_lines_and_never_inside_a_character(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], limit: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "giant"
    content = "".join(parts).encode("utf-8", "ignore")
    path.write_bytes(content)
    pieces = cut(content, limit)
    assert b"".join(pieces) == content
    start = 0
    for part in pieces[:-1]:
        assert 0 < len(part) <= limit
        part.decode()
        longest_rest = content[start + len(part) : start + limit]
        assert b"\n" not in longest_rest  # no later line end would have fitted
        assert part.endswith(b"\n") or b"\n" not in part
        start += len(part)
    source = open_source(DataConfig(source=str(path), max_document_bytes=limit))
    blocks = [block for block in source.blocks(Position()) if block.data != ()]
    assert [block.data for block in blocks] == pieces  # a file is cut while it is read, as a text in memory is
    for block in blocks:
        assert [each.data for each in source.blocks(block.at) if each.data != ()] == pieces[block.at.number :]


def test_a_second_call_does_nothing_and_says_so(tmp_path: Path) -> None:
    config, meta = prepared(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in config.folder.iterdir()}
    said: list[str] = []
    again = prepare(dataclasses.replace(config, num_workers=2), said.append)
    assert again == meta == Meta.load(config.folder)
    assert {path: path.stat().st_mtime_ns for path in config.folder.iterdir()} == before
    assert said == [f"{config.folder} is prepared already and whole: nothing to do"]


def test_other_settings_or_another_source_are_refused_in_the_same_place(tmp_path: Path) -> None:
    config, _ = prepared(tmp_path)
    other = write_folder(tmp_path / "other", 10, seed=5)
    for change in (
        {"source": str(other)}, {"vocab_size": 301}, {"valid_fraction": 0.2}, {"max_document_bytes": 99},
        {"shard_tokens": 501}, {"suffixes": (".txt",)}, {"tokenizer": str(config.folder / "tokenizer.json")},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"data.{next(iter(change))}=.*another data.dir"):
            prepare(dataclasses.replace(config, **change), quiet)
        away = [dataclasses.replace(config, dir=None), dataclasses.replace(config, dir=None, **change)]
        assert away[0].folder != away[1].folder  # the default places differ by themselves
    assert dataclasses.replace(config, num_workers=5, dir=None).folder == away[0].folder
    (Path(str(config.source)) / "new.txt").write_text("more")
    with pytest.raises(ValueError, match="names or sizes changed"):
        prepare(config, quiet)


def test_prepared_tokens_outlive_their_source(tmp_path: Path) -> None:
    config, meta = prepared(tmp_path)
    Path(str(config.source)).rename(tmp_path / "gone")
    said: list[str] = []
    assert prepare(config, said.append) == meta
    assert "no longer there" in said[0]


def test_damage_is_found_by_the_next_call(tmp_path: Path) -> None:
    config, _ = prepared(tmp_path)
    path = config.folder / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001.bin does not have the checksum"):
        prepare(config, quiet)


def test_what_is_no_text_is_counted_and_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "text", 20)
    (source / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (source / "nul.txt").write_bytes(b"a\0b")
    (source / "latin.txt").write_bytes("naïve\n".encode("latin-1") * 30 + b"plain\n" * 40)
    (source / "empty.txt").touch()
    (source / "blank.txt").write_text(" \n\t\n")
    (source / ".hidden").write_text("secret")
    (source / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(source / "pipe.txt")
    (source / "long.txt").write_text("x" * 700)
    (source / os.fsdecode(b"odd\xff.txt")).write_text("an odd name\n")
    config = DataConfig(
        source=str(source), dir=str(tmp_path / "t"), vocab_size=280, num_workers=2, max_document_bytes=200,
        valid_fraction=0.4,
    )  # fmt: skip
    meta = prepare(config, quiet)
    assert meta.skipped["undecodable"].examples == (
        "binary.txt (it begins as UTF-16 does: convert it if it is text)",
        "latin.txt (invalid continuation byte at its byte 2)",
        "nul.txt (it holds a zero byte)",
    )
    assert meta.skipped["empty"].count == 2
    assert set(meta.skipped["empty"].examples) == {"empty.txt", "blank.txt"}
    assert any(each == "long.txt (700 bytes, into 4 documents)" for each in meta.skipped["cut"].examples)
    names = set()
    for split in ("train", "valid"):
        tokens = Tokens.open(config.folder, split)
        names |= {document.file for document in tokens.documents(0, tokens.num_tokens)}
    assert os.fsdecode(b"odd\xff.txt") in names
    assert {"latin.txt", "long.txt"} <= names  # the decodable half of latin.txt is text
    assert not names & {".hidden", "binary.txt", "nul.txt", "dangling.txt", "pipe.txt", "empty.txt", "blank.txt"}


def test_a_file_that_vanishes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "text", 10)
    (source / "short.txt").write_text("soon shorter " * 20)
    listed = open_source(DataConfig(source=str(source)))
    (source / "short.txt").write_text("short")
    monkeypatch.setattr("train.data.prepare.one_source.open_source", lambda config: listed)
    config = DataConfig(source=str(source), dir=str(tmp_path / "t"), vocab_size=280, num_workers=1)
    assert prepare(config, quiet).skipped["changed"].examples == ("short.txt (5 bytes, not 260)",)


def test_sources_without_text_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.bin").write_bytes(b"\xff")
    (tmp_path / "junk" / "b.bin").touch()
    for name, change, why in (
        ("missing", {}, "missing does not exist"),
        ("bare", {}, "holds no file"),
        ("junk", {}, r"holds no text: its documents are 1 empty, as in .*; 1 not UTF-8 text, as in "),
        ("junk", {"suffixes": (".txt", ".md")}, r"holds no file whose name ends in .txt or .md"),
        ("junk/b.bin", {}, "holds no text: its documents are 1 empty"),
        ("junk", {"tokenizer": str(tmp_path / "no.json")}, "no.json cannot be used"),
        ("junk", {"end_of_document": "</s>"}, "data.end_of_document=</s>.*data.tokenizer is null"),
    ):
        config = DataConfig(source=str(tmp_path / name), dir=str(tmp_path / "t"), num_workers=1, **change)
        with pytest.raises(ValueError, match=why):
            prepare(config, quiet)
        with pytest.raises(ValueError, match="holds no prepared tokens"):
            Tokens.open(tmp_path / "t", "train")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "text", 5)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis.tex, which is no prepared data"):
        prepare(DataConfig(source=str(source), dir=str(home), num_workers=1), quiet)
    assert all_bytes(home) == {"thesis.tex": b"years of work"}
    with pytest.raises(ValueError, match="could not be prepared"):
        prepare(DataConfig(source=str(source), dir=str(home / "thesis.tex"), num_workers=1), quiet)


def test_a_given_tokenizer_is_used_and_must_fit(tmp_path: Path) -> None:
    first, meta = prepared(tmp_path)
    given = dataclasses.replace(
        first, dir=str(tmp_path / "again"), tokenizer=str(first.folder / "tokenizer.json"), vocab_size=1000
    )
    again = prepare(given, quiet)
    assert again.tokenizer_digest == meta.tokenizer_digest
    assert again.fingerprint == meta.fingerprint
    with pytest.raises(ValueError, match=r"data.vocab_size=299 is below the 300 tokens"):
        prepare(dataclasses.replace(given, vocab_size=299, dir=str(tmp_path / "third")), quiet)


def test_the_default_source_is_this_pythons_own_library() -> None:
    source = open_source(DataConfig())
    names = [file.name for file in source.files]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not any("site-packages" in name or "/test/" in name or not name.endswith(".py") for name in names)
    assert sum(file.num_bytes for file in source.files) > 5e6
    assert DataConfig().folder.parts[0] == "data"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""), ("dir", ""), ("vocab_size", 256), ("vocab_size", 2**33), ("vocab_size", True),
        ("valid_fraction", 1.1), ("valid_fraction", -0.1), ("valid_fraction", math.nan), ("max_document_bytes", 63),
        ("shard_tokens", 0), ("num_workers", -1), ("suffixes", ("",)), ("suffixes", (3,)), ("suffixes", ".txt"),
    ],
)  # fmt: skip
def test_illegal_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"data.{field}"):
        DataConfig(**{field: value})  # type: ignore[arg-type]
