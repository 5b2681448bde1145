"""How the numbers of a step are measured that the model does not measure: balance of loads, time, memory, rates."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Dense BF16 rate of one device in FLOP/s, from the makers' data sheets (without sparsity); the first match counts.
BF16_PEAK_FLOPS_PER_S = {
    "H800": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
}


def of_loads(load: Tensor) -> dict[str, Tensor]:
    """The metrics of a `load` [num_routers, num_experts]: float64 scalars on the device; none without a router."""
    return {"moe/max_vio": max_vio(load), "moe/min_load": min_load(load)} if load.numel() else {}


def max_vio(load: Tensor) -> Tensor:
    """Worst router's MaxVio = (largest expert load - mean) / mean, from `load` [num_routers, num_experts].

    The balance measure of Wang et al. 2024 (auxiliary-loss-free balancing), over the whole global batch of a step.
    0 is even, num_experts / top_k - 1 the worst. A router that saw no token counts as even. A float64 scalar, left on
    the device.
    """
    loads = load.double()
    mean = loads.mean(dim=1)
    excess = torch.where(mean > 0, (loads.amax(dim=1) - mean) / mean, 0.0)
    return excess.max()


def min_load(load: Tensor) -> Tensor:
    """Worst router's smallest expert load as a share of its mean, from `load` [num_routers, num_experts].

    1 is even, 0 means that some expert got nothing. A router that saw no token counts as even. A float64 scalar, left
    on the device.
    """
    loads = load.double()
    mean = loads.mean(dim=1)
    shares = torch.where(mean > 0, loads.amin(dim=1) / mean, 1.0)
    return shares.min()


class StepTimer:
    """Wall time of one step and of its waits for data.

    On a device that runs behind the host, read the step's loss before `stop`: reading is what waits for the device.
    """

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._data_wait_s = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts its body as waiting for data."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._data_wait_s += time.perf_counter() - start_s

    def stop(self) -> dict[str, float]:
        """The times since the last `stop`, as metrics; the next step starts."""
        now_s = time.perf_counter()
        times = {"perf/step_s": now_s - self._start_s, "perf/data_wait_s": self._data_wait_s}
        self._start_s, self._data_wait_s = now_s, 0.0
        return times


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on CUDA what torch's allocator gave out, otherwise resident memory.

    Resident memory is read where Linux keeps it for this program alone: getrusage's figure survives exec, so a rank
    would report the peak of the launcher that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _alone() -> None:
    """A barrier for one."""


def gemm_flops_per_s(
    device: torch.device,
    dtype: torch.dtype,
    barrier: Callable[[], object] = _alone,
    sum_over_ranks: Callable[[float], float] = float,
    size: int = 1024,
    window_s: float = 0.5,
) -> float:
    """Rate of square matrix products of `size` (2 size^3 FLOP each) on all ranks at once, summed, in FLOP/s.

    All ranks must call it together: after the `barrier` each multiplies for the same `window_s`, so ranks that share
    a machine's cores share its rate, and the sum is what the machine can do.
    """
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = a @ b
    batch = 1 if device.type == "cpu" else 32
    barrier()
    start_s = time.perf_counter()
    num_products = 0
    while (elapsed_s := time.perf_counter() - start_s) < window_s:
        for _ in range(batch):
            torch.mm(a, b, out=out)
        num_products += batch
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return sum_over_ranks(num_products * 2 * size**3 / elapsed_s)


def peak_flops_per_s(
    device: torch.device,
    world_size: int,
    barrier: Callable[[], object] = _alone,
    sum_over_ranks: Callable[[float], float] = float,
) -> float:
    """The rate, of all ranks together, that MFU calls 1.

    On CUDA it is the data sheet's dense BF16 rate times the ranks, whatever precision the run has, as papers report
    it (a BF16 product is measured where the device is not in the table). On a CPU there is no such figure: there it
    is the fp32 GEMM rate of all ranks at once, measured here once per run. All ranks must call it together.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [rate for key, rate in BF16_PEAK_FLOPS_PER_S.items() if key in name]
        if known:
            return known[0] * world_size
        return gemm_flops_per_s(device, torch.bfloat16, barrier, sum_over_ranks, size=8192)
    return gemm_flops_per_s(device, torch.float32, barrier, sum_over_ranks)


def mfu(model_flops_per_token: float, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): the model's own FLOPs per second over the peak.

    `model_flops_per_token` counts forward and backward of the active weights and causal attention (half the square),
    and nothing that is recomputed.
    """
    return model_flops_per_token * tokens_per_s / peak_flops_per_s
