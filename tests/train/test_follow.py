"""Where branches go on in their sources: through changed blends, lengths of rows, seeds, and text that has grown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import text, write_folder
from train.data.config import BlendSource, DataConfig
from train.data.past import Reading
from train.data.prepare.all_sources import prepare_sources
from train.data.rows.blend import Blend, OneSource, Stream, open_stream

SEQ_LEN = 16


def quiet(line: str) -> None:
    """Prepare without words."""


def blend_of(folder: Path, weights: dict[str, float]) -> DataConfig:
    """A blend of folders of text beside `folder`, with the tokenizer there."""
    sources = tuple(BlendSource(name, weight, str(folder / f"text-{name}")) for name, weight in weights.items())
    return DataConfig(
        blend=sources, dir=str(folder / "tokens"), tokenizer=str(folder / "tokenizer.json"), vocab_size=300,
        valid_fraction=0.3, shard_tokens=500, num_workers=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("follow")
    for index, name in enumerate("abc"):
        write_folder(root / f"text-{name}", 12 + 9 * index, seed=index)
    one = DataConfig(source=str(root / "text-a"), dir=str(root / "one"), vocab_size=300, num_workers=1)
    prepare_sources(one, quiet)
    (root / "tokenizer.json").write_bytes((root / "one" / "tokenizer.json").read_bytes())
    prepare_sources(blend_of(root, {"a": 1.0, "b": 1.0, "c": 1.0}), quiet)
    return root


def stream_of(config: DataConfig, past: list[Reading], seq_len: int = SEQ_LEN, seed: int = 1) -> Stream:
    return open_stream(config, "train", seq_len, seed, past=past)


def left_at(stream: Stream, until: int, past: list[Reading], seq_len: int = SEQ_LEN, seed: int = 1) -> list[Reading]:
    """What a branch is told that leaves this run at a position."""
    return [*past, Reading(until, seq_len, seed, stream.followed.sources)]


def places(stream: Stream, first: int, count: int) -> list[tuple[str, int]]:
    """(source, number of the row in it) of each position."""
    if isinstance(stream, Blend):
        return [(name, stream.sources[name].indices(index, 1)[0]) for name, index in stream._places(first, count)]
    assert isinstance(stream, OneSource)
    name = stream.followed.sources[0].name
    return [(name, row) for row in stream._source.indices(first + stream._ahead, count)]


def unread(stream: Stream, name: str, seq_len: int, seen: set[int]) -> list[int]:
    """The rows of a source of a blend none of whose tokens have been seen."""
    assert isinstance(stream, Blend)
    num_rows = stream.sources[name].num_rows
    hit = {token // seq_len for token in seen}
    return [row for row in range(num_rows) if row not in hit]


CHAINS = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 3.0]), min_size=1),
        st.sampled_from([SEQ_LEN, SEQ_LEN, 7, 40]),
        st.sampled_from([1, 1, 2]),
        st.integers(1, 60),
    ),
    min_size=2,
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(chain=CHAINS)
def test_no_source_is_read_twice_within_an_epoch(
    folder: Path, chain: list[tuple[dict[str, float], int, int, int]]
) -> None:
    """Through blends that change, sources that are left and come back, other lengths of rows and other seeds."""
    past: list[Reading] = []
    position = 0
    read: dict[str, set[int]] = {}
    for weights, seq_len, seed, count in chain:
        stream = stream_of(blend_of(folder, weights), past, seq_len, seed)
        counted = dict.fromkeys(weights, 0)
        for name, row in places(stream, position, count):
            seen = read.setdefault(name, set())
            tokens = set(range(row * seq_len, (row + 1) * seq_len))
            if not seen.isdisjoint(tokens):  # only a new epoch may
                assert not unread(stream, name, seq_len, seen)
                seen.clear()
            seen |= tokens
            if not unread(stream, name, seq_len, seen):  # here, and not where another cut would, this epoch ends
                seen.clear()
            counted[name] += 1
        total = sum(weights.values())
        for name, weight in weights.items():
            assert abs(counted[name] - count * weight / total) <= 2 * 2  # each end of the stretch within 2 of its share
        position += count
        past = left_at(stream, position, past, seq_len, seed)
        again = stream_of(blend_of(folder, weights), past, seq_len, seed)
        straight = stream.rows(position, 30)
        assert torch.equal(again.rows(position, 30), straight), "a branch that changes nothing reads on"
        assert again.num_targets(position, 30) == stream.num_targets(position, 30)


def test_a_source_goes_on_under_other_weights_and_a_new_one_begins(folder: Path) -> None:
    root = stream_of(blend_of(folder, {"a": 1.0, "b": 3.0}), [])
    own = {name: [row for each, row in places(root, 0, 200) if each == name] for name in "ab"}
    past = left_at(root, 24, [])
    read = {name: sum(each == name for each, _ in places(root, 0, 24)) for name in "ab"}
    branch = stream_of(blend_of(folder, {"a": 2.0, "b": 1.0, "c": 1.0}), past)
    found = places(branch, 24, 60)
    for name in "ab":
        rows = [row for each, row in found if each == name]
        assert rows == own[name][read[name] :][: len(rows)]
    fresh = stream_of(blend_of(folder, {"c": 1.0}), [])
    rows = [row for each, row in found if each == "c"]
    assert rows == [row for _, row in places(fresh, 0, len(rows))]
    assert any(line.startswith("c: new, ") for line in branch.followed.sentences())
    assert sum("goes on at row" in line for line in branch.followed.sentences()) == 2


def grown(folder: Path, into: Path, **other: object) -> DataConfig:
    """The text of `folder` with some documents more behind it, to be prepared in `into`."""
    source = into / "text"
    for path in sorted((folder / "text-b").rglob("*.txt")):
        copy = source / path.relative_to(folder / "text-b")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    values = {"source": str(source), "dir": str(into / "tokens"), "tokenizer": str(folder / "tokenizer.json")}
    shared = {"vocab_size": 300, "valid_fraction": 0.3, "shard_tokens": 500, "num_workers": 1}
    return DataConfig(**{**values, **shared, **other})


def test_appended_documents_are_read_with_what_is_left(folder: Path, tmp_path: Path) -> None:
    config = grown(folder, tmp_path)
    prepare_sources(config, quiet)
    root = stream_of(config, [])
    past = left_at(root, 10, [])
    read = {row for _, row in places(root, 0, 10)}
    for index in range(9):
        (tmp_path / "text" / f"zz-{index}.txt").write_text(text(900 + index, 80))
    more = dataclasses.replace(config, dir=str(tmp_path / "more"))
    prepare_sources(more, quiet)
    branch = stream_of(more, past)
    rows = [row for _, row in places(branch, 10, branch.num_rows - 10)]
    assert len(set(rows)) == len(rows) and read.isdisjoint(rows)
    assert {*rows, *read} == set(range(branch.num_rows))
    (said,) = branch.followed.sentences()
    num_new = branch.followed.sources[0].num_tokens - root.followed.sources[0].num_tokens
    assert num_new > 100 and f"{num_new:,} new tokens behind the" in said
    # Elsewhere under another name the same tokens are the same source.
    (tmp_path / "renamed").symlink_to(tmp_path / "text")
    renamed = dataclasses.replace(more, source=str(tmp_path / "renamed"), dir=str(tmp_path / "again"))
    prepare_sources(renamed, quiet)
    assert torch.equal(stream_of(renamed, past).rows(10, 40), branch.rows(10, 40))


def test_other_text_is_said_and_another_tokenizer_refused(folder: Path, tmp_path: Path) -> None:
    config = grown(folder, tmp_path)
    prepare_sources(config, quiet)
    root = stream_of(config, [])
    past = left_at(root, 10, [])
    first = min((tmp_path / "text").rglob("*.txt"))
    first.write_text("changed " + first.read_text())
    changed = dataclasses.replace(config, dir=str(tmp_path / "changed"))
    prepare_sources(changed, quiet)
    branch = stream_of(changed, past)
    (said,) = branch.followed.sentences()
    assert f"up to {10 * SEQ_LEN:,} tokens may be seen again" in said
    assert places(branch, 10, 5) == places(stream_of(changed, []), 0, 5)
    other = dataclasses.replace(config, dir=str(tmp_path / "other"), tokenizer=None, vocab_size=290)
    prepare_sources(other, quiet)
    with pytest.raises(ValueError, match=rf"another tokenizer .*data.tokenizer={tmp_path}/tokens/tokenizer.json"):
        stream_of(other, past)


def test_one_source_becomes_a_blend_and_one_again(folder: Path) -> None:
    blend = blend_of(folder, {"b": 1.0, "c": 1.0})
    one = dataclasses.replace(blend.sources["b"], dir=str(folder / "tokens" / "b"))
    root = stream_of(one, [])
    past = left_at(root, 20, [])
    read = {row for _, row in places(root, 0, 20)}
    second = stream_of(blend, past)
    now = [row for name, row in places(second, 20, 30) if name == "b"]
    assert read.isdisjoint(now)  # though in another order, as sources of a blend are shuffled apart
    past = left_at(second, 50, past)
    third = stream_of(one, past)
    assert {*read, *now}.isdisjoint(row for _, row in places(third, 50, 20))
    assert "c: read no more, after" in " ".join(third.followed.sentences())
