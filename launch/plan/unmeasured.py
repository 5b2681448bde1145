"""A processor that nobody has measured, for plans of runs whose own layers were timed.

Then each piece takes what it took, and figures only say how that is dealt out to the operations in it, so the order of
magnitude does. What layers do not tell is a message between stages of a pipeline, and how ranks take turns at cores.
"""

from __future__ import annotations

import os

from launch.plan.cluster import Cluster
from launch.plan.figures import (
    Attention,
    AttentionRate,
    CallTime,
    Compute,
    Contention,
    DeviceMemory,
    Exchange,
    ExchangeRate,
    FarTime,
    Host,
    Level,
    MessageTime,
    Passes,
    PassRate,
    ProductRate,
    Products,
)

SOURCE = "nothing: the order of magnitude of a processor of today"
# What a process of this program has for itself before it holds any tensor, as `ps` shows it.
CONTEXT_GB = 0.35
# 1e12 operations/s of a core, by type.
TFLOPS = {"float64": 0.05, "float32": 0.1, "bfloat16": 0.2}
GB_PER_S, CALL_US = 10.0, 10.0
# Of a message between two ranks: its way, and what it takes for each byte of it.
MESSAGE_US, MESSAGE_GB_PER_S = 50.0, 1.0


def memory_gb() -> float:
    """What this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def unmeasured() -> Cluster:
    """This machine, by its cores and its memory alone."""
    cores = os.cpu_count() or 1
    products = [ProductRate(name, 512, 512, 512, rate, 1, name) for name, rate in TFLOPS.items()]
    attention = [AttentionRate(name, 64, 64, 512, rate / 2, rate / 2) for name, rate in TFLOPS.items()]
    sends = [
        MessageTime("send", 2, size, MESSAGE_US + size / MESSAGE_GB_PER_S / 1e3) for size in (64, 1 << 16, 1 << 23)
    ]
    level = Level(SOURCE, MESSAGE_GB_PER_S, MESSAGE_GB_PER_S, MESSAGE_GB_PER_S, MESSAGE_US, 0.0, sends)
    far = [FarTime(1 << 20, 0.1)]
    return Cluster(
        title="this machine, not measured",
        devices_per_node=max(cores, 2),
        memory=DeviceMemory(SOURCE, memory_gb(), CONTEXT_GB, 0.0, 0.0, GB_PER_S, 1.0),
        compute=Compute(SOURCE, **TFLOPS, float8_e4m3fn=TFLOPS["float32"], num_units=cores),
        products=Products(SOURCE, 16, 64, products, far),
        attention=Attention(SOURCE, attention),
        passes=Passes(SOURCE, 1.0, [PassRate("any", 1 << 20, GB_PER_S)], far),
        host=Host(SOURCE, CALL_US, is_device=True, calls=[CallTime("fp32", "moe", "experts", "F", CALL_US)]),
        node=level,
        network=level,
        exchange=Exchange(SOURCE, 0, [ExchangeRate(2, MESSAGE_GB_PER_S, MESSAGE_GB_PER_S)]),
        contention=[Contention(num, *3 * [max(1.0, num / cores)]) for num in (cores, 2 * cores, 4 * cores)],
    )
