"""A metric that is declared and measured reaches every sink of a real run: nothing in between knows it by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.runs import SMALL, prepare_text, run_in
from tests.spawn import Ranks
from train.track.metrics_file import read_loads

FOUR = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "train.max_steps=4"]
NUM_MICRO_BATCHES = 8  # of a step, over all ranks


@contextmanager
def new_metrics() -> Iterator[None]:
    """The largest load of a micro-batch, of every router apart; and what ranks have only in every second step."""
    from train import assemble
    from train.job import Job
    from train.model.transformer import Transformer
    from train.track.metrics import MAX, METRICS, SUM, Metric

    account, measured = Transformer._account, Job.measured
    routers = [Metric(f"moe/largest_load/router_{number}", "tokens", MAX) for number in range(4)]

    def with_loads(self: Any, number: int, stats: Any, terms: Any, tape: Any, findings: Any) -> None:
        account(self, number, stats, terms, tape, findings)
        if stats is not None:
            findings.add({f"moe/largest_load/router_{number}": stats.load.max()})

    def with_ranks(self: Any) -> Any:
        odd = {"run/sum_of_ranks": self.groups.mesh.rank} if self.step % 2 else {}
        return {**measured(self), **odd}

    with (
        mock.patch.object(assemble, "METRICS", (*METRICS, *routers, Metric("run/sum_of_ranks", "ranks", SUM))),
        mock.patch.object(Transformer, "_account", with_loads),
        mock.patch.object(Job, "measured", with_ranks),
    ):
        yield


def test_a_new_metric_needs_its_declaration_and_its_measurement(ranks: Ranks, tmp_path: Path) -> None:
    settings = [*SMALL, *prepare_text(tmp_path / "data"), *FOUR, "track.load_interval=1"]
    run = run_in(ranks, tmp_path / "run", settings, 4, new_metrics)
    assert [row.get("run/sum_of_ranks") for row in run.rows] == [None, 0 + 1 + 2 + 3, None, 0 + 1 + 2 + 3]
    for row, loads in zip(run.rows, read_loads(run.folder / "loads.jsonl"), strict=True):
        for number, load in enumerate(loads.loads):
            largest = row[f"moe/largest_load/router_{number}"]
            assert max(load) / NUM_MICRO_BATCHES <= largest <= max(load), "of a micro-batch, the largest of all ranks"
