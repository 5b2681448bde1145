"""The door to DeepSpeed: what it refuses, and that it neither talks, compiles nor leaves groups behind."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from parallel.shards import ParamInfo
from parallel.zero.optimizer import ZeroOptimizer, build
from parallel.zero.sets import ReplicaGroups
from tests.parallel.zero_world import make_groups
from tests.spawn import STOP_S, Ranks
from train.recipe.adamw import AdamW
from train.recipe.optimizer import OptimizerConfig


def make(replicas: str = "dense") -> ZeroOptimizer:
    param = torch.nn.Parameter(torch.ones(3, 5))
    return build(
        "deepspeed",
        [(ParamInfo("w", (3, 5), replicas=replicas), param, AdamW(OptimizerConfig()), 0.1)],
        ReplicaGroups(),
    )


def test_absent_deepspeed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"zero.engine=deepspeed needs DeepSpeed: pip install deepspeed==\d") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.99.0")
    with pytest.raises(ValueError, match=r"not 0\.99\.0"):
        make()


ALONE = """
import os
import subprocess
import sys
import warnings
from tests.parallel.test_zero_deepspeed import make
optimizer = make("expert")
optimizer.zero_grad()
optimizer.step(1e-3)
import deepspeed.comm.comm
from deepspeed.utils import groups
assert deepspeed.comm.comm.cdb.shm_comm_op is None
assert not groups._EXPERT_PARALLEL_GROUP and not groups._EXPERT_DATA_PARALLEL_GROUP
assert "mpi4py" not in sys.modules
"""


def test_a_fresh_process_is_silent_compiles_nothing_and_keeps_no_groups(tmp_path: Path) -> None:
    """Without torchrun's environment and without a process group."""
    hidden = ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=Path(__file__).parents[2],
        env=environment | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=STOP_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def warnings_of_a_step() -> list[str]:
    """On each rank: what a step that gathers warns of."""
    param = torch.nn.Parameter(torch.ones(3, 5))
    listed = [(ParamInfo("w", (3, 5)), param, AdamW(OptimizerConfig()), 0.1)]
    optimizer = build("deepspeed", listed, make_groups(2, 1))
    with warnings.catch_warnings(record=True) as seen:
        optimizer.step(1e-3)
    return [str(warning.message) for warning in seen]


def test_gathering_does_not_warn(ranks: Ranks) -> None:
    assert ranks.run(warnings_of_a_step, world_size=2) == [[], []]
