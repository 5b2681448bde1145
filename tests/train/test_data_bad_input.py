"""Whatever a source holds, it is text, or a counted trouble with file and place, or a refusal in one sentence."""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.__main__ import main
from tests.train.data_texts import COMPRESS, text, texts_of, write_as
from tests.train.test_data_sources import config_of, quiet
from train.data.prepare.one_source import prepare
from train.data.read.trouble import BAD

GOOD = [text(seed, 12) for seed in range(6)]


def line(value: object) -> bytes:
    return json.dumps({"text": value}).encode() + b"\n"


# what stands between good lines -> the reason, and what is said of it
BAD_LINES = {
    b'{"text": "half\n': ("not_json", "Unterminated string starting at at its character 9"),
    b"[" * 5000 + b"\n": ("not_json", None),
    b'{"text": ' + b"9" * 5000 + b"}\n": ("not_json", None),
    b"plain words\n": ("not_json", "Expecting value at its character 0"),
    b'{"text": NaN}\n': ("wrong_type", "text is a number"),
    b'{"body": "x"}\n': ("missing", "no text among body"),
    line(None): ("missing", "text is null"),
    line(["x"]): ("wrong_type", "text is a list"),
    line(3): ("wrong_type", "text is a number"),
    line({"a": 1}): ("wrong_type", "text is an object"),
    line(True): ("wrong_type", "text is true or false"),
    b'["text"]\n': ("wrong_type", "a list, not an object"),
    b'{"text": "\xff\xfe"}\n': ("undecodable", "invalid start byte at its byte 10"),
    b'{"text": "\\ud800"}\n': ("undecodable", "surrogates not allowed at its character 0"),
    line(""): ("empty", None),
    line(" \n"): ("empty", None),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_kept(tmp_path: Path, bad: bytes) -> None:
    reason, detail = BAD_LINES[bad]
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(GOOD[0]) + b"\n" + bad + b"".join(map(line, GOOD[1:])))
    config = config_of(path, tmp_path / "skip")
    meta = prepare(config, quiet)
    assert texts_of(config.folder) == {"a.jsonl": GOOD}
    assert {name: each.count for name, each in meta.skipped.items() if each.count} == {reason: 1}
    (said,) = meta.skipped[reason].examples
    assert said.startswith("a.jsonl, line 3")
    assert detail is None or said == f"a.jsonl, line 3 ({detail})"
    with pytest.raises(ValueError, match=r"a.jsonl, line 3.*data.on_bad_document=skip") as error:
        prepare(config_of(path, tmp_path / "refuse", on_bad_document="refuse"), quiet)
    assert "\n" not in str(error.value) and BAD[reason] in str(error.value)
    with pytest.raises(ValueError, match=f"passed over 1 documents or files .{BAD[reason]}: a.jsonl, line 3"):
        prepare(config_of(path, tmp_path / "skip", on_bad_document="refuse"), quiet)


def test_a_line_without_end_is_passed_over_and_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.read.blocks.BLOCK_BYTES", 100)
    monkeypatch.setattr("train.data.read.blocks.MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(GOOD[0]) + b"x" * 5000 + b"\n" + b"".join(map(line, GOOD[1:])) + b"y" * 3000)
    config = config_of(path, tmp_path / "t")
    meta = prepare(config, quiet)
    assert texts_of(config.folder) == {"a.jsonl": GOOD}
    assert meta.skipped["giant"].examples == ("a.jsonl, line 2", "a.jsonl, line 8")
    assert meta.report["skipped"] == {"giant": 2}


def test_a_mark_before_the_first_line_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(line(each).strip() for each in GOOD))
    config = config_of(path, tmp_path / "t")
    assert not prepare(config, quiet).report["skipped"]
    assert texts_of(config.folder) == {"a.jsonl": GOOD}


def table(path: Path, column: pa.Array, name: str = "text") -> None:
    pq.write_table(pa.table({name: column}), path)


