"""Blends: exact shares at every prefix, no state, fresh epochs, and refusals in a sentence."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import write_folder
from train.data.config import BlendSource, DataConfig
from train.data.prepare.all_sources import prepare_sources
from train.data.rows.blend import Blend, OneSource, Stream, check_epochs, exposure_table, open_stream, seed_of
from train.data.rows.epochs import Rows
from train.data.rows.shares import Shares
from train.data.rows.tokens import Tokens
from train.job import Job
from train.recipe.config import BatchRampConfig, LrSchedulerConfig, MoeConfig, MtpConfig, TrainConfig
from train.recipe.recipe import Recipe

WEIGHTS = st.lists(
    st.integers(1, 10**6).map(lambda n: n / 1000) | st.integers(1, 20).map(float), min_size=1, max_size=9
)
# The sum of the reciprocals of the Fibonacci numbers: what Shares promises for any number of sources.
BOUND = 3.3599


def quiet(line: str) -> None:
    """Prepare without words."""


def named(weights: list[float]) -> dict[str, float]:
    return {f"s{index}": weight for index, weight in enumerate(weights)}


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, seed=st.integers(0, 2**40), length=st.integers(1, 400))
def test_every_prefix_has_its_shares(weights: list[float], seed: int, length: int) -> None:
    shares = Shares(named(weights), seed)
    bound = {1: 0.0, 2: 1.0, 3: 2.0}.get(len(weights), BOUND)
    counts = dict.fromkeys(shares.weights, 0)
    for position in range(length):
        name, index = shares.at(position)
        assert index == counts[name]  # the slow twin counts from zero
        counts[name] += 1
        assert shares.counts(position + 1) == counts
        for each, weight in shares.weights.items():
            assert abs(counts[each] - weight * (position + 1)) <= bound
    assert math.isclose(sum(shares.weights.values()), 1.0)


@settings(deadline=None, max_examples=100)
@given(weights=WEIGHTS, seed=st.integers(0, 99), position=st.integers(0, 10**15))
def test_far_positions_cost_no_loop(weights: list[float], seed: int, position: int) -> None:
    shares = Shares(named(weights), seed)
    name, index = shares.at(position)
    before, after = shares.counts(position), shares.counts(position + 1)
    assert (before[name], after[name]) == (index, index + 1)
    for each, weight in shares.weights.items():
        assert abs(before[each] - weight * position) <= BOUND
        assert (after[each] > before[each]) == (each == name)


def test_the_order_of_sources_is_no_part_of_a_blend() -> None:
    one, other = Shares({"a": 0.3, "b": 0.3, "c": 0.4}, 7), Shares({"c": 4, "b": 3, "a": 3}, 7)
    assert [one.at(i) for i in range(500)] == [other.at(i) for i in range(500)]


@pytest.mark.parametrize("weights", [[1, 1], [1, 3], [2, 3, 5], [1, 1, 1, 1]])
def test_no_position_of_a_batch_keeps_to_one_source(weights: list[float]) -> None:
    """Each source has its share of every 2nd, 3rd, ... 16th position (6 sigma over independent draws)."""
    num_positions = 6000
    shares = Shares(named(weights), 1)
    names = np.array([shares.at(position)[0] for position in range(num_positions)])
    for stride in (2, 3, 4, 5, 8, 16):
        for offset in range(stride):
            picked = names[offset::stride]
            for name, weight in shares.weights.items():
                p = float(weight)
                assert abs((picked == name).mean() - p) < 6 * math.sqrt(p * (1 - p) / len(picked))
    other = Shares(named(weights), 2)
    assert [other.at(position)[0] for position in range(100)] != names[:100].tolist()


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("blend")
    for index, name in enumerate(("web", "code", "math")):
        write_folder(folder / name, num_documents=12 + 6 * index, seed=index)
    sources = (
        BlendSource("web", 0.6, str(folder / "web")),
        BlendSource("code", 0.3, str(folder / "code"), {"fim_rate": 0.5}),
        BlendSource("math", 0.1, str(folder / "math"), {"suffixes": [".txt"]}),
    )
    config = DataConfig(dir=str(folder / "t"), blend=sources, vocab_size=320, valid_fraction=0.3, num_workers=1)
    prepare_sources(config, quiet)
    return config


def slow_row(config: DataConfig, seq_len: int, seed: int, position: int, order: str) -> torch.Tensor:
    """The twin: count the sources' positions from the first one on, open each by itself."""
    weights = {each.name: each.weight for each in config.blend}
    shares, counts = Shares(weights, seed), dict.fromkeys(weights, 0)
    name = ""
    for each in range(position + 1):
        name = shares.at(each)[0]
        counts[name] += 1
    tokens = Tokens.open(config.sources[name].folder, "train")
    return Rows(tokens, seq_len, seed_of(seed, name), order).rows(counts[name] - 1, 1)[0]


