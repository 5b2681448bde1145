"""What `auto` means on the machine that runs: decided when a run begins, and kept with it, so that its numbers stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from train.checkpoint.step_folders import CONFIG_FILE, find_checkpoint
from train.config import RunConfig
from train.precision.build import settle
from train.settings import dotted

_KEY = "precision.bf16_products"


def settled(config: RunConfig, device: str) -> RunConfig:
    """The config with the way in which this run multiplies bfloat16 matrices.

    That of the run's earlier starts, or of the checkpoint that it goes on from; of none, the faster one here.

    device: "cpu" or "cuda". Raises ValueError as `find_checkpoint` does.
    """
    kept = next(_kept(config), None) if config.precision.bf16_products == "auto" else None
    precision = config.precision if kept is None else replace(config.precision, bf16_products=kept)
    return replace(config, precision=settle(precision, device))


def _kept(config: RunConfig) -> Iterator[str]:
    """What earlier configs have settled on, the nearest one first."""
    folders = [Path(config.run.dir)]
    if config.checkpoint.resume not in ("auto", "never"):
        folders.append(find_checkpoint(Path(config.checkpoint.resume), "checkpoint.resume"))
    folders += [Path(each.checkpoint) for each in reversed(config.ancestors)]
    for folder in folders:
        path = folder / CONFIG_FILE
        if path.exists():
            found = dotted(path.read_text(encoding="utf-8")).get(_KEY, "auto")
            if found != "auto":
                yield found
