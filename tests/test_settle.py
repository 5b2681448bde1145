"""By which products a CPU computes a bfloat16 run is chosen once, and stays with the run and its branches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.runs import SMALL, prepare_text, read_checkpoint, train_main
from train import compose, settle
from train.precision import build

SETTINGS = [
    *SMALL,
    "precision=bf16",
    "lr_scheduler.phases=[]",
    "train.max_steps=2",
    "checkpoint.interval=1",
    "track.wandb=disabled",
]


def chosen(folder: Path) -> str:
    return str(yaml.safe_load((folder / "config.yaml").read_text())["precision"]["bf16_products"])


def test_a_run_keeps_the_products_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*SETTINGS, *prepare_text(tmp_path / "tokens")]
    run, branch = tmp_path / "run", tmp_path / "branch"
    faster = ["fp32"]
    monkeypatch.setattr(build, "faster_bf16_products", lambda: faster[0])
    assert train_main([*settings, f"run.dir={run}"]) == 0
    assert chosen(run) == chosen(run / "checkpoints" / "step-00000002") == "fp32"

    # The machine is another one: what the run began with stays, and is no change of recipe.
    faster[0] = "bf16"
    assert train_main([*settings, f"run.dir={run}", "train.max_steps=3"]) == 0
    assert chosen(run) == "fp32"
    branched = [f"run.dir={branch}", f"checkpoint.branch_from={run}/checkpoints/step-00000002", "train.max_steps=3"]
    assert train_main([*settings, *branched]) == 0
    assert chosen(branch) == "fp32"
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "step-00000003") for folder in (run, branch))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    elsewhere = [f"run.dir={tmp_path / 'on'}", f"checkpoint.resume={run}/checkpoints/step-00000002"]
    assert settle.settled(compose.compose([*settings, *elsewhere]), "cpu").precision.bf16_products == "fp32"
    assert settle.settled(compose.compose(settings), "cpu").precision.bf16_products == "bf16"

    # Asked for in so many words it is as asked.
    assert train_main([*settings, f"run.dir={run}", "train.max_steps=4", "precision.bf16_products=bf16"]) == 0
    assert chosen(run) == "bf16"