@settings(deadline=None, max_examples=15)
@given(
    seq_len=st.integers(1, 60), seed=st.integers(0, 2**40), first=st.integers(0, 500), mask=st.booleans(),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4), order=st.sampled_from(["shuffled", "sequential"]),
)  # fmt: skip
def test_blended_rows_are_a_function_of_the_position(
    blend: DataConfig, seq_len: int, seed: int, first: int, mask: bool, counts: list[int], order: str
) -> None:
    config = dataclasses.replace(blend, document_mask=mask)
    stream = open_stream(config, "train", seq_len, seed, order)
    whole = stream.rows(first, sum(counts))
    assert (whole.dtype, tuple(whole.shape)) == (torch.int64, (sum(counts), seq_len + 1))
    position, num_targets = first, 0
    for count in counts:
        part = open_stream(config, "train", seq_len, seed, order).rows(position, count)
        assert torch.equal(part, whole[position - first : position - first + count])
        num_targets += stream.num_targets(position, count)
        position += count
    # The slow twin of the count: a target behind an end of a document is another document's.
    ends = (whole[:, :-1] == stream.end_of_document).sum().item() if mask else 0
    assert num_targets == stream.num_targets(first, sum(counts)) == sum(counts) * seq_len - ends
    if sum(counts):
        assert torch.equal(whole[-1], slow_row(config, seq_len, seed, position - 1, order))


@settings(deadline=None, max_examples=25)
@given(
    dp=st.integers(1, 6), micro_batch=st.integers(1, 4), per_rank=st.integers(1, 4), jumps=st.integers(0, 3),
    ramp_tokens=st.integers(1, 4000), seq_len=st.integers(2, 40), seed=st.integers(0, 99), blended=st.booleans(),
    mask=st.booleans(), steps=st.lists(st.integers(0, 60), min_size=1, max_size=3),
)  # fmt: skip
def test_a_batch_is_a_function_of_seed_and_step_under_any_topology(
    blend: DataConfig, dp: int, micro_batch: int, per_rank: int, jumps: int, ramp_tokens: int, seq_len: int, seed: int,
    blended: bool, mask: bool, steps: list[int],
) -> None:  # fmt: skip
    """Ramps, epochs and blends: what the ranks read of a step, dealt out in any way and in any order of the steps."""
    quantum = dp * micro_batch
    final = quantum * (per_rank + jumps)
    ramp = BatchRampConfig(quantum * per_rank, ramp_tokens, quantum) if jumps else BatchRampConfig()
    train = TrainConfig(seq_len, micro_batch, final, max_steps=61, seed=seed, batch_ramp=ramp)
    schedule = Recipe(train, LrSchedulerConfig(), MoeConfig(), MtpConfig())
    config = dataclasses.replace(blend if blended else blend.sources["web"], document_mask=mask)
    for step in steps:
        plan = schedule.at(step)
        stream = open_stream(config, "train", seq_len, seed)  # as after a resume
        before = sum(schedule.at(each).num_sequences for each in range(step))
        assert plan.first_sequence == before
        parts = []
        for rank in range(dp):
            mesh = SimpleNamespace(dp_rank=rank, config=SimpleNamespace(dp=dp))
            job = SimpleNamespace(groups=SimpleNamespace(mesh=mesh), config=SimpleNamespace(train=train))
            own = open_stream(config, "train", seq_len, seed)
            parts += [own.rows(*each) for each in Job.micro_batches(job, plan)]  # type: ignore[arg-type]
        batch = torch.cat(parts)
        assert torch.equal(batch, stream.rows(before, plan.num_sequences))
        ends = int((batch[:, :-1] == stream.end_of_document).sum()) if mask else 0
        assert stream.num_targets(before, plan.num_sequences) == len(batch) * seq_len - ends


