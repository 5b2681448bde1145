"""Rows that are read ahead: before they are asked for, in order, once; errors come where they are asked for."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from train.data.rows.ahead import Ahead


def rows_of(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).repeat(3, 1).T


def reading_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("rows")]


def test_rows_of_the_next_step_are_read_while_one_runs() -> None:
    read, all_read = list[tuple[int, int]](), threading.Event()

    def reading(first: int, count: int) -> Tensor:
        read.append((first, count))
        if len(read) == 5:
            all_read.set()
        return rows_of(first, count)

    ahead = Ahead(reading)
    assert reading_threads() == [], "none before the first rows are wanted"
    ahead.want([(0, 2), (2, 2)])
    ahead.want([(4, 2), (6, 2), (8, 2)])
    assert all_read.wait(60), "nobody has asked for a row yet"
    for place in [(0, 2), (0, 2), (2, 2)]:
        assert torch.equal(ahead.rows(*place), rows_of(*place))
    ahead.want([(4, 2), (6, 2), (8, 2)])  # it has come to that step
    ahead.want([(10, 2)])
    assert torch.equal(ahead.rows(8, 2), rows_of(8, 2))
    assert torch.equal(ahead.rows(100, 1), rows_of(100, 1)), "and others, that nobody has announced"
    assert read == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 2), (100, 1)]
    ahead.close()
    assert reading_threads() == []


def test_what_cannot_be_read_is_said_where_it_is_needed_and_not_before() -> None:
    def reading(first: int, count: int) -> Tensor:
        if first == 4:
            raise ValueError("shard 7 was cut while the run was under way")
        return rows_of(first, count)

    ahead = Ahead(reading)
    ahead.want([(0, 4)])
    ahead.want([(4, 4), (8, 4)])
    assert torch.equal(ahead.rows(0, 4), rows_of(0, 4))
    with pytest.raises(ValueError, match=r"^shard 7 was cut while the run was under way$"):
        ahead.rows(4, 4)
    assert torch.equal(ahead.rows(8, 4), rows_of(8, 4))
    ahead.close()
    assert reading_threads() == []


def test_a_close_forgets_what_nobody_has_asked_for() -> None:
    let_go, read = threading.Event(), list[int]()

    def reading(first: int, count: int) -> Tensor:
        read.append(first)
        assert let_go.wait(60)
        return rows_of(first, count)

    ahead = Ahead(reading)
    ahead.want([(0, 1), (1, 1), (2, 1)])
    closing = threading.Thread(target=ahead.close)
    closing.start()
    let_go.set()
    closing.join()
    assert len(read) <= 3 and reading_threads() == []
    ahead.close()