def test_tables_without_text_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_as(source / "good.parquet", GOOD)
    table(source / "missing.parquet", pa.array(GOOD), "body")
    table(source / "numbers.parquet", pa.array([1, 2]))
    table(source / "lists.parquet", pa.array([["a"]]))
    table(source / "none.parquet", pa.array([], pa.string()))
    table(source / "nulls.parquet", pa.array([None, "", GOOD[0] * 2, None]))
    table(source / "bytes.parquet", pa.array([b"\xff", GOOD[1].encode() * 2]))
    (source / "words.parquet").write_text("no table")
    (source / "good.parquet.gz").write_bytes(gzip.compress((source / "good.parquet").read_bytes()))
    config = config_of(source, tmp_path / "t")
    meta = prepare(config, quiet)
    assert texts_of(config.folder) == {
        "good.parquet": GOOD, "nulls.parquet": [GOOD[0] * 2], "bytes.parquet": [GOOD[1] * 2]
    }  # fmt: skip
    said = {reason: each.examples for reason, each in meta.skipped.items() if each.count}
    assert said.pop("corrupt")[0].startswith("words.parquet (")
    assert said == {
        "missing": (
            "missing.parquet (no column text among body)", "nulls.parquet, row 0 (null)", "nulls.parquet, row 3 (null)"
        ),
        "wrong_type": (
            "lists.parquet (column text is list<element: string>)", "numbers.parquet (column text is int64)"
        ),
        "empty": ("none.parquet (no rows)", "nulls.parquet, row 1"),
        "undecodable": ("bytes.parquet, row 0 (invalid start byte at its byte 0)",),
        "unreadable": ("good.parquet.gz (Parquet has its own compression, and cannot be read through another)",),
    }  # fmt: skip
    for name, why in (("missing", "no column text among body"), ("numbers", "int64"), ("words", "damaged")):
        with pytest.raises(ValueError, match=rf"{name}.parquet.*{why}"):
            prepare(config_of(source / f"{name}.parquet", tmp_path / "r", on_bad_document="refuse"), quiet)


def test_a_damaged_row_group_takes_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_as(path, GOOD, row_group_size=2)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    content[column.dictionary_page_offset + 60] ^= 0x55
    path.write_bytes(content)
    config = config_of(path, tmp_path / "t")
    meta = prepare(config, quiet)
    assert texts_of(config.folder) == {"a.parquet": GOOD[:2] + GOOD[4:]}
    assert meta.skipped["corrupt"].examples[0].startswith("a.parquet, rows 2 to 3 (")
    with pytest.raises(ValueError, match=r"a.parquet, rows 2 to 3 .*: damaged; data.on_bad_document"):
        prepare(config_of(path, tmp_path / "r", on_bad_document="refuse"), quiet)


