"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Of what random tests draw: the same in every worker of pytest-xdist, which inherits it.
os.environ.setdefault("HALOCLINE_SEED", str(random.randrange(1 << 32)))

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
