"""`run`: where a run lives, and on what it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.model.attention import choice


@dataclass(frozen=True)
class FolderConfig:
    """`run`: where the run lives, and on what.

    Attributes:
        name: title of the picture; part of the default folder.
        dir: the run's folder, for config.yaml, metrics.jsonl, checkpoints, pictures, logs and wandb's files;
            `runs/<run.name>` unless set.
        device: `auto` (CUDA where there is a device), `cpu`, `cuda`.
        num_threads: threads per process; None takes `OMP_NUM_THREADS`, or shares the cores among this machine's
            processes.
        kernels: who computes what is no product: `eager`, torch's operations; `triton`, kernels of our own for GPUs;
            `compiled`, `torch.compile`, which needs a C++ compiler. `auto` is `triton` on a GPU where Triton is
            installed, and else `eager` (docs/kernels.md).
        deterministic: on GPUs take no kernel whose bits depend on timing, so that a run repeats bit for bit; slower
            (docs/precision.md). On a CPU it changes nothing.
        attention_kernel: who computes attention on a GPU: `cudnn`, `flash_attention_3`, `flash_attention_2`,
            `torch_flash`, or `torch` for whatever torch takes. `auto` is the first of them that is there and can do
            what the run wants (docs/attention.md). On a CPU it is `torch`.
        hang_timeout_s: longest wait of a rank for another one. It then says what it waits for and from whom, and the
            job ends (exit code 5). At least 1; an evaluation, a picture or a wandb start on rank 0 must fit, as the
            others wait for it meanwhile. Before the first step it counts silence alone, so that preparing data may take
            any time (docs/running.md). None leaves it to the communication library, which gives up after 10 minutes in
            words of its own.
    """

    name: str = "tiny"
    dir: str = "runs/tiny"
    device: str = "auto"
    num_threads: int | None = None
    kernels: str = "auto"
    deterministic: bool = False
    attention_kernel: str = choice.AUTO
    hang_timeout_s: float | None = 600.0

    def check(self) -> None:
        """ValueError unless the device is known, the number of threads positive and the timeout of a useful length."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"run.device={self.device} is not one of auto, cpu, cuda")
        if self.kernels not in ("auto", "eager", "compiled", "triton"):
            raise ValueError(f"run.kernels={self.kernels} is not one of auto, eager, compiled, triton")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"run.num_threads={self.num_threads} must be at least 1, or null to share the cores")
        if self.hang_timeout_s is not None and not (1 <= self.hang_timeout_s < math.inf):
            raise ValueError(f"run.hang_timeout_s={self.hang_timeout_s} must be at least 1 s, or null to wait on")
