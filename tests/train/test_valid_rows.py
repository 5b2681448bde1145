"""Which sequences an evaluation reads: evenly over every source, each once, a blend's by weight."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.texts import write_library
from train.data.config import BlendSource, DataConfig, ValidSource
from train.data.prepare.all_sources import prepare_sources
from train.data.rows.tokens import Tokens
from train.data.rows.valid import Portion, Validation, open_validation
from train.evaluate import counts, metrics_of

SEQ_LEN = 16


def portion_of(num_rows: int, num_sequences: int, name: str = "a") -> Portion:
    """Without any text behind it."""
    tokens = SimpleNamespace(meta=SimpleNamespace(tokenizer_digest=""))
    return Portion(name, SimpleNamespace(num_rows=num_rows, tokens=tokens), num_sequences)  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.integers(1, 300))
def test_sequences_lie_evenly(num_rows: int, num_sequences: int) -> None:
    num_sequences = min(num_rows, num_sequences)
    portion = portion_of(num_rows, num_sequences)
    rows = [portion.row(number) for number in range(num_sequences)]
    gaps = {b - a for a, b in zip(rows, [*rows[1:], num_rows], strict=True)}
    assert rows[0] == 0 and gaps <= {num_rows // num_sequences, -(-num_rows // num_sequences)}


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=5))
def test_portions_follow_each_other(sizes: list[tuple[int, int]]) -> None:
    portions = [portion_of(rows, min(rows, count), str(place)) for place, (rows, count) in enumerate(sizes)]
    validation = Validation(portions)
    found = [validation.at(number) for number in range(validation.num_sequences)]
    assert found == [(each, each.row(number)) for each in portions for number in range(each.num_sequences)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A blend of two libraries, and two texts that are only evaluated on."""
    folder = tmp_path_factory.mktemp("texts")
    sources = [write_library(folder / name, seed=seed, num_files=4) for seed, name in enumerate(("one", "two"))]
    (folder / "book.txt").write_text("A line of a book that nobody trains on.\n" * 200)
    (folder / "web.jsonl").write_text('{"body": "some words of a page"}\n' * 60)
    blend = [BlendSource(each.name, weight, str(each)) for each, weight in zip(sources, (0.9, 0.1), strict=True)]
    own = [
        ValidSource("book", str(folder / "book.txt")),
        ValidSource("web", str(folder / "web.jsonl"), {"text_field": "body"}),
    ]
    config = DataConfig(
        dir=str(folder / "tokens"), blend=tuple(blend), valid_sources=tuple(own), vocab_size=300, valid_fraction=0.3,
        suffixes=(".py",), max_document_bytes=256, num_workers=1, fim_rate=0.5,
    )  # fmt: skip
    found = prepare_sources(config, lambda line: None)
    assert list(found) == ["one", "two", "book", "web"]
    return config


def test_own_sources_are_prepared_whole(config: DataConfig) -> None:
    for name, source in config.evaluated.items():
        tokens = Tokens.open(source.folder, "valid")
        assert tokens.meta.splits["train"].num_documents == 0 and tokens.num_documents >= 30, name
        assert Path(source.folder).parent == Path(f"{config.folder}-valid")
        # Nothing of the run's own text holds for another one.
        assert (source.suffixes, source.fim_rate) == ((), 0.0)
    digests = {Tokens.open(each.folder, "valid").meta.tokenizer_digest for each in config.evaluated.values()}
    assert digests == {Tokens.open(config.sources["one"].folder, "train").meta.tokenizer_digest}


def test_a_blend_gives_sequences_by_weight_and_own_sources_as_many_each(config: DataConfig) -> None:
    taken = {each.name: each for each in open_validation(config, SEQ_LEN, 20).portions}
    assert list(taken) == ["one", "two", "book", "web"] and all(each.is_reported for each in taken.values())
    assert [each.in_mean for each in taken.values()] == [True, True, False, False]
    assert taken["one"].num_sequences in (17, 18, 19) and taken["two"].num_sequences == 20 - taken["one"].num_sequences
    assert taken["book"].num_sequences == taken["web"].num_sequences == 20
    # None is left out for its weight.
    assert [each.num_sequences for each in open_validation(config, SEQ_LEN, 1).portions] == [1, 1, 1, 1]
    whole = open_validation(config, SEQ_LEN, None).portions
    assert [each.num_sequences for each in whole] == [each.rows.num_rows for each in whole]


def test_a_sequence_counts_for_its_source_and_for_the_mean_of_the_split(config: DataConfig) -> None:
    validation = open_validation(config, SEQ_LEN, 20)
    seen: dict[str, int] = {}
    for number in range(validation.num_sequences):
        portion, row = validation.at(number)
        sequence = validation.sequence(number)
        assert torch.equal(sequence, portion.rows.rows(row, 1)) and sequence.shape == (1, SEQ_LEN + 1)
        for name in metrics_of(validation, number):
            seen[name] = seen.get(name, 0) + SEQ_LEN
    divided = counts(validation)
    assert seen.pop("valid/loss") == divided["targets"] == 20 * SEQ_LEN
    assert {f"targets of {name.split('/')[1]}": count for name, count in seen.items()} == {
        key: count for key, count in divided.items() if key != "targets"
    }


def test_without_a_split_own_sources_are_the_mean(config: DataConfig) -> None:
    from dataclasses import replace

    alone = replace(config, valid_fraction=0.0)
    validation = open_validation(alone, SEQ_LEN, 4)
    assert [(each.name, each.in_mean) for each in validation.portions] == [("book", True), ("web", True)]
    assert alone.valid_names == ("book", "web") and validation.num_targets == 8 * SEQ_LEN
    assert validation.unigram_entropy_nats is None


def test_what_is_trained_on_does_not_validate(config: DataConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    library = Path(config.blend[0].source or "")
    (tmp_path / "link").symlink_to(library)
    for source in (library, sorted(library.iterdir())[0], tmp_path / "link"):
        shared = replace(config, valid_sources=(ValidSource("held", str(source)),))
        with pytest.raises(ValueError, match=r"data.valid_sources: .* of held is trained on, as a file of one"):
            prepare_sources(shared, lambda line: None)


def test_a_moved_tokenizer_is_seen(config: DataConfig) -> None:
    portions: list[Any] = list(open_validation(config, SEQ_LEN, 2).portions)
    other = portion_of(3, 1)
    other.rows.tokens.folder = "elsewhere"
    with pytest.raises(ValueError, match=r"several tokenizers: prepare it again .*elsewhere"):
        Validation([*portions, other])
