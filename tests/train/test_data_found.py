"""What a file holds decides, whatever it is called; what a source holds decides, wherever it lies."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.prepare import report
from tests.train.data_texts import text
from train.data.config import BlendSource, DataConfig
from train.data.prepare.all_sources import prepare_sources
from train.data.prepare.contents import CONTENTS, STAMPS
from train.data.prepare.one_source import prepare
from train.data.read.blocks import Position
from train.data.read.documents import Document, documents
from train.data.read.source import open_source, walk

MARK = b"\xef\xbb\xbf"
TEXTS = ["low tide", "é 数据 \U0001f30a", 'line\nline \\ "x" ]}', "x" * 3000, text(3, 200)]
ROWS = [{"id": number, "text": each, "more": {"a": [1, {"b": "]"}]}} for number, each in enumerate(TEXTS)]


def lines(rows: object) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)  # type: ignore[attr-defined]


CONTENTS_OF: dict[str, bytes] = {
    "lines": lines(ROWS),
    "lines behind a mark": MARK + lines(ROWS) + b"\r\n",
    "array": json.dumps(ROWS).encode(),
    "printed array": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "printed array behind a mark": MARK + b"\n" + json.dumps(ROWS, indent="\t").encode(),
    "array of a line each": b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
    "printed documents": b"\n".join(json.dumps(row, indent=4).encode() for row in ROWS),
    "documents on one line": b"".join(json.dumps(row).encode() for row in ROWS),
    "one printed document": json.dumps(ROWS[4], indent=2).encode(),
}
SQUEEZED: tuple[Callable[[bytes], bytes], ...] = (lambda data: data, gzip.compress, bz2.compress, lzma.compress)


def config_of(source: Path, **more: object) -> DataConfig:
    settings = {"vocab_size": 300, "valid_fraction": 0.3, "num_workers": 1, "dir": str(source.parent / "tokens")}
    return DataConfig(**{"source": str(source), **settings, **more})  # type: ignore[arg-type]


def read(config: DataConfig, at: Position = Position()) -> tuple[list[str], list[tuple[str, str, str]]]:  # noqa: B008
    """(texts of a source, its trouble as (reason, where, detail)) from a position on."""
    found, source = [], open_source(config)
    for block in walk(source, at):
        found += documents(block, config.text_field, config.max_document_bytes)
    texts = [each.text for each in found if isinstance(each, Document)]
    return texts, [(each.reason, each.where, each.detail) for each in found if not isinstance(each, Document)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a", "a.json.gz", "a.json.zst", "a.md.xz", "a.tar"])
@pytest.mark.parametrize("block_bytes", [1 << 20, 70])
def test_json_is_read_as_json_under_any_name(
    tmp_path: Path, name: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed or not, whatever the name says of that; and reading goes on from any block."""
    for module in ("blocks", "json_documents"):
        monkeypatch.setattr(f"train.data.read.{module}.BLOCK_BYTES", block_bytes)
    config = config_of(tmp_path / name)
    for kind, content in CONTENTS_OF.items():
        wanted = TEXTS[4:] if kind == "one printed document" else TEXTS
        for squeeze in SQUEEZED:
            (tmp_path / name).write_bytes(squeeze(content))
            assert read(config) == (wanted, []), kind
        done = 0
        for block in walk(open_source(config), Position()):
            assert read(config, block.at)[0] == wanted[done:], kind
            done += sum(isinstance(each, Document) for each in documents(block, "text", 1 << 16))
        form = open_source(config).form(0)
        assert form == ("jsonl" if kind.startswith("lines") else "json"), kind


