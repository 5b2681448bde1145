"""A sweep: every job in a folder of its own, a failed one does not lose the others, a finished one is not run again."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.ranks import Ended
from launch.sweep import sweep
from tests.runs import SMALL, prepare_text
from train import compose
from train.config import RunConfig

METRICS = '{{"step": 3, "train/loss": {loss}, "valid/loss": {loss}}}\n'


class FakeRun:
    """Stands for starting the ranks: leaves what a run leaves, without training."""

    def __init__(self, ends: dict[int, Ended] | None = None) -> None:
        self.ends = ends or {}
        self.configs: list[RunConfig] = []

    def __call__(self, config: RunConfig) -> Ended:
        self.configs.append(config)
        ended = self.ends.get(len(self.configs), Ended(0))
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(compose.text(config))
        (folder / "metrics.jsonl").write_text(METRICS.format(loss='"NaN"' if ended.code else config.lr_scheduler.lr))
        if ended.code == 0 and not ended.was_asked:
            _checkpoint(folder, config.schedule().num_steps)
        return ended


def _checkpoint(folder: Path, step: int) -> None:
    from train import step_folders

    path = step_folders.step_folder(folder / "checkpoints", step)
    path.mkdir(parents=True, exist_ok=True)
    step_folders.write_manifest(path, {})
    (folder / "checkpoints" / "latest").write_text(path.name)


def table(root: Path) -> list[dict[str, str]]:
    with (root / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_over_keys_and_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = FakeRun(), tmp_path / "base"
    grid = ["lr_scheduler.lr=0.02,0.01", "precision=fp32,bf16", "train.max_steps=3", f"run.dir={base}"]
    assert sweep(grid, run) == 0
    found = [(config.lr_scheduler.lr, config.precision.name, Path(config.run.dir).name) for config in run.configs]
    assert found == [
        (lr, precision, f"lr_scheduler.lr={lr},precision={precision}")
        for lr in (0.02, 0.01)
        for precision in ("fp32", "bf16")
    ]
    rows = table(tmp_path / "base-sweep")
    assert [row["lr_scheduler.lr"] for row in rows] == ["0.01", "0.01", "0.02", "0.02"]  # best first
    assert {(row["status"], row["step"], row["reason"]) for row in rows} == {("done", "3", "")}
    out = capsys.readouterr().out
    assert "results.csv" in out and out.count("done") == 4
    # Again: nothing is left to run; with another grid only what is new.
    again = FakeRun()
    assert sweep(grid, again) == 0
    assert again.configs == []
    assert sweep([grid[0], "precision=fp64,bf16", "zero.engine=native", *grid[2:]], again) == 0
    assert {config.precision.name for config in again.configs} == {"fp64", "bf16"}


def test_failures_do_not_lose_the_others(tmp_path: Path) -> None:
    run = FakeRun({2: Ended(3, "step 3: loss or gradient is not finite")})
    grid = ["model.num_experts_per_tok=4,99,3,2", "train.max_steps=3", f"run.dir={tmp_path / 'base'}"]
    assert sweep(grid, run) == 1
    rows = {row["model.num_experts_per_tok"]: row for row in table(tmp_path / "base-sweep")}
    assert [rows[key]["status"] for key in ("4", "99", "3", "2")] == ["done", "failed", "failed", "done"]
    assert "model.num_experts_per_tok=99" in rows["99"]["reason"]
    assert rows["3"]["reason"] == "step 3: loss or gradient is not finite" and rows["3"]["valid/loss"] == "nan"
    # Failures stand last, and are tried again.
    again = FakeRun()
    assert sweep(grid, again) == 1
    assert [config.model.num_experts_per_tok for config in again.configs] == [3]


def test_a_stopped_job_stops_the_sweep(tmp_path: Path) -> None:
    run = FakeRun({2: Ended(0, "", True)})
    assert sweep(["train.seed=1,2,3", "train.max_steps=3", f"run.dir={tmp_path / 'base'}"], run) == 1
    assert sorted(row["status"] for row in table(tmp_path / "base-sweep")) == ["done", "not run", "stopped"]


@pytest.mark.parametrize("name", ["with space", "a=b", "a,b", "it's", 'say "hi"', "αβ", "50%"])
def test_folders_with_odd_names(tmp_path: Path, name: str) -> None:
    quoted = str(tmp_path / name).replace("'", "\\'")
    run = FakeRun()
    assert sweep(["train.seed=1,2", "train.max_steps=3", f"run.dir='{quoted}'"], run) == 0
    assert [Path(config.run.dir).parent for config in run.configs] == [tmp_path / f"{name}-sweep"] * 2
    assert len(table(tmp_path / f"{name}-sweep")) == 2
    # What the ranks read back from the resolved YAML is the same folder.
    for config in run.configs:
        assert compose.load(Path(config.run.dir) / "config.yaml") == config


def test_a_mistake_in_every_job_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.sed"):
        sweep(["train.sed=1,2", f"run.dir={tmp_path}"], FakeRun())


def test_long_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    run = FakeRun()
    long = [f"/{'x' * 200}/{i}" for i in range(2)]
    assert sweep([f"data.source={long[0]},{long[1]}", "train.max_steps=3", f"run.dir={tmp_path / 'b'}"], run) == 0
    names = {Path(config.run.dir).name for config in run.configs}
    assert len(names) == 2 and all(len(name.encode()) < 255 for name in names)


def test_a_real_sweep_of_three_with_one_that_diverges(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = prepare_text(tmp_path / "tokens")
    grid = [*SMALL, *text, "train.max_steps=3", "lr_scheduler.lr=0.001,1e30,0.002", f"run.dir={tmp_path / 'a b'}"]
    assert main(["local", "--multirun", *grid]) == 1
    root = tmp_path / "a b-sweep"
    rows = {row["lr_scheduler.lr"]: row for row in table(root)}
    assert [row["status"] for row in rows.values()] == ["done", "done", "failed"]
    failed = list(rows.values())[-1]
    assert "loss or gradient is not finite" in failed["reason"]
    good = root / "lr_scheduler.lr=0.001"
    listed = {"config.yaml", "metrics.jsonl", "checkpoints", "loss.png", "logs"}
    assert {path.name for path in good.iterdir()} == listed  # track.wandb=disabled, so no wandb/
    assert {path.name for path in (good / "logs").iterdir()} == {"rank_0.log"}
    out = capfd.readouterr().out
    assert "step=3/3" in out and "done after step 3" in out
    assert dataclasses.is_dataclass(compose.load(good / "config.yaml"))
