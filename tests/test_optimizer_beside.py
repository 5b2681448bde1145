"""The optimizer's exchanges beside the pipeline: whenever a device gets to them between start and wait, the bits of a
run are the same; and what is used before its fence, or summed before it is complete, is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.deviation import between
from tests.runs import SMALL, Finished, prepare_text, run_in
from tests.spawn import Ranks

# Two slices on every rank, with replicas on two ranks of the pipeline; frozen weights, an average, an evaluation and a
# checkpoint between steps.
SETTINGS = [
    *("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "pipeline.schedule=dualpipe"),
    *("precision=fp64", "train.max_steps=3", "train.global_batch_size=16", "train.freeze=[layers.1.*]"),
    *("evaluate.interval=1", "checkpoint.interval=2", "optimizer.ema_decay=0.5"),
]


class At:
    """A communication that ends in `wait`."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait

    def waits_for(self) -> None:
        return None


@contextmanager
def late(fault: str = "") -> Iterator[None]:
    """Sums read their gradients when they are waited for; new weights come then, and are nonsense before."""
    from parallel.zero import arrivals, optimizer

    gather, scatter = arrivals.all_gather, optimizer.reduce_scatter

    def all_gather(shard: torch.Tensor, group: Any, out: torch.Tensor, numels: Sequence[int]) -> At:
        apart = out.clone()
        under_way = gather(shard.clone(), group, apart, numels)
        for number, part in enumerate(out.split(list(numels))):
            if number != torch.distributed.get_rank(group):
                part.fill_(float("nan"))
        return At(lambda: (under_way.wait(), out.copy_(apart)))

    def reduce_scatter(flat: torch.Tensor, group: Any, numels: Sequence[int]) -> At:
        return At(lambda: scatter(flat, group, numels).wait())

    with (
        mock.patch.object(arrivals, "all_gather", all_gather),
        mock.patch.object(optimizer, "reduce_scatter", reduce_scatter),
        _spoilt(fault),
    ):
        yield


@contextmanager
def early(fault: str = "") -> Iterator[None]:
    """Sums read their gradients when they are started, and nonsense is left behind."""
    from parallel.zero import optimizer

    scatter = optimizer.reduce_scatter

    def reduce_scatter(flat: torch.Tensor, group: Any, numels: Sequence[int]) -> Any:
        own = flat.clone()
        flat.fill_(float("nan"))
        return scatter(own, group, numels)

    with mock.patch.object(optimizer, "reduce_scatter", reduce_scatter), _spoilt(fault):
        yield


@contextmanager
def _spoilt(fault: str) -> Iterator[None]:
    """Inside, weights are used before their fence, or gradients summed before they are complete."""
    from parallel.pipeline import runtime
    from parallel.pipeline.completion import Completion
    from parallel.zero.optimizer import ZeroOptimizer

    def at_once(schedule: Any) -> list[dict[int, tuple[Completion, ...]]]:
        everything = tuple(Completion(0, position) for position in range(schedule.placement.num_slices))
        return [{1: everything} for _ in schedule.ranks]

    if fault == "no fence":
        with mock.patch.object(ZeroOptimizer, "fence", lambda *_: None):
            yield
    elif fault == "too early":
        with mock.patch.object(runtime, "completions", at_once):
            yield
    else:
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*SMALL, *prepare_text(tmp_path_factory.mktemp("text") / "tokens"), *SETTINGS]


@pytest.fixture(scope="module")
def plain(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Finished:
    return run_in(ranks, tmp_path_factory.mktemp("plain") / "run", settings, 4)


@pytest.mark.parametrize("when", [late, early], ids=lambda when: when.__name__)
def test_the_bits_are_the_same_whenever_the_device_gets_to_it(
    ranks: Ranks, tmp_path: Path, settings: list[str], plain: Finished, when: Callable[..., Any]
) -> None:
    run = run_in(ranks, tmp_path / "run", settings, 4, when)
    assert set(between(run, plain).values()) == {0.0}


@pytest.mark.parametrize(("when", "fault"), [(late, "no fence"), (early, "too early")], ids=["no fence", "too early"])
def test_a_fault_is_seen(
    ranks: Ranks, tmp_path: Path, settings: list[str], plain: Finished, when: Callable[..., Any], fault: str
) -> None:
    run = run_in(ranks, tmp_path / "run", settings, 4, partial(when, fault), exit_code=None)
    assert [row.get("train/loss") for row in run.rows] != [row.get("train/loss") for row in plain.rows]
