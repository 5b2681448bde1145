"""Every format gives its documents, in order, with their places, whoever reads them."""

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.__main__ import main
from tests.train.data_texts import COMPRESS, all_bytes, text, texts_of, write_as, write_mixture
from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
from train.data.read.blocks import Position
from train.data.read.documents import Document, documents
from train.data.read.source import open_source, walk
from train.data.rows.tokens import Tokens


def quiet(line: str) -> None:
    """Prepare without words."""


def config_of(source: Path | str, folder: Path, **settings: object) -> DataConfig:
    values = {"vocab_size": 300, "valid_fraction": 0.3, "shard_tokens": 400, "num_workers": 1}
    return DataConfig(**{"source": str(source), "dir": str(folder), **values, **settings})


def read(config: DataConfig, at: Position = Position()) -> list[Document]:  # noqa: B008
    """All documents of a source from a position on."""
    found = [
        each
        for block in walk(open_source(config), at)
        for each in documents(block, config.text_field, config.max_document_bytes)
    ]
    return [each for each in found if isinstance(each, Document)]


def test_a_folder_may_hold_every_format(tmp_path: Path) -> None:
    written = write_mixture(tmp_path / "mixture")
    config = config_of(tmp_path / "mixture", tmp_path / "tokens")
    meta = prepare(config, quiet)
    assert texts_of(config.folder) == written
    assert sum(each.count for each in meta.skipped.values()) == 0
    assert meta.report["documents"] == sum(map(len, written.values()))
    assert meta.report["bytes"] == sum(len(each.encode()) for texts in written.values() for each in texts)


def test_the_bytes_are_the_same_for_any_number_of_workers_and_size_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixture(tmp_path / "mixture")
    results = []
    for workers, task_bytes, block_bytes in ((1, 1 << 20, 1 << 20), (2, 700, 64), (3, 3000, 500)):
        monkeypatch.setattr("train.data.prepare.one_source._TASK_BYTES", task_bytes)
        monkeypatch.setattr("train.data.read.blocks.BLOCK_BYTES", block_bytes)
        monkeypatch.setattr("train.data.read.tables.BLOCK_BYTES", block_bytes)
        config = config_of(
            tmp_path / "mixture", tmp_path / str(workers), num_workers=workers, deduplicate=True, max_document_bytes=90
        )
        prepare(config, quiet)
        results.append(all_bytes(config.folder))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("seed", range(3))
