"""A run says at its end what a launcher has planned of it, beside what happened."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from tests.runs import SMALL, prepare_text, run_in
from tests.spawn import Ranks
from train.environment import PLAN_VARIABLE
from train.track.planned import PEAK_BYTES, STEP_S, planned, sentence, typical_step_s
from train.view.report.page import page
from train.view.report.runs import read_run

PLAN = {"step_s": 0.5, "peak_bytes": 2 * 10**9, "reason": ""}


def row(step: int, step_s: float, tokens: float = 1000.0) -> dict[str, float]:
    return {"step": step, "perf/step_s": step_s, "perf/tokens_per_s": tokens / step_s, "memory/peak_bytes": 10**9}


def test_a_plan_beside_what_happened() -> None:
    rows = [row(1, 9.0), row(2, 9.0), row(3, 9.0), row(4, 1.0), row(5, 1.2), row(6, 1.1)]
    assert typical_step_s(rows) == 1.1
    assert sentence(rows) == "", "nothing was planned"
    told = sentence([*rows[:-1], {**rows[-1], STEP_S: 0.99, PEAK_BYTES: 1.5e9}])
    memory = "planned 1.50 GB on the fullest rank, held 1.00 (off by +50%)"
    assert told == f"planned a step of 990 ms, took 1.10 s (off by -10%); {memory}"
    assert sentence([{**rows[-1], PEAK_BYTES: 1e9}]) == "planned 1.00 GB on the fullest rank, held 1.00 (off by +0%)"


def test_steps_of_a_batch_that_still_grows_are_left_out() -> None:
    assert typical_step_s([row(step, 1.0, 500.0) for step in (1, 2, 3, 4)] + [row(5, 2.0), row(6, 2.2)]) == 2.1
    assert typical_step_s([{"step": 0, "valid/loss": 3.0}]) is None


@pytest.mark.parametrize(
    ("text", "figures", "reason"),
    [
        (json.dumps(PLAN), {STEP_S: 0.5, PEAK_BYTES: 2e9}, ""),
        ('{"peak_bytes": 7, "reason": "too many ranks"}', {PEAK_BYTES: 7}, "too many ranks"),
        ('{"step_s": 1', {}, "plan.json holds no plan"),
        ("[]", {}, "plan.json holds no plan"),
        (None, {}, "the plan was not ready when the run was"),
    ],
)
def test_whatever_a_launcher_leaves(tmp_path: Path, text: str | None, figures: object, reason: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    found, why = planned(path, patience_s=0.0)
    assert found == figures and why.endswith(reason)
    assert planned(None) == ({}, ""), "nobody plans a run that torchrun starts"


def test_a_plan_that_is_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"

    def leave() -> None:
        path.with_suffix(".aside").write_text(json.dumps(PLAN))
        path.with_suffix(".aside").rename(path)

    late = threading.Timer(0.1, leave)
    late.start()
    assert planned(path, patience_s=60.0)[0][STEP_S] == 0.5
    late.join()


def _with_plan(path: str) -> AbstractContextManager[object]:
    return mock.patch.dict("os.environ", {PLAN_VARIABLE: path})


def test_a_run_compares_itself_with_its_plan(ranks: Ranks, tmp_path: Path) -> None:
    """Once at the end of each start; and a start that nobody plans says nothing of an earlier plan."""
    text, plan = prepare_text(tmp_path / "data"), tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    small = [*SMALL, *text, "checkpoint.interval=1", "lr_scheduler.phases=[]", "evaluate.interval=0"]
    first = run_in(ranks, tmp_path / "run", [*small, "train.max_steps=2"], 1, partial(_with_plan, str(plan)))
    assert [row.get(STEP_S) for row in first.rows] == [None, 0.5]
    assert first.rows[-1][PEAK_BYTES] == 2 * 10**9 and isinstance(first.rows[-1][PEAK_BYTES], int)
    assert "planned a step of 500 ms, took" in page([read_run(tmp_path / "run")])
    again = run_in(ranks, tmp_path / "run", [*small, "train.max_steps=3"], 1)
    assert [row.get(STEP_S) for row in again.rows] == [None, 0.5, None]
    assert "planned a step" not in page([read_run(tmp_path / "run")])
