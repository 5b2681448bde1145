"""Which kernels of attention's core this machine has, and the one that a run takes, made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from train.model.attention.choice import AUTO, CORES, TORCH, Demand, choose
from train.model.attention.cores import Core, HostCore, TorchCore
from train.model.attention.gpu_cores import LIBRARIES, FlashCore, SdpaCore, TorchFlashCore, load

MAKERS: dict[str, Callable[[bool], Core]] = {
    "cudnn": lambda _: SdpaCore("cudnn", SDPBackend.CUDNN_ATTENTION),
    "flash_attention_3": partial(FlashCore, "flash_attention_3"),
    "flash_attention_2": partial(FlashCore, "flash_attention_2"),
    "torch_flash": lambda _: TorchFlashCore(),
    TORCH: lambda _: TorchCore(),
}
"""Makes each kernel of `choice.CORES`; takes whether its bits must repeat."""


def build_core(name: str, demand: Demand, device: torch.device) -> Core:
    """The core of a run on this device. name: as `run.attention_kernel` has it. ValueError as `choose` raises it."""
    chosen = choose(name, demand, partial(missing, demand=demand, device=device))
    return HostCore() if device.type == "cpu" and chosen == TORCH else MAKERS[chosen](demand.deterministic)


def missing(name: str, demand: Demand, device: torch.device) -> str | None:
    """Why a kernel is not there for a run on this device, as the end of a sentence; None where it is."""
    if not CORES[name].needs_gpu:
        return None
    if device.type != "cuda":
        return "it needs a GPU, and the run is on a CPU"
    if name in LIBRARIES:
        return library_missing(name, torch.cuda.get_device_capability(device))
    return _torch_missing(name, demand, device)


def check_library(name: str) -> None:
    """ValueError for a kernel of a library that this machine, which has a GPU, does not have. Takes no memory there."""
    if name in LIBRARIES and (reason := library_missing(name, torch.cuda.get_device_capability())) is not None:
        raise ValueError(f"run.attention_kernel={name}: {reason}; use {AUTO}")


def library_missing(name: str, capability: tuple[int, int]) -> str | None:
    """The same of a library's kernel, for GPUs of this compute capability."""
    module = LIBRARIES[name]
    if capability < (8, 0) or (name == "flash_attention_3" and capability[0] != 9):
        return f"it is not for GPUs of compute capability {capability[0]}.{capability[1]}"
    try:
        functions = load(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"its library ({module}) cannot be loaded here: {error}"
    if not all("deterministic" in inspect.signature(function).parameters for function in functions):
        return f"its library ({module}) is of a version that cannot be asked to repeat its bits"
    return None


def _torch_missing(name: str, demand: Demand, device: torch.device) -> str | None:
    """By torch's own answer, for heads of these widths on this device."""
    qk, v = demand.qk_width, demand.v_width
    widths = (qk, qk, max(qk, v) if CORES[name].equal_widths else v)
    q, k, values = (
        torch.empty(1, 1, 128, width, dtype=torch.bfloat16, device=device, requires_grad=True) for width in widths
    )
    params = torch.backends.cuda.SDPAParams(q, k, values, None, 0.0, True, False)
    asked = torch.backends.cuda
    can = asked.can_use_cudnn_attention if name == "cudnn" else asked.can_use_flash_attention
    return None if can(params) else f"torch {torch.__version__} has none here for heads of widths {qk} and {widths[2]}"
