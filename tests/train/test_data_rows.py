from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data_texts import prepared
from train.data.rows.epochs import Rows
from train.data.rows.permutation import Permutation
from train.data.rows.tokens import Tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    config, _ = prepared(tmp_path_factory.mktemp("rows"), num_documents=60)
    return Tokens.open(config.folder, "train")


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 3000) | st.integers(1, 60), st.integers(0, 2**70), st.integers(0, 10**6))
def test_a_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    values = Permutation(n, seed, epoch)(np.arange(n))
    assert (np.sort(values) == np.arange(n)).all()


@pytest.mark.parametrize("n", [2**31 + 11, 10**12, 2**52 - 1])
def test_a_permutation_of_more_than_memory_holds_repeats_nothing(n: int) -> None:
    places = np.unique(np.concatenate([np.arange(20000), np.arange(n - 20000, n), np.arange(0, n, n // 20000)]))
    values = Permutation(n, 3, 1)(places)
    assert len(np.unique(values)) == len(places)
    assert values.min() >= 0
    assert values.max() < n
    # Twenty thousand draws reach every tenth of the range; each tenth misses its share by at most 6 sigma.
    shares = np.histogram(values, bins=10, range=(0, n))[0]
    assert abs(shares - len(places) / 10).max() < 6 * (len(places) / 10) ** 0.5


def test_a_permutation_shuffles() -> None:
    """Where a place goes is uniform over epochs, and neighbours are torn apart (6 sigma over independent draws)."""
    n, epochs = 64, 6400
    all_ = np.stack([Permutation(n, 5, epoch)(np.arange(n)) for epoch in range(epochs)])
    for counted in (all_[:, 0], all_[:, 37], (all_[:, 1] - all_[:, 0]) % n):
        expected = epochs / n
        counts = np.bincount(counted, minlength=n)
        counts = counts[counts > 0] if counts[0] == 0 else counts  # two places never go to one
        assert abs(counts - expected).max() < 6 * expected**0.5
    assert (all_ == np.arange(n)).sum(1).mean() == pytest.approx(1.0, abs=6 / epochs**0.5)  # fixed points of a shuffle


def test_nothing_cannot_be_permuted() -> None:
    with pytest.raises(ValueError, match="n=0"):
        Permutation(0, 1, 1)


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(1, 300), seed=st.integers(0, 2**40), first=st.integers(0, 20000),
    counts=st.lists(st.integers(0, 70), max_size=6), order=st.sampled_from(["shuffled", "sequential"]),
)  # fmt: skip
def test_rows_are_a_function_of_the_position(
    tokens: Tokens, seq_len: int, seed: int, first: int, counts: list[int], order: str
) -> None:
    whole = Rows(tokens, seq_len, seed, order).rows(first, sum(counts))
    assert whole.dtype == torch.int64
    assert whole.shape == (sum(counts), seq_len + 1)
    other, position = Rows(tokens, seq_len, seed, order), first
    parts = []
    for count in counts:
        parts.append(other.rows(position, count))
        position += count
    if parts:
        assert torch.equal(whole, torch.cat(parts))
    for index in reversed(range(min(sum(counts), 3))):  # backwards, one by one, from a new object
        assert torch.equal(Rows(tokens, seq_len, seed, order).rows(first + index, 1)[0], whole[index])


@pytest.mark.parametrize("seq_len", [1, 7, 64, 499, 500, 501])
def test_an_epoch_holds_every_row_of_the_stream_once(tokens: Tokens, seq_len: int) -> None:
    stream = tokens.read(0, tokens.num_tokens)
    num_rows = (len(stream) - 1) // seq_len
    expected = np.stack([stream[i * seq_len : i * seq_len + seq_len + 1] for i in range(num_rows)])  # the slow twin
    rows = Rows(tokens, seq_len, seed=9)
    assert rows.num_rows == num_rows
    epochs = [rows.rows(epoch * num_rows, num_rows).numpy() for epoch in range(2)]
    for epoch in epochs:
        assert (sorted(map(tuple, epoch)) == sorted(map(tuple, expected))) is True
    straight = Rows(tokens, seq_len, order="sequential").rows(0, 2 * num_rows).numpy()
    assert (straight == np.concatenate([expected, expected])).all()
    if num_rows > 20:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[0] != Rows(tokens, seq_len, seed=10).rows(0, num_rows).numpy()).any()
        assert (epochs[0] != expected).any()


def test_a_row_names_its_documents(tokens: Tokens) -> None:
    rows = Rows(tokens, 33, seed=4)
    for position in (0, 1, rows.num_rows + 3):
        start = rows.indices(position, 1)[0] * 33
        found = rows.documents(position)
        assert found[0].first_token <= start < found[0].stop_token
        assert found[-1].first_token <= start + 33 < found[-1].stop_token
        row = rows.rows(position, 1)[0].tolist()
        assert row.count(tokens.eod) == sum(start <= document.stop_token - 1 <= start + 33 for document in found)


def test_bad_requests_are_refused_in_a_sentence(tokens: Tokens, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seq_len=\d+ needs at least \d+ tokens, and the train split .* holds \d+"):
        Rows(tokens, tokens.num_tokens)
    assert Rows(tokens, tokens.num_tokens - 1).num_rows == 1
    with pytest.raises(ValueError, match="seq_len=0"):
        Rows(tokens, 0)
    with pytest.raises(ValueError, match="order=random"):
        Rows(tokens, 8, order="random")
    with pytest.raises(ValueError, match="first=-1"):
        Rows(tokens, 8).rows(-1, 2)
    with pytest.raises(ValueError, match="count=-2"):
        Rows(tokens, 8).rows(1, -2)