def test_reading_goes_on_from_any_block(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positions that the journal holds: whatever lies behind one is read as if nobody had stopped there."""
    random_ = random.Random(seed)
    for module in ("blocks", "tables"):
        monkeypatch.setattr(f"train.data.read.{module}.BLOCK_BYTES", random_.randint(40, 400))
    write_mixture(tmp_path / "mixture", seed)
    config = config_of(tmp_path / "mixture", tmp_path / "tokens", max_document_bytes=random_.randint(64, 300))
    whole, done = read(config), 0
    for block in walk(open_source(config), Position()):
        assert read(config, block.at) == whole[done:]
        found = documents(block, config.text_field, config.max_document_bytes)
        done += sum(isinstance(each, Document) for each in found)
        assert read(config, block.next) == whole[done:]
    assert done == len(whole)


def test_places_lead_back_to_the_text(tmp_path: Path) -> None:
    source = tmp_path / "mixture"
    source.mkdir()
    texts = [text(seed, 30) for seed in range(9)]
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        write_as(source / name, texts)
    lines = (source / "b.jsonl").read_bytes()
    for document in read(config_of(source, tmp_path / "t")):
        if document.file == 0:
            assert (source / "a.txt").read_bytes()[document.start : document.stop] == document.data
        elif document.file == 1:
            assert json.loads(lines[document.start : document.stop])["text"] == document.text
        else:
            assert texts[document.start] == document.text and document.stop == document.start + 1


def test_long_texts_of_lines_and_rows_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = ["海" * 100, "short", "line\n" * 40]
    for name in ("a.jsonl", "b.parquet"):
        write_as(source / name, texts)
    config = config_of(source, tmp_path / "t", max_document_bytes=64)
    meta = prepare(config, quiet)
    for found in texts_of(config.folder).values():
        assert "".join(found) == "".join(texts)
        assert max(len(each.encode()) for each in found) <= 64
    assert meta.skipped["cut"].examples[0] == "a.jsonl, line 1 (300 bytes, into 5 documents)"
    assert meta.skipped["cut"].examples[2].startswith("b.parquet, row 0 (300 bytes")


def test_other_fields_columns_and_formats_can_be_named(tmp_path: Path) -> None:
    texts = [text(seed, 10) for seed in range(8)]
    write_as(tmp_path / "lines.jsonl", texts, field="body")
    (tmp_path / "lines.jsonl").rename(tmp_path / "lines.json")
    config = config_of(tmp_path / "lines.json", tmp_path / "a", format="jsonl", text_field="body")
    prepare(config, quiet)
    assert texts_of(config.folder) == {"lines.json": texts}
    write_as(tmp_path / "table.parquet", texts, field="body")
    config = config_of(tmp_path / "table.parquet", tmp_path / "b", text_field="body")
    prepare(config, quiet)
    assert texts_of(config.folder) == {"table.parquet": texts}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [text(seed, 10) for seed in range(8)]
    values = [each.encode() for each in texts] if pa.types.is_binary(kind) else texts
    pq.write_table(pa.table({"text": pa.array(values).cast(kind)}), tmp_path / "a.parquet", row_group_size=3)
    assert [each.text for each in read(config_of(tmp_path / "a.parquet", tmp_path / "t"))] == texts


def test_several_members_and_frames_are_one_file(tmp_path: Path) -> None:
    for compression, compress in COMPRESS.items():
        if compression:
            path = tmp_path / f"a.txt{compression}"
            path.write_bytes(compress(b"first ") + compress(b"second"))
            assert [each.text for each in read(config_of(path, tmp_path / "t"))] == ["first second"]


def test_saved_data_sets_and_builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [text(seed, 12) for seed in range(12)]
    whole = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict({"train": whole, "test": whole.select(range(4))}).save_to_disk(str(tmp_path / "saved"))
    whole.save_to_disk(str(tmp_path / "single"))
    write_as(tmp_path / "a.jsonl", texts)
    for number, (source, more, expected) in enumerate(
        (
            (tmp_path / "saved", {}, texts),
            (f"datasets:{tmp_path / 'saved'}", {"dataset_split": "test"}, texts[:4]),
            (tmp_path / "single", {}, texts),
            ("datasets:json", {"dataset_files": (str(tmp_path / "a.jsonl"),)}, texts),
            ("datasets:json", {"dataset_files": (str(tmp_path / "a.jsonl"),), "dataset_split": "train[:5]"}, texts[:5]),
        )
    ):
        config = config_of(source, tmp_path / str(number), **more)
        meta = prepare(config, quiet)
        (found,) = texts_of(config.folder).values()
        assert found == expected
        assert prepare(config, quiet) == meta


def test_what_is_no_data_set_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [1, 2]})}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"te')
    datasets.Dataset.from_dict({"text": ["word"] * 999}).save_to_disk(str(tmp_path / "cut"))
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:3000])
    for source, more, why in (
        (tmp_path / "saved", {"dataset_split": "dev"}, "data.dataset_split=dev: its splits are train"),
        (tmp_path / "saved", {}, "data.text_field=text: column text is int64"),
        (tmp_path / "saved", {"text_field": "body"}, "data.text_field=body: no column body among text"),
        ("datasets:json", {"dataset_files": (str(tmp_path / "a.jsonl"),)}, "cannot be loaded"),
        (tmp_path / "cut", {}, "cannot be loaded"),
        ("datasets:json", {"dataset_files": (str(tmp_path / "none.jsonl"),)}, "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=why) as error:
            prepare(config_of(source, tmp_path / "t", **more), quiet)
        assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_without_a_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "data.source=datasets:nobody/nothing", "data.dir=t"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("data.source=datasets:nobody/nothing cannot be loaded with data.dataset_split=train")


def test_giant_files_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading holds a few blocks, not the file."""
    monkeypatch.setattr("train.data.read.blocks.BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr("train.data.read.tables.BLOCK_BYTES", 1 << 14)
    texts = [f"{number} {'tide ' * 400}" for number in range(4000)]  # 8 MB
    for name in ("a.txt.gz", "b.jsonl", "c.parquet", "d.txt"):
        write_as(tmp_path / name, texts, row_group_size=10**6)
        config = config_of(tmp_path / name, tmp_path / "t", max_document_bytes=4096)
        tracemalloc.start()
        num_bytes = 0
        for block in walk(open_source(config), Position()):
            num_bytes += sum(len(each.data) for each in documents(block, "text", 4096) if isinstance(each, Document))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_bytes == sum(map(len, texts))
        assert peak < 2 << 20, (name, peak)


def test_duplicates_are_counted_and_left_out_when_asked(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    once, twice = [text(seed, 15) for seed in range(10)], [text(seed, 15) for seed in range(100, 104)]
    write_as(source / "a.jsonl", once + twice[:2])
    write_as(source / "b.parquet", twice + once[3:5] + twice[3:])
    (source / "c.txt").write_bytes(once[0].encode())
    kept = config_of(source, tmp_path / "kept")
    assert prepare(kept, quiet).report["duplicates"] == 6
    assert sum(map(len, texts_of(kept.folder).values())) == 20
    for workers in (1, 2):
        config = config_of(source, tmp_path / str(workers), deduplicate=True, num_workers=workers)
        meta = prepare(config, quiet)
        assert texts_of(config.folder) == {"a.jsonl": once + twice[:2], "b.parquet": twice[2:]}
        assert meta.report["duplicates"] == 6
        assert meta.report["documents"] == 14
        assert meta.skipped["duplicate"].examples[-1] == "c.txt"


def test_the_report_is_that_of_the_slow_twin(tmp_path: Path) -> None:
    write_mixture(tmp_path / "mixture", num_documents=30)
    (tmp_path / "mixture" / "z.jsonl").write_text('{"text": 3}\n')
    config = config_of(tmp_path / "mixture", tmp_path / "tokens")
    meta = prepare(config, quiet)
    report = json.loads((config.folder / "report.json").read_text())
    assert report == meta.report
    lengths = []
    for split in ("train", "valid"):
        tokens = Tokens.open(config.folder, split)
        lengths += [each.stop_token - each.first_token - 1 for each in tokens.documents(0, tokens.num_tokens)]
    lengths.sort()
    assert report["files"] == 17 and report["skipped"] == {"wrong_type": 1}
    assert report["tokens"] == sum(lengths) + len(lengths)
    assert report["bytes_per_token"] == report["bytes"] / report["tokens"]
    found = report["document_tokens"]
    assert (found["least"], found["most"]) == (lengths[0], lengths[-1])
    assert found["mean"] == sum(lengths) / len(lengths)
    for share in (1, 5, 25, 50, 75, 95, 99):
        least = next(each for each in lengths if 100 * sum(o <= each for o in lengths) >= share * len(lengths))
        assert found[f"p{share}"] == least
    for octave, count in found["histogram"].items():
        assert count == sum(int(octave) <= each < 2 * int(octave) for each in lengths)
    assert sum(found["histogram"].values()) == len(lengths)


def test_a_library_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.zst"
    write_as(path, ["salt"])
    monkeypatch.setattr("train.data.read.streams.zstandard", None)
    with pytest.raises(ValueError, match=r"holds no text: its documents are 1 could not be read, as in a.txt.zst"):
        prepare(config_of(path, tmp_path / "t"), quiet)
    with pytest.raises(ValueError, match=r"a.txt.zst \(reading .zst needs the package zstandard\)"):
        prepare(config_of(path, tmp_path / "t", on_bad_document="refuse"), quiet)


def test_the_bytes_of_a_stream_do_not_depend_on_the_size_of_reads(tmp_path: Path) -> None:
    content = os.urandom(30000).hex()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    config = config_of(tmp_path / "a.txt.gz", tmp_path / "t", max_document_bytes=777)
    assert "".join(each.text for each in read(config)) == content
