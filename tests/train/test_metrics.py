"""Numbers of a step: names, balance measures against plain loops, timers, memory, rates."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from train.track import gauges
from train.track.gauges import StepTimer, gemm_flops_per_s, max_vio, mfu, min_load, peak_memory_bytes
from train.track.metrics import METRICS, UNITS, StepReport, of_run, source_of
from train.track.vector import Metrics

NAMES = {
    "step",
    *(
        "train/" + name
        for name in (
            "loss",
            "mtp_loss",
            "seq_balance_loss",
            "device_balance_loss",
            "comm_balance_loss",
            "grad_norm",
            "lr",
            "consumed_tokens",
        )
    ),
    *("valid/loss", "valid/<source>/loss"),
    *("perf/" + name for name in ("tokens_per_s", "step_s", "data_wait_s", "mfu")),
    *("perf/" + name for name in ("bubble_s", "exposed_comm_s", "zero_comm_s")),
    *("moe/" + name for name in ("max_vio", "min_load", "nodes_per_token", "internode_bytes")),
    *("plan/step_s", "plan/peak_bytes", "memory/peak_bytes"),
}


def report(step: int = 1, loads: list[list[int]] | None = None, **values: Any) -> StepReport:
    """A report with all that every run has; values by their metrics' names, None where one is not measured."""
    always = {
        "train/loss": 5.0 / step,
        "train/grad_norm": 1.5,
        "train/lr": 1e-3,
        "train/consumed_tokens": 1000 * step,
        "perf/tokens_per_s": 2000.0,
        "perf/step_s": 0.5,
        "perf/data_wait_s": 0.001,
        "memory/peak_bytes": 10**8,
    }
    measured = {name: value for name, value in {**always, **values}.items() if value is not None}
    of_sources = [each.of(name) for each in METRICS if each.is_per_source for name in ("web", "book")]
    return Metrics([*METRICS, *of_sources]).report({"step": step, **measured}, loads)


def test_names_and_units_are_the_published_ones() -> None:
    assert set(UNITS) == NAMES
    assert all(UNITS.values())


def test_what_there_is_per_source_has_a_name_for_each() -> None:
    names = [each.name for each in of_run(METRICS, ["a", "loss", "b.c"])]
    assert [name for name in names if source_of(name) is not None] == [
        "valid/a/loss",
        "valid/loss/loss",
        "valid/b.c/loss",
    ]
    assert [source_of(name) for name in ("valid/b.c/loss", "valid/loss", "valid//loss", "valid/a/los")] == [
        "b.c",
        *[None] * 3,
    ]
    # Its sum is divided by the targets of its own source.
    metrics = Metrics(of_run(METRICS, ["a", "b"]))
    row = metrics.pack({"valid/loss": 12.0, "valid/a/loss": 4.0, "valid/b/loss": 8.0}, lambda tensor: tensor).tolist()
    assert metrics.unpack([row], {"targets": 6, "targets of a": 4, "targets of b": 2}) == {
        "valid/loss": 2.0,
        "valid/a/loss": 1.0,
        "valid/b/loss": 4.0,
    }


def test_a_report_leaves_out_what_was_not_measured() -> None:
    values = report(step=3).values
    assert next(iter(values)) == "step" and values["step"] == 3
    assert "valid/loss" not in values and "moe/max_vio" not in values
    zeros = dict.fromkeys(NAMES - values.keys(), 0)
    full = report(**zeros).values
    assert set(full) == NAMES  # zeros are measurements
    assert list(full) == list(UNITS), "always in one order"


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=4))
def test_balance_measures_equal_plain_loops(rows: list[list[int]]) -> None:
    vios = [max(row) / (sum(row) / 3) - 1 if sum(row) else 0 for row in rows]
    shares = [min(row) / (sum(row) / 3) if sum(row) else 1 for row in rows]
    load = torch.tensor(rows)
    assert float(max_vio(load)) == pytest.approx(max(vios), abs=1e-12)
    assert float(min_load(load)) == pytest.approx(min(shares), abs=1e-12)


def test_balance_measures_at_their_ends() -> None:
    assert (max_vio(torch.tensor([[5, 5, 5, 5]])), min_load(torch.tensor([[5, 5, 5, 5]]))) == (0, 1)
    # All tokens to 1 of 4 experts: the worst there is. One bad router is not averaged away.
    worst = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    assert (max_vio(worst), min_load(worst)) == (3, 0)


def stopped(timer: StepTimer) -> tuple[float, float]:
    times = timer.stop()
    return times["perf/step_s"], times["perf/data_wait_s"]


def test_timer_counts_waits_inside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]

    def work(time_s: float) -> None:
        now_s[0] += time_s

    monkeypatch.setattr(gauges.time, "perf_counter", lambda: now_s[0])
    timer = StepTimer()
    with timer.waiting_for_data():
        work(2)
    work(1)
    assert stopped(timer) == (3, 2)
    with pytest.raises(KeyError), timer.waiting_for_data():
        work(0.5)
        raise KeyError
    work(4)
    assert stopped(timer) == (4.5, 0.5)  # the failed wait counts, the first step does not


def test_peak_memory_sees_what_was_held_and_not_the_parent() -> None:
    held = torch.ones(64 * 2**20 // 4)
    before = peak_memory_bytes(torch.device("cpu"))
    assert before > held.nbytes
    code = "import torch; from train.track.gauges import peak_memory_bytes as p; a = p(torch.device('cpu'))\n"
    code += "x = torch.ones(2**26); print(a, p(torch.device('cpu')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    at_first, at_last = map(int, out.split())
    assert 0.9 * 2**28 < at_last - at_first < 1.2 * 2**28


def _rate(window_s: float) -> tuple[float, float]:
    device = torch.device("cpu")
    own: list[float] = []

    def total(rate: float) -> float:
        own.append(rate)
        tensor = torch.tensor([rate], dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor)

    rate = gemm_flops_per_s(device, torch.float32, dist.barrier, total, size=128, window_s=window_s)
    return own[0], rate


def test_peak_rate_is_the_sum_over_ranks(ranks: Any) -> None:
    rates = ranks.run(_rate, 0.05, world_size=2)
    total = sum(own for own, _ in rates)
    assert [rate for _, rate in rates] == pytest.approx([total, total])


def test_rate_counts_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks once per reading, the number of products is known."""
    ticks = iter(range(100))
    monkeypatch.setattr(gauges.time, "perf_counter", lambda: next(ticks))
    # Start at 0; products after the readings 1, 2, 3; the reading 4 ends a window of 4.
    assert gemm_flops_per_s(torch.device("cpu"), torch.float32, size=16, window_s=4) == 3 * 2 * 16**3 / 4


def test_mfu_is_a_share_of_the_peak() -> None:
    # H800 figures of the DeepSeek hardware paper: 1542 tokens/s per device at 249.7 GFLOP per token is 38.9 %.
    assert mfu(249.7e9, 1542, 989.4e12) == pytest.approx(0.389, abs=5e-4)


def test_devices_are_told_apart_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rate in (("NVIDIA H800", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989.4e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        assert gauges.peak_flops_per_s(torch.device("cuda", 0), 8) == 8 * rate
