"""Whether a save fits between the moment at which the ranks of a job are asked to stop and the end of the job."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from train.config import RunConfig
from train.flops import parameter_counts
from train.track.events import EVENTS, read_events

# What is written to measure a disk. Enough that the disk, and not a cache's first moment, decides.
PROBE_BYTES = 32_000_000
MASTER_BYTES = {"fp64": 8}
MOMENT_BYTES = {"bf16": 2}


def checkpoint_bytes(config: RunConfig) -> int:
    """About what a checkpoint takes: a master and two moments of every parameter, and the moving average if there is
    one."""
    counts, optimizer = parameter_counts(config.model), config.optimizer
    master = MASTER_BYTES.get(config.precision.name, 4)
    moment = MOMENT_BYTES.get(optimizer.moments_dtype, master)
    average = master if optimizer.ema_decay else 0
    return (counts.total + counts.mtp) * (master + 2 * moment + average)


def slowest_save_s(folder: Path) -> float | None:
    """The longest of a run's newest saves, from the moment at which it was due; None before there was one."""
    saves = [event.values["duration_s"] for event in read_events(folder / EVENTS) if event.kind == "save"]
    return max(saves[-5:], default=None)


def write_rate(folder: Path) -> float:
    """Bytes per second that one process gets written where `folder` is, or will be. OSError where it cannot."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    with tempfile.TemporaryFile(dir=there) as file:
        begin_s = time.perf_counter()
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - begin_s)


def sentence_before(config: RunConfig, signal_s: float, rate: float) -> str:
    """What is said when a run is queued: how long its save may take, and whether that fits.

    rate: as `write_rate` measures it here; each machine of the run is taken to write as fast.
    """
    folder = config.checkpoint.folder(config.run.dir)
    past_s = slowest_save_s(Path(config.run.dir))
    if past_s is not None:
        return sentence_of_past(past_s, signal_s) or f"its saves have taken up to {past_s:.1f} s: {_fits(signal_s)}"
    num_bytes, num_nodes = checkpoint_bytes(config), config.parallel.nodes
    save_s = num_bytes / (rate * num_nodes)
    said = (
        f"a checkpoint takes about {num_bytes / 1e9:.3g} GB, which is {save_s:.3g} s for {num_nodes} machines that "
        f"write to {folder} as fast as this one ({rate / 1e6:.0f} MB/s)"
    )
    if save_s > signal_s:
        return f"{said}: it would not fit into the slurm.signal_s={signal_s:g} s before the limit; raise slurm.signal_s"
    return f"{said}: {_fits(signal_s)}"


def sentence_of_past(past_s: float, signal_s: float) -> str:
    """What is said when a job starts whose run has saved before; empty where its saves fit."""
    if past_s <= signal_s:
        return ""
    return (
        f"a save of this run has taken {past_s:.1f} s, and would not fit into the slurm.signal_s={signal_s:g} s before "
        "the limit: what was trained since the checkpoint before would be lost; raise slurm.signal_s"
    )


def _fits(signal_s: float) -> str:
    return f"it fits into the slurm.signal_s={signal_s:g} s before the limit, beside a step"
