"""Rows that are cut anew: what was read within an epoch is not read again, through any chain of cuts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.rows import cut as cut_module
from train.data.rows.cut import Cut
from train.data.rows.permutation import Permutation

LINKS = st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(0, 60), st.integers(0, 200))


@settings(deadline=None, max_examples=200)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
def test_the_inverse_undoes_a_permutation(n: int, seed: int, epoch: int) -> None:
    permutation, places = Permutation(n, seed, epoch), np.arange(n)
    assert (permutation.inverse(permutation(places)) == places).all()
    assert (permutation(permutation.inverse(places)) == places).all()


def targets(cut: Cut, row: int) -> range:
    """The tokens that a row predicts, counted like the rows' starts."""
    return range(row * cut.seq_len, (row + 1) * cut.seq_len)


@settings(deadline=None, max_examples=150)
@given(num_tokens=st.integers(50, 400), links=st.lists(LINKS, min_size=1, max_size=4), block=st.sampled_from([3, 1024]))
def test_no_token_is_read_twice_within_an_epoch(
    num_tokens: int, links: list[tuple[int, int, int, int]], block: int
) -> None:
    """A twin with a set of what has been read goes along: an epoch reads each of its rows that may be, once."""
    chunk, cut_module._BLOCK_ROWS = cut_module._BLOCK_ROWS, block
    try:
        cut, position, read = None, 0, set[int]()
        epoch = 0
        for seq_len, seed, more, count in links:
            num_tokens += more
            cut = Cut(num_tokens, seq_len, seed, past=cut, at=position)
            left = {row for row in range(cut.num_rows) if read.isdisjoint(targets(cut, row))}
            for _ in range(count):
                if not left:
                    read, left = set(), set(range(cut.num_rows))
                    epoch += 1
                (row,) = cut.indices(position, 1)
                assert cut.epoch(position) == epoch
                assert row in left
                left.remove(row)
                read |= set(targets(cut, row))
                position += 1
            # At the end of an epoch nothing of the next one has been read.
            if not left:
                read = set()
                epoch += 1
            starts = np.arange(0, num_tokens - 5)
            stops = starts + 1 + starts % 5
            expected = [not read.isdisjoint(range(a, b)) for a, b in zip(starts, stops, strict=True)]
            assert cut.is_read(position, starts, stops).tolist() == expected
            assert cut.tokens_in_epoch(position) == len(read)
    finally:
        cut_module._BLOCK_ROWS = chunk


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(1, 30), at=st.integers(0, 150), first=st.integers(0, 100), counts=st.lists(st.integers(0, 40))
)
def test_rows_are_a_function_of_the_position(seq_len: int, at: int, first: int, counts: list[int]) -> None:
    past = Cut(700, 9, 3)
    whole = Cut(700, seq_len, 3, past=past, at=at).indices(at + first, sum(counts))
    parts, position = [], at + first
    for count in counts:
        parts += Cut(700, seq_len, 3, past=past, at=at).indices(position, count)
        position += count
    assert parts == whole


def test_what_is_left_of_an_epoch_is_counted() -> None:
    past = Cut(10_001, 10, 1)
    cut = Cut(10_001, 40, 1, past=past, at=300)
    seen = {row // 4 for row in past.indices(0, 300)}
    assert cut.rest() == (250 - len(seen), True)
    assert cut.tokens(300 + 7) == 300 * 10 + 7 * 40 and cut.tokens_in_epoch(300 + 7) == 300 * 10 + 7 * 40
