"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from tests.spawn import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Gloo ranks that live as long as the test session (see tests/spawn.py)."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
