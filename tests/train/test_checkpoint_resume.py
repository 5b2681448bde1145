"""Which checkpoints stay, which one a run goes on from, and when it must not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.spawn import Ranks
from tests.train.checkpoint_cases import load_case, open_checkpoints, save_case, state
from train.checkpoint import step_folders
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.goes_on import resume_decision


@pytest.mark.parametrize(("keep", "expected"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (3, [3, 4, 5])])
def test_keep_latest_k(tmp_path: Path, keep: int, expected: list[int]) -> None:
    checkpoints = open_checkpoints(tmp_path, keep_latest_k=keep)
    for step in range(1, 6):
        save_case(checkpoints, step, step)
    checkpoints.wait()
    assert sorted(int(path.name[-8:]) for path in tmp_path.glob("step-*")) == expected
    load_case(checkpoints, tmp_path / "step-00000005", 5)


def test_an_abandoned_future_is_forgotten_before_the_past(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path, keep_latest_k=2)
    for step in (10, 90, 20, 30):  # 90 was left behind by resuming from 10.
        save_case(checkpoints, step, step)
    checkpoints.wait()
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-00000020", "step-00000030"}
    assert checkpoints.latest() == tmp_path / "step-00000030"


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    for case in (1, 2):
        save_case(checkpoints, case, 9)
    checkpoints.wait()
    load_case(checkpoints, tmp_path / "step-00000009", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000009", "latest"}


def test_latest_falls_back_to_the_newest_complete_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        return [entry.getMessage() for entry in caplog.records if entry.name == step_folders.log.name]

    checkpoints = open_checkpoints(tmp_path, keep_latest_k=0)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        save_case(checkpoints, step, step)
    assert checkpoints.latest() == tmp_path / "step-00000003"
    assert not warnings()
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    assert checkpoints.latest() == tmp_path / "step-00000002"
    assert "manifest.json is missing" in warnings()[-1] and "falling back to step-00000002" in warnings()[-1]
    (tmp_path / "latest").unlink()
    assert checkpoints.latest() == tmp_path / "step-00000002"
    shutil.rmtree(tmp_path / "step-00000002")
    os.truncate(tmp_path / "step-00000001" / "__0_0.distcp", 5)
    assert checkpoints.latest() is None
    with pytest.raises(ValueError, match=r"only broken ones .*manifest"):
        resume_decision(CheckpointConfig(), tmp_path, state(0))


def test_resume(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path, keep_latest_k=0)
    assert checkpoints.resume(state(0)) is None
    for step in (4, 8):
        save_case(checkpoints, 0, step)
    found = checkpoints.resume(state(0))
    assert found is not None
    assert found[0] == tmp_path / "step-00000008" and found[1].step == 8
    assert resume_decision(CheckpointConfig(resume="never"), tmp_path / "empty", state(0)) is None
    with pytest.raises(ValueError, match=r"checkpoint.resume=never .*step-00000008.*another run.dir"):
        resume_decision(CheckpointConfig(resume="never"), tmp_path, state(0))
    explicit = CheckpointConfig(resume=str(tmp_path / "step-00000004"))
    chosen = resume_decision(explicit, tmp_path / "elsewhere", state(0))
    assert chosen is not None and chosen[1].step == 4
    with pytest.raises(ValueError, match="step-00000077"):
        resume_decision(CheckpointConfig(resume=str(tmp_path / "step-00000077")), tmp_path, state(0))


def _resume_other(root: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_checkpoints(root).resume(state(0, model="hidden_size: 96\nn_group: 4\n"))
    return str(caught.value)


def test_never_a_silent_resume_under_another_model(ranks: Ranks, tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state(1, model="hidden_size: 64\nn_group: 4\n"), {}, {})
    checkpoints.wait()
    for said in ranks.run(_resume_other, tmp_path, world_size=2):
        assert "model.hidden_size was 64 there and is 96 here" in said
        assert "n_group" not in said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"interval": -1}, "checkpoint.interval=-1"),
        ({"keep_latest_k": -2}, "checkpoint.keep_latest_k=-2"),
        ({"async_mode": "later"}, "checkpoint.async_mode=later"),
        ({"resume": ""}, "checkpoint.resume"),
        ({"dir": ""}, "checkpoint.dir"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CheckpointConfig(**keys).check()


def test_when_a_checkpoint_is_due() -> None:
    assert [step for step in range(1, 8) if CheckpointConfig(interval=3).due(step, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if CheckpointConfig(interval=0).due(step, 7)] == [7]
    assert CheckpointConfig().folder("runs/a") == Path("runs/a/checkpoints")
    assert CheckpointConfig(dir="b").folder("runs/a") == Path("b")
