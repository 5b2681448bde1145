"""Fixtures shared by all tests, and what random tests draw from: one seed, which a failure names."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_SILENT", "true")
# So many seconds wandb waits for its own process, which starts late on a busy machine.
os.environ.setdefault("WANDB__SERVICE_WAIT", "600")
os.environ.setdefault("WANDB_INIT_TIMEOUT", "600")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Kernels run in Triton's interpreter, which must be known before Triton is imported. A run on a CPU still takes none.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The same in every worker of pytest-xdist, which inherits it.
os.environ.setdefault("HALOCLINE_SEED", str(random.randrange(1 << 32)))

import hypothesis
import pytest
import torch

from tests.spawn import Ranks

SEED = int(os.environ["HALOCLINE_SEED"])

# No example is refused for the time it took: the machine may be busy.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Gloo ranks that live as long as the test session (see tests/spawn.py)."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _one_thread_and_seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)


def pytest_report_header() -> str:
    return f"HALOCLINE_SEED={SEED}"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let hypothesis draw from the seed too."""
    function = getattr(item, "obj", None)
    if getattr(function, "is_hypothesis_test", False):
        hypothesis.seed(SEED)(getattr(function, "__func__", function))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Say how to repeat a failure with all that was drawn."""
    report = yield
    if report.failed:
        report.sections.append(("to repeat it", f"HALOCLINE_SEED={SEED} python -m pytest '{item.nodeid}'"))
    return report