def test_each_source_and_epoch_is_shuffled_anew(blend: DataConfig) -> None:
    stream = open_stream(blend, "train", 16, 3)
    assert isinstance(stream, Blend)
    code = stream.sources["code"]
    epochs = [code.indices(epoch * code.num_rows, code.num_rows) for epoch in range(3)]
    assert all(sorted(each) == list(range(code.num_rows)) for each in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    tokens = code.tokens
    twins = [Rows(tokens, 16, seed_of(3, name)).indices(0, code.num_rows) for name in ("one", "two")]
    assert twins[0] != twins[1]  # sources of equal length


def test_no_row_comes_twice_before_num_rows(blend: DataConfig) -> None:
    stream = open_stream(blend, "valid", 16)
    assert isinstance(stream, Blend)
    at, past = (stream.exposures(count) for count in (stream.num_rows, stream.num_rows + 1))
    assert all(each.num_epochs <= 1 for each in at)
    assert any(each.num_epochs > 1 for each in past)


def test_a_run_that_repeats_too_often_is_refused(blend: DataConfig) -> None:
    stream = open_stream(blend, "train", 16)
    for name, share, num_tokens, num_epochs in stream.exposures(1000):
        weight = next(each.weight for each in blend.blend if each.name == name)
        assert share == pytest.approx(weight)
        assert abs(num_tokens / 16 - 1000 * weight) <= 2
        assert isinstance(stream, Blend)
        assert num_epochs == num_tokens / 16 / stream.sources[name].num_rows
    check_epochs(stream, 1000, None)
    most = max(each.num_epochs for each in stream.exposures(1000))
    check_epochs(stream, 1000, most)
    with pytest.raises(ValueError, match=r"data.max_epochs=.* would see \w+ [\d.]+ times"):
        check_epochs(stream, 1000, most * 0.99)
    table = exposure_table(stream, 1000).splitlines()
    assert [line.split()[0] for line in table] == ["source", "code", "math", "web"]


def test_the_fingerprint_tells_other_weights_and_sources(blend: DataConfig) -> None:
    prints = {open_stream(blend, "train", 16).fingerprint}
    web, code, math_ = blend.blend
    for other in ((dataclasses.replace(web, weight=0.61), code, math_), (web, code)):
        # What was prepared for the whole blend, read in another way.
        stream = open_stream(blend, "train", 16)
        assert isinstance(stream, Blend)
        weights = {each.name: each.weight for each in other}
        prints.add(Blend({name: stream.sources[name] for name in weights}, weights, 0).fingerprint)
    again = dataclasses.replace(blend, blend=(code, math_, web), dir=blend.dir)
    same = Blend(stream.sources, {each.name: each.weight for each in again.blend}, 0).fingerprint
    assert same in prints
    assert len(prints) == 3


def test_one_tokenizer_is_trained_on_all_and_other_settings_are_refused(blend: DataConfig) -> None:
    metas = prepare_sources(blend, quiet)  # there already
    assert len({meta.tokenizer_digest for meta in metas.values()}) == 1
    web, *rest = blend.blend
    with pytest.raises(ValueError, match=r"was prepared with data.weights="):
        prepare_sources(dataclasses.replace(blend, blend=(dataclasses.replace(web, weight=5), *rest)), quiet)
    given = dataclasses.replace(blend, tokenizer=str(blend.folder / "tokenizer.json"))
    anew = dataclasses.replace(given, blend=(dataclasses.replace(web, weight=5), *rest))
    assert prepare_sources(anew, quiet) == metas  # a given tokenizer does not depend on weights


def test_a_blend_of_one_is_that_source(blend: DataConfig) -> None:
    tokens = Tokens.open(blend.sources["web"].folder, "train")
    one, straight = Blend({"web": Rows(tokens, 9, 4)}, {"web": 2.0}, 1), OneSource(tokens, 9, 4)
    assert torch.equal(one.rows(5, 40), straight.rows(5, 40))
    streams: list[Stream] = [one, straight]
    assert len({stream.num_rows for stream in streams}) == 1


@pytest.mark.parametrize(
    ("blend", "why"),
    [
        ([("a", 1.0, {}), ("a", 2.0, {})], "data.blend has a twice"),
        ([("a", 0.0, {})], "weight=0.0 of a must be above 0"),
        ([("a", float("nan"), {})], "weight=nan of a"),
        ([("../a", 1.0, {})], "a name is letters"),
        ([("a", 1.0, {"tokenizer": "x"})], "a sets tokenizer=x, which holds for the whole blend"),
        ([("a", 1.0, {"sufixes": []})], "a sets sufixes=.., which is not a key of data"),
        ([("a", 1.0, {"valid_fraction": 2.0})], "data.blend: a: data.valid_fraction=2.0"),
    ],
)
def test_illegal_blends_are_refused(blend: list[tuple[str, float, dict[str, object]]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DataConfig(blend=tuple(BlendSource(name, weight, "x", own) for name, weight, own in blend))


def test_a_source_beside_a_blend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source=x and data.blend are both set"):
        DataConfig(source="x", blend=(BlendSource("a", 1.0),))
