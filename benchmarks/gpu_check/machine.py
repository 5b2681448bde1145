"""What the machine is, what is installed, and what a run of DeepSeek-V3 would take of it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from benchmarks.gpu_check.table import Row
from kernels import door
from train.model.attention.choice import AUTO, CORES, Demand, choose, objection
from train.model.attention.installed import missing
from train.model.kernels import choose_kernels
from train.precision.build import choose_engine
from train.precision.config import PrecisionConfig

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "transformer-engine",
    "flash-attn",
    "flash-attn-3",
    "deepspeed",
    "numpy",
)
V3 = {"one text": Demand(192, 128, True), "documents": Demand(192, 128, True, by_document=True)}
# By what is in the name of a GPU; others are planned as the first.
CLUSTERS = {"H100": "h100", "H200": "h200", "H800": "h800", "B200": "b200"}


def rows(device: str) -> Iterator[Row]:
    """Devices, versions, choices."""
    yield Row("Python", platform.python_version())
    for name in LIBRARIES:
        yield Row(name, _version(name))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield Row("GPU", f"{properties.name}, {properties.multi_processor_count} multiprocessors")
        yield Row("GPU memory", properties.total_memory / 1e9, "GB")
        yield Row("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    place = torch.device(device)
    for what, demand in V3.items():
        for name in CORES:
            reason = objection(name, demand) or missing(name, demand, place)
            yield Row(
                f"attention by {name} for V3's heads, {what}",
                "there" if reason is None else "not there",
                note=reason or "",
            )
        auto = choose(AUTO, demand, lambda name, demand=demand: missing(name, demand, place))  # type: ignore[misc]
        yield Row(f"run.attention_kernel=auto, {what}", auto)
    yield Row("run.kernels=auto", choose_kernels("auto", place), note=door.missing(place) or "")
    yield Row("precision.engine=auto in fp8", choose_engine(PrecisionConfig("fp8", engine="auto"), device))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def cluster_of(device: str) -> str:
    """The cluster whose figures this GPU's are compared with."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else ""
    return next((cluster for part, cluster in CLUSTERS.items() if part in name), "h100")
