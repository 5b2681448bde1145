"""What only reads settings imports no heavy library: looked up in `sys.modules`, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "matplotlib",
    "wandb",
    "datasets",
    "transformer_engine",
    "deepspeed",
    "tokenizers",
    "pyarrow",
    "optuna",
)
PROGRAM = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    {body}
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""


def imported(body: str) -> list[str]:
    """The heavy libraries that a process has imported after these statements."""
    program = PROGRAM.format(body=body, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    "body",
    [
        "from train import compose; compose.compose([])",
        "from train import compose; compose.compose(['experiment=v3_h800_2048'])",
        "from launch.__main__ import main; main(['--help'])",
        "from launch.__main__ import VERBS, main; [main([name, '--help']) for name in VERBS]",
        "from launch.__main__ import main; main(['config', 'precision=fp8'])",
        "from launch.__main__ import main; main(['local', 'train.sed=1', '--cfg', 'job'])",
        "from launch.__main__ import main; main(['nonsense'])",
        "from train.__main__ import main; main(['--help'])",
        "from train.__main__ import main; main(['train.sed=1'])",
        "from train.__main__ import main; main(['--cfg', 'job'])",
    ],
)
def test_settings_need_no_heavy_library(body: str) -> None:
    assert imported(body) == []


def test_the_lookup_finds_what_is_imported() -> None:
    assert imported("import tokenizers") == ["tokenizers"]
