"""Which device a rank computes on."""

from __future__ import annotations

import torch


def uses_cuda(key: str, setting: str, num_local_ranks: int = 1) -> bool:
    """Whether the setting of a device means CUDA on this machine.

    Args:
        key: its key, as `run.device`.
        setting: `auto`, `cpu` or `cuda`.
        num_local_ranks: ranks of this machine, each of which needs a device of its own.

    Raises ValueError where it means CUDA and this machine has no device, or too few.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return False
    if not torch.cuda.is_available():
        why = (
            "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU on this machine"
        )
        raise ValueError(f"{key}={setting}: {why}; use cpu, or auto for CUDA where there is a device")
    if num_local_ranks > torch.cuda.device_count():
        raise ValueError(
            f"{key}={setting}: {num_local_ranks} ranks on this machine need as many GPUs, and torch finds "
            f"{torch.cuda.device_count()}; start fewer ranks, or use cpu"
        )
    return True
