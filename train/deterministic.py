"""`run.deterministic`: a run on GPUs that repeats its bits, under the same topology on the same kind of device.

What a GPU does not repeat by itself: sums of atomics (the gradient of queries in fused attention, `index_add_`), the
workspace that cuBLAS takes when several streams multiply, and sums inside a switch (NCCL's NVLS). Here torch is told to
take other ways, of which it has one for all that a step does; where it has none it refuses, which becomes a sentence.
On a CPU all of that repeats anyway, and no number changes. Not yet run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch

CUBLAS, NCCL_ALGO = "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"
# With either of these cuBLAS repeats itself, by its documentation; the first is the faster one.
_WORKSPACES = (":4096:8", ":16:8")


def check_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what libraries must find before they start, for a run on GPUs. ValueError where something else is set."""
    workspace = environ.setdefault(CUBLAS, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ValueError(
            f"run.deterministic=true: the environment's {CUBLAS}={workspace} is not one of {', '.join(_WORKSPACES)}, "
            "with which cuBLAS repeats its bits; unset it, or leave run.deterministic=false"
        )
    algorithms = environ.get(NCCL_ALGO, "")
    if "NVLS" in algorithms.upper() and not algorithms.startswith("^"):
        raise ValueError(
            f"run.deterministic=true: the environment's {NCCL_ALGO}={algorithms} asks for sums inside a switch, whose "
            "order is not fixed; unset it, or leave run.deterministic=false"
        )
    # Transformer Engine's own fused attention, which it reads when it is loaded.
    environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes no way whose bits depend on timing, if that is wanted. As it was before, afterwards.

    ValueError for an operation that has no other way.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # whose properties torch's annotations do not have
    fills, cudnn = memory.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    # New memory would be filled, to show who reads it before it is written: passes over memory that change no number.
    memory.fill_uninitialized_memory = False
    # Of the fused attentions this one has no backward that repeats; torch's flash and memory-efficient ones have.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [""])[0]
        if "deterministic" not in first_line:
            raise
        raise ValueError(
            f"run.deterministic=true: {first_line.split(', but you set')[0]}; leave run.deterministic=false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
