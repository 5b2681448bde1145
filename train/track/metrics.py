"""What a step reports: the names and units of its numbers, and how those that are not losses are measured.

One `StepReport` per finished step. Its names are the keys of `metrics.jsonl`, of wandb and of every picture.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

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


def _key(name: str, unit: str, **default: Any) -> Any:
    return field(metadata={"name": name, "unit": unit}, **default)


@dataclass(frozen=True)
class StepReport:
    """The numbers of one finished step; None: not measured in this step, left out of every sink.

    `step` counts finished steps, so the first report has step 1 and a checkpoint of step N holds reports 1..N.
    Losses are those of the global batch (nats per token; balance losses unweighted by alpha). `internode_bytes` is
    the payload that expert dispatch and combine sent between nodes, all ranks together.
    """

    step: int = _key("step", "steps finished")
    loss: float = _key("train/loss", "nats per token")
    grad_norm: float = _key("train/grad_norm", "before clipping")
    lr: float = _key("train/lr", "per step")
    consumed_tokens: int = _key("train/consumed_tokens", "tokens")
    tokens_per_s: float = _key("perf/tokens_per_s", "tokens per second, all ranks")
    step_s: float = _key("perf/step_s", "seconds")
    data_wait_s: float = _key("perf/data_wait_s", "seconds")
    peak_bytes: int = _key("memory/peak_bytes", "bytes, the fullest rank")
    mtp_loss: float | None = _key("train/mtp_loss", "nats per token, mean over depths", default=None)
    seq_balance_loss: float | None = _key("train/seq_balance_loss", "sum over MoE layers, 1 each: even", default=None)
    device_balance_loss: float | None = _key("train/device_balance_loss", "as before, of devices", default=None)
    comm_balance_loss: float | None = _key("train/comm_balance_loss", "as before, of communication", default=None)
    valid_loss: float | None = _key("valid/loss", "nats per token", default=None)
    bubble_s: float | None = _key("perf/bubble_s", "seconds, mean over ranks", default=None)
    exposed_comm_s: float | None = _key("perf/exposed_comm_s", "seconds, mean over ranks", default=None)
    zero_comm_s: float | None = _key("perf/zero_comm_s", "seconds, mean over ranks", default=None)
    mfu: float | None = _key("perf/mfu", "share of the peak", default=None)
    max_vio: float | None = _key("moe/max_vio", "largest load / mean - 1, worst router", default=None)
    min_load: float | None = _key("moe/min_load", "smallest load / mean, worst router", default=None)
    nodes_per_token: float | None = _key("moe/nodes_per_token", "nodes", default=None)
    internode_bytes: int | None = _key("moe/internode_bytes", "bytes, all ranks", default=None)
    loads: list[list[int]] | None = None  # [num_routers][experts]: tokens of the batch that chose each; no number

    def values(self) -> dict[str, float]:
        """Reported name -> value, without those that were not measured; "step" first."""
        named = ((item.metadata["name"], getattr(self, item.name)) for item in fields(self) if item.metadata)
        return {name: value for name, value in named if value is not None}


#: Reported name -> unit, for documents and axes.
UNITS: dict[str, str] = {item.metadata["name"]: item.metadata["unit"] for item in fields(StepReport) if item.metadata}


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
    """Wall time of one step and of its waits for data, in seconds.

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

    def stop(self) -> tuple[float, float]:
        """(step_s, data_wait_s) since the last `stop`, and starts the next step."""
        now_s = time.perf_counter()
        step_s, data_wait_s = now_s - self._start_s, self._data_wait_s
        self._start_s, self._data_wait_s = now_s, 0.0
        return step_s, data_wait_s


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