PLAIN = {
    "a.txt": b"[section]\nkey = value\n",
    "b.tex": b"{\\bf tide} and more\n",
    "c.ipynb": json.dumps({"cells": [{"source": "x = 1"}]}, indent=1).encode(),
    "d.txt": b'{"one": "object that is a text"}',
    "e.log": b'{"a": 1}\nwords\nmore words\nmore\n',
    "f.json.md": b"# Title\n\n```\n{}\n```\n",
    "g.gz": b"plain words that are called compressed\n",
    "h.txt": gzip.compress(b"squeezed words under a plain name"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_no_json_stays_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PLAIN[name])
    content = gzip.decompress(PLAIN[name]) if name == "h.txt" else PLAIN[name]
    assert read(config_of(tmp_path / name)) == ([content.decode()], [])


def test_json_without_the_field_is_named_with_the_fields_there_are(tmp_path: Path) -> None:
    rows = [{"url": "u", "body": each} for each in TEXTS]
    for name, reason in (("a.json", "missing"), ("a.jsonl.gz", "missing"), ("a.txt", "ambiguous")):
        path = tmp_path / name
        path.write_bytes(gzip.compress(lines(rows)))
        texts, trouble = read(config_of(path))
        assert not texts and {each[0] for each in trouble} == {reason}
        assert "no text among url, body" in trouble[0][2]
        with pytest.raises(ValueError, match=r"no text among url, body.*; data.text_field names the field") as error:
            prepare(config_of(path), lambda line: None)
        assert reason != "ambiguous" or "data.format=text" in str(error.value)
        assert read(config_of(path, text_field="body"))[0] == TEXTS
        assert len(read(config_of(path, format="text"))[0]) == 1


def test_broken_json_is_counted_and_what_comes_before_is_kept(tmp_path: Path) -> None:
    path, first = tmp_path / "a.json", json.dumps(ROWS[0])
    for rest, reason in (
        ('{"text": "half', "not_json"), (" {}", "not_json"), (', "word", 3]', "wrong_type"), (", [1]]", "wrong_type"),
    ):  # fmt: skip
        path.write_text(f"[{first}{'' if rest.startswith((',', ' ')) else ','}{rest}")
        texts, trouble = read(config_of(path))
        assert texts == TEXTS[:1]
        assert {each[0] for each in trouble} == {reason} and trouble[0][1] == "document 1"
    path.write_bytes(f"[{first},".encode() + b'{"text": "\xff"}]')
    assert [each[0] for each in read(config_of(path))[1]] == ["undecodable"]
    path.write_bytes(b"\n \n")
    assert [each[0] for each in read(config_of(path))[1]] == ["empty"]


def test_the_report_says_what_was_read_as_what(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.json.gz").write_bytes(gzip.compress(lines(ROWS)))
    (source / "b.json").write_bytes(CONTENTS_OF["printed array"])
    (source / "c.txt").write_text("words " * 40)
    (source / "d").write_text("words without an ending " * 9)
    meta = prepare(config_of(source), lambda line: None)
    assert meta.report["read_as"] == {
        "JSON documents": {".json": 1}, "JSON lines": {".json.gz": 3}, "plain text": {"": 1, ".txt": 1}
    }  # fmt: skip
    assert "read as JSON documents: 1 .json; JSON lines: 3 .json.gz; plain text: 1 without an ending, 1 .txt" in report(
        meta
    )


def test_a_mark_is_no_text_and_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for squeeze in SQUEEZED:
        path.write_bytes(squeeze(MARK + "é words".encode()))
        source = open_source(config_of(path))
        (found,) = (each for block in walk(source, Position()) for each in documents(block, "text", 99))
        assert isinstance(found, Document) and found.text == "é words"
        assert squeeze is not SQUEEZED[0] or path.read_bytes()[found.start : found.stop] == found.data
    path.write_bytes(MARK)
    assert read(config_of(path)) == ([], [("empty", "", "")])
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes('{"text": "words"}'.encode(encoding))
        ((reason, _, detail),) = read(config_of(path))[1]
        assert reason == "undecodable" and f"begins as {encoding.upper()} does" in detail


def folder_of_texts(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"{number} {text(number, 60)}")
    return folder


def is_noticed(config: DataConfig, name: str) -> bool:
    try:
        prepare(config, lambda line: None)
    except ValueError as error:
        assert f"other contents of {name}" in str(error)
        return True
    return False


@pytest.mark.parametrize("age_s", [0, 100])
def test_an_edit_in_place_is_noticed_whatever_sizes_and_times_say(
    tmp_path: Path, age_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """age_s: how long before the preparation the files seem to have been written; at 0 their times are not trusted."""
    import time as clock

    source = folder_of_texts(tmp_path / "source")
    now = clock.time_ns
    monkeypatch.setattr("train.data.prepare.contents.time.time_ns", lambda: now() + age_s * 10**9)
    monkeypatch.setattr("train.data.prepare.one_source.time.time_ns", lambda: now() + age_s * 10**9)
    config = config_of(source)
    prepare(config, lambda line: None)
    assert (config.folder / STAMPS).exists() == (age_s > 0)
    path = source / "3.txt"
    before, status = path.read_bytes(), path.stat()
    assert not is_noticed(config, "3.txt")
    path.write_bytes(before[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert is_noticed(config, "3.txt") and is_noticed(config, "3.txt")
    path.write_bytes(before)
    assert not is_noticed(config, "3.txt")
    path.unlink()
    path.write_bytes(before)  # another inode
    assert not is_noticed(config, "3.txt")
    (config.folder / STAMPS).write_text("no JSON")
    assert not is_noticed(config, "3.txt")
    (config.folder / CONTENTS).write_text((config.folder / CONTENTS).read_text().replace("a", "b"))
    with pytest.raises(ValueError, match=f"{CONTENTS} does not have the checksum"):
        prepare(config, lambda line: None)


def test_files_are_not_read_again_where_their_stamps_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.data.read.source import FileSource

    source, read_again = folder_of_texts(tmp_path / "source"), []
    later = __import__("time").time_ns() + 10**11
    monkeypatch.setattr("train.data.prepare.contents.time.time_ns", lambda: later)
    config = config_of(source)
    prepare(config, lambda line: None)
    digest = FileSource.digest
    monkeypatch.setattr(FileSource, "digest", lambda self, file: read_again.append(file) or digest(self, file))
    prepare(config, lambda line: None)
    first, read_again[:] = list(read_again), []
    prepare(config, lambda line: None)
    assert not read_again and len(first) in (0, 12)


def test_a_source_that_was_moved_is_the_same_data(tmp_path: Path) -> None:
    source = folder_of_texts(tmp_path / "a")
    said: list[str] = []
    config = config_of(source)
    meta = prepare(config, said.append)
    (tmp_path / "b").mkdir()
    moved = replace(config, source=str(shutil.move(source, tmp_path / "b" / "other")))
    assert prepare(moved, said.append) == meta
    assert f"of the same contents as {source} before" in said[-1]
    elsewhere = replace(moved, dir=str(tmp_path / "anew"))
    assert prepare(elsewhere, said.append).fingerprint == meta.fingerprint
    (tmp_path / "b" / "other" / "3.txt").write_text("9" * (tmp_path / "b" / "other" / "3.txt").stat().st_size)
    with pytest.raises(ValueError, match=r"other contents of 3.txt"):
        prepare(moved, said.append)


def test_a_blend_whose_sources_were_moved_is_the_same_data(tmp_path: Path) -> None:
    def blend(root: Path) -> DataConfig:
        sources = tuple(BlendSource(name, 1.0, str(root / name)) for name in ("x", "y"))
        return DataConfig(dir=str(tmp_path / "t"), blend=sources, vocab_size=300, num_workers=1)

    for name in ("x", "y"):
        folder_of_texts(tmp_path / "a" / name)
    metas = prepare_sources(blend(tmp_path / "a"), lambda line: None)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert prepare_sources(blend(tmp_path / "b"), lambda line: None) == metas


def test_what_we_write_ourselves_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, sweeps, checkpoints, models and tokens lie in the source, come and go, and it stays the same."""
    folder_of_texts(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    config, said = DataConfig(source=".", vocab_size=300, num_workers=1), []
    prepare(config, said.append)
    files = {
        "runs/a=1,b=2/logs/rank_0.log": "started", "runs/a=1,b=2/report.html": "<html>", "runs/a=1,b=2/wandb/x": "x",
        "kept/step-00000003/manifest.json": '{"files": {}, "crc32": 1}', "kept/step-00000003/config.yaml": "model: 1",
        "kept2/latest": "step-00000003\n", "sweep/.lock": "", "sweep/results.csv": "a,b", "sweep/report.html": "<html>",
        "hf/config.json": "{}", "hf/model.safetensors": "x", "hf/tokenizer.json": "{}",
        "blend/blend.json": '{"settings": {}, "tokenizer": "x"}', "blend/tokenizer.json": "{}",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    shutil.copytree(config.folder, tmp_path / "copied")
    prepare(config, said.append)
    assert said[-1].endswith("is prepared already and whole: nothing to do")
    found = open_source(config)
    assert [file.name for file in found.files] == sorted(f"words/{number}.txt" for number in range(12))
    assert set(found.left_out) == {
        str(config.folder), "runs/a=1,b=2", "kept/step-00000003", "kept2", "sweep", "hf", "blend", "copied"
    }  # fmt: skip
    for near in ("notes/config.yaml", "notes/meta.json", "notes/manifest.json", "notes/latest", "notes/logs/other.log"):
        (tmp_path / near).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / near).write_text('{"text": "mine"}')
    assert sum(file.name.startswith("notes/") for file in open_source(config).files) == 5


FEW_FILES = """
import resource, sys
from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
from train.data.rows.blend import open_stream

config = DataConfig(source=sys.argv[1], dir=sys.argv[2], vocab_size=300, num_workers=1, shard_tokens=10)
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
meta = prepare(config, print)
assert sum(len(split.shards) for split in meta.splits.values()) > 100
rows = open_stream(config, "train", 25)
assert rows.rows(0, rows.num_rows).shape == (rows.num_rows, 26)
assert rows.documents(0)
prepare(config, print)
"""


def test_there_may_be_more_shards_than_open_files(tmp_path: Path) -> None:
    source = folder_of_texts(tmp_path / "source", 60)
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(source), str(tmp_path / "t")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