@pytest.mark.parametrize("compression", [each for each in COMPRESS if each])
@pytest.mark.parametrize("fault", ["cut", "checksum", "garbage"])
def test_damaged_compression_keeps_what_comes_before(
    tmp_path: Path, compression: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.read.blocks.BLOCK_BYTES", 256)
    random_ = random.Random(7)  # so incompressible that the first documents are out before the damage
    texts = [f"{number} " + "".join(random_.choices("abcdefghij klmnop", k=900)) for number in range(30)]
    body, half = b"".join(map(line, texts)), sum(len(line(each)) for each in texts[:15])
    first, second = COMPRESS[compression](body[:half]), bytearray(COMPRESS[compression](body[half:]))
    if fault == "cut":
        second = second[: len(second) // 2]
    elif fault == "checksum":
        second[-{".gz": 8, ".bz2": 4, ".xz": 30, ".zst": 2}[compression]] ^= 0xFF
    else:
        second[len(second) // 2 : len(second) // 2 + 200] = b"\xa5" * 200
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(first + second)
    config = config_of(path, tmp_path / "t", valid_fraction=0.1)
    meta = prepare(config, quiet)
    (found,) = texts_of(config.folder).values()
    assert found[:15] == texts[:15]
    assert meta.skipped["corrupt"].count == 1
    assert meta.skipped["corrupt"].examples[0].startswith(f"a.jsonl{compression}, line ")
    with pytest.raises(ValueError, match=r"a.jsonl.*, line \d+.*data.on_bad_document"):
        prepare(config_of(path, tmp_path / "r", on_bad_document="refuse"), quiet)


def test_text_in_damaged_compression_loses_its_last_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    content = os.urandom(40000).hex().encode()
    path.write_bytes(gzip.compress(content)[:20000])
    config = config_of(path, tmp_path / "t", max_document_bytes=1000)
    meta = prepare(config, quiet)
    found = "".join(texts_of(config.folder)["a.txt.gz"]).encode()
    assert content.startswith(found) and len(found) > 20000
    assert meta.skipped["corrupt"].examples[0].startswith(f"a.txt.gz, from byte {len(found)} (")


def test_files_that_change_after_they_were_listed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data.read import source as module

    source = tmp_path / "source"
    source.mkdir()
    names = ("a.jsonl", "b.parquet", "c.txt.gz", "d.txt", "e.txt", "gone.jsonl", "gone.parquet", "gone.txt")
    for number, name in enumerate(names):
        write_as(source / name, [f"{number}-{index}" for index in range(3)])
    listed = module.open_source(config_of(source, tmp_path / "t"))
    for name in ("a.jsonl", "b.parquet", "c.txt.gz"):
        write_as(source / name, [text(seed, 9) for seed in range(9)])
    content = (source / "d.txt").read_bytes()
    os.utime(source / "d.txt", ns=(1, 1))  # the same size, another time
    for name in ("gone.jsonl", "gone.parquet", "gone.txt"):
        (source / name).unlink()
    monkeypatch.setattr("train.data.prepare.one_source.open_source", lambda config: listed)
    config = config_of(source, tmp_path / "t", valid_fraction=0)
    meta = prepare(config, quiet)
    assert texts_of(config.folder) == {"e.txt": ["4-04-14-2"]}
    assert [each.split(" ")[0] for each in meta.skipped["changed"].examples] == list(names[:4])
    assert meta.skipped["changed"].examples[3] == "d.txt (written to)"
    assert meta.skipped["unreadable"].examples == tuple(f"{each} (No such file or directory)" for each in names[5:])
    with pytest.raises(ValueError, match=r"a.jsonl .*: changed since it was listed"):
        prepare(config_of(source, tmp_path / "r", on_bad_document="refuse"), quiet)
    assert content == (source / "d.txt").read_bytes()


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.read.blocks.BLOCK_BYTES", 64)
    for name in ("a.jsonl", "a.txt"):
        path = tmp_path / name
        write_as(path, GOOD * 50)
        from train.data.read.source import open_source

        blocks = list_then_write(open_source(config_of(path, tmp_path / "t", max_document_bytes=64)), path)
        assert [each.reason for block in blocks for each in block.troubles if each.reason != "cut"] == ["changed"]


def list_then_write(source: object, path: Path) -> list:  # type: ignore[type-arg]
    from train.data.read.blocks import Position

    blocks = []
    for number, block in enumerate(source.blocks(Position())):  # type: ignore[attr-defined]
        blocks.append(block)
        if number == 3:
            with path.open("ab") as stream:
                stream.write(b"more\n")
    return blocks


def test_the_command_ends_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(line(GOOD[0]) + b"{\n" + line(GOOD[1]))
    common = ["prepare", "data.source=a.jsonl", "data.dir=t", "data.num_workers=1", "data.valid_fraction=0.5"]
    assert main([*common, "data.on_bad_document=refuse"]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "a.jsonl, line 2 (Expecting property name enclosed in double quotes at its character 1): no JSON; "
        "data.on_bad_document=skip would count it and go on"
    ]
    assert main(common) == 0
    said = capsys.readouterr().out
    assert "no JSON, passed over: 1, a.jsonl, line 2" in said
    assert "source: 1 files, 2 documents" in said


def corrupted(content: bytes, random_: np.random.Generator) -> bytes:
    """Some bytes flipped, cut out, cut off or put in."""
    data = bytearray(content)
    for _ in range(int(random_.integers(1, 4))):
        place = int(random_.integers(0, max(1, len(data))))
        kind = random_.integers(0, 4)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << int(random_.integers(0, 8))
        elif kind == 1:
            del data[place : place + int(random_.integers(1, 50))]
        elif kind == 2:
            data[place:place] = random_.bytes(int(random_.integers(1, 50)))
        elif random_.random() < 0.3:
            del data[place:]
    return bytes(data)


NAMES = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.jsonl.zst", "e.txt.bz2", "f.jsonl.xz")


def attack(folder: Path, seed: int) -> None:
    """Corrupt one file of several at random: no traceback, untouched files and untouched lines are all there."""
    random_ = np.random.default_rng(seed)
    source = folder / "source"
    source.mkdir(parents=True)
    texts = {name: [f"{name} {number} {text(seed + number, 12)}" for number in range(12)] for name in NAMES}
    for name, each in texts.items():
        write_as(source / name, each[:1] if ".txt" in name else each)
    victim = NAMES[int(random_.integers(0, len(NAMES)))]
    before = (source / victim).read_bytes()
    after = corrupted(before, random_)
    (source / victim).write_bytes(after)
    config = config_of(source, folder / "tokens", vocab_size=257)
    meta = prepare(config, quiet)
    found = texts_of(config.folder)
    for name, each in texts.items():
        if name != victim:
            assert found[name] == (each[:1] if ".txt" in name else each), (seed, name)
    if victim == "a.jsonl":
        intact = set(before.splitlines()) & set(after.splitlines())
        assert {json.loads(each)["text"] for each in intact} <= set(found.get(victim, [])), seed
    try:
        prepare(config_of(source, folder / "refuse", vocab_size=257, on_bad_document="refuse"), quiet)
    except ValueError as error:
        assert str(error).startswith(victim) and "\n" not in str(error), seed
    else:
        assert not meta.report["skipped"], seed


@pytest.mark.parametrize("seed", range(25))
def test_random_damage_never_ends_in_a_traceback(tmp_path: Path, seed: int) -> None:
    attack(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_much_random_damage_never_ends_in_a_traceback(tmp_path: Path, block: int) -> None:
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        attack(tmp_path / str(seed), seed)
