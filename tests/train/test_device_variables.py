"""Variables that a GPU's libraries read: set unless they are set, and shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from train.device_variables import RELIED_ON, set_defaults, shown

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_what_somebody_has_set_stays_and_is_shown_beside_ours() -> None:
    environ = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "INFO", "HOME": "/root"}
    set_defaults(environ)
    assert environ.keys() == RELIED_ON.keys() | {"NCCL_DEBUG", "HOME"}
    assert environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert shown(environ)[0] == "CUDA_DEVICE_MAX_CONNECTIONS=1 (unless it were set: 32)"
    assert "NCCL_DEBUG=INFO" in shown(environ) and not any("HOME" in line for line in shown(environ))


def test_they_are_set_before_torch_could_read_them() -> None:
    """Importing anything of `train`, as every way to start a rank does, sets them."""
    assert all(name in os.environ for name in RELIED_ON)


def test_the_page_has_all_of_them() -> None:
    text = PAGE.read_text()
    for name, (value, _) in RELIED_ON.items():
        assert re.search(rf"^\| `{name}` \| `{value}` unless set", text, re.M), name
