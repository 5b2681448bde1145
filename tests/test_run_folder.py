"""What a run leaves behind: the files and the keys that are promised, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import SMALL, prepare_text, run_in, train_main
from tests.spawn import Ranks
from train import compose

EVERY_STEP = {
    "step",
    "train/loss",
    "train/mtp_loss",
    "train/seq_balance_loss",
    "train/grad_norm",
    "train/lr",
    "train/consumed_tokens",
    "perf/tokens_per_s",
    "perf/step_s",
    "perf/data_wait_s",
    "perf/bubble_s",
    "perf/exposed_comm_s",
    "perf/zero_comm_s",
    "perf/mfu",
    "moe/max_vio",
    "moe/min_load",
    "moe/nodes_per_token",
    "moe/internode_bytes",
    "memory/peak_bytes",
}
TWO = ["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "parallel.nodes=1"]


def test_files_and_keys(ranks: Ranks, tmp_path: Path) -> None:
    settings = [*SMALL, *prepare_text(tmp_path / "tokens"), *TWO, "train.max_steps=6", "checkpoint.interval=3"]
    run = run_in(ranks, tmp_path / "run", [*settings, "track.wandb=offline"], 2, whole=True)
    listed = {"config.yaml", "metrics.jsonl", "loads.jsonl", "events.jsonl", "logs"}
    listed |= {"checkpoints", "wandb", "loss.png", "report.html"}
    assert {path.name for path in run.folder.iterdir()} == listed
    assert {path.name for path in (run.folder / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    saved = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert saved == {"step-00000003", "step-00000006", "latest"}
    for row in run.rows:
        assert row.keys() == (EVERY_STEP | {"valid/loss"} if row["step"] in (5, 6) else EVERY_STEP)
        assert 0 < row["perf/mfu"] < 1 and row["perf/data_wait_s"] <= row["perf/step_s"]
    config = compose.load(run.folder / "config.yaml")
    assert config == compose.compose([*settings, "track.wandb=offline", f"run.dir={run.folder}"])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "file").write_text("")
    assert train_main([*SMALL, f"run.dir={tmp_path / 'file' / 'run'}"]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"run.dir={tmp_path / 'file' / 'run'} cannot be written") and len(said.splitlines()) == 1


@pytest.mark.parametrize("settings", ["parallel.dp=2", "parallel.pp=2"])
def test_too_few_processes_is_one_sentence(tmp_path: Path, capfd: Any, settings: str) -> None:
    text = prepare_text(tmp_path / "tokens")
    assert train_main([*SMALL, *text, settings, f"run.dir={tmp_path / 'run'}"]) == 2
    said = capfd.readouterr().err
    assert "must equal the number of processes, 1" in said and len(said.splitlines()) == 1
