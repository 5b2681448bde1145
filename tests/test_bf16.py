"""bf16 trains as fp32 does: what it changes is less than what another seed changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import SMALL, prepare_text, train_main
from train.track import read_metrics

SEEDS = (0, 1, 2)
SIXTY = ["train.max_steps=60", "train.micro_batch_size=8", "evaluate.interval=20", "evaluate.num_sequences=64"]


def valid_losses(folder: Path, settings: list[str]) -> list[float]:
    """Validation losses of one run, on sequences that are the same for all runs."""
    assert train_main([*SMALL, *SIXTY, *settings, f"run.dir={folder}"]) == 0
    return [row["valid/loss"] for row in read_metrics(folder / "metrics.jsonl") if "valid/loss" in row]


def test_bf16_is_within_the_noise_of_seeds(tmp_path: Path) -> None:
    text = prepare_text(tmp_path / "tokens")
    single = [
        valid_losses(tmp_path / f"fp32-{seed}", [*text, "precision=fp32", f"train.seed={seed}"]) for seed in SEEDS
    ]
    half = valid_losses(tmp_path / "bf16", [*text, "precision=bf16", "train.seed=0"])
    # The widest spread that three seeds have at any of the evaluations is one noise.
    noise = max(max(theirs) - min(theirs) for theirs in zip(*single, strict=True))
    assert half == pytest.approx(single[0], abs=noise)
    assert half != single[0] and half[-1] < half[0] - 5 * noise
