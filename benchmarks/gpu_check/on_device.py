"""A plugin of pytest's: tensors that tests make without naming a device are on the one of HALOCLINE_TEST_DEVICE."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    torch.set_default_device(os.environ["HALOCLINE_TEST_DEVICE"])
    yield
    torch.set_default_device("cpu")
