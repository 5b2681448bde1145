"""Variables of CUDA, NCCL and torch that runs on GPUs rely on: set before torch is loaded, unless they are set already.

This file imports no torch: CUDA and torch read most of them once, when they start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

# Name -> value, and why.
RELIED_ON: dict[str, tuple[str, str]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "32",
        "queues from the host to the device: with fewer, streams share one, and what waits in it stops the others",
    ),
    "NCCL_LAUNCH_ORDER_IMPLICIT": (
        "1",
        "operations of different communicators begin in the order in which the host launches them, which is one that "
        "cannot hang",
    ),
    "TORCH_NCCL_HIGH_PRIORITY": (
        "1",
        "a communication that is ready does not queue behind the thread blocks of a product",
    ),
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": (
        "15000",
        "torch ends a process four times as long after an error of NCCL's, in which our own sentence is said",
    ),
}
_PREFIXES = ("CUDA_", "NCCL_", "TORCH_NCCL_")


def set_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is relied on where nobody has said otherwise."""
    for name, (value, _) in RELIED_ON.items():
        environ.setdefault(name, value)


def shown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Every variable of CUDA and NCCL that is set, as NAME=value; beside it what is relied on, where that differs."""
    lines = []
    for name, value in sorted(environ.items()):
        if name.startswith(_PREFIXES):
            ours = RELIED_ON.get(name, (value, ""))[0]
            lines.append(f"{name}={value}" + (f" (unless it were set: {ours})" if value != ours else ""))
    return lines
