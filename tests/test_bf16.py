"""bf16 trains as fp32 does: what it changes is less than what another seed changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import SMALL, prepare_text, train_main
from train.track.metrics_file import read_metrics

SEEDS = (0, 1, 2)
EVALUATED = ["train.micro_batch_size=8", "evaluate.interval=20", "evaluate.num_sequences=64", "train.max_steps=40"]
# The model of `make train` on its text, in steps of 2048 tokens.
TINY = ["model=tiny", "train.global_batch_size=8", "track.wandb=disabled", "checkpoint.interval=0", "run.num_threads=1"]


def valid_losses(folder: Path, settings: list[str]) -> list[float]:
    """Validation losses of one run, on sequences that are the same for all runs."""
    assert train_main([*settings, *EVALUATED, f"run.dir={folder}"]) == 0
    return [row["valid/loss"] for row in read_metrics(folder / "metrics.jsonl") if "valid/loss" in row]


# How many times the spread that three seeds have at the end a run learns at least: those of the tiny model part
# further. At the first evaluation, in the tiny model's warm-up, they are farther apart than a run of fp32 learns.
@pytest.mark.parametrize(("model", "learns"), [("small", 5), pytest.param("tiny", 2, marks=pytest.mark.slow)])
def test_bf16_is_within_the_noise_of_seeds(tmp_path: Path, model: str, learns: int) -> None:
    text = prepare_text(tmp_path / "tokens") if model == "small" else [f"data.dir={tmp_path / 'tokens'}"]
    settings = [*(SMALL if model == "small" else TINY), *text]
    single = [
        valid_losses(tmp_path / f"fp32-{seed}", [*settings, "precision=fp32", f"train.seed={seed}"]) for seed in SEEDS
    ]
    half = valid_losses(tmp_path / "bf16", [*settings, "precision=bf16", "train.seed=0"])
    spreads = [max(theirs) - min(theirs) for theirs in zip(*single, strict=True)]
    assert half == pytest.approx(single[0], abs=max(spreads))
    # It is another arithmetic, and it learns.
    assert half != single[0] and half[-1] < half[0] - learns * spreads[-1]
