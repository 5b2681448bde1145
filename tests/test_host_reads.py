"""How often the host waits for the device, on real runs: by name, as formulas; and how a read on a GPU is arranged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from parallel.host import CudaHost, Host
from tests.runs import SMALL, prepare_text
from tests.spawn import Ranks

STEPS, NUM_VALID, GLOBAL_BATCH = 3, 4, 8
RUN = [*SMALL, f"train.max_steps={STEPS}", f"evaluate.num_sequences={NUM_VALID}", "evaluate.interval=0"]
RUN += [f"train.global_batch_size={GLOBAL_BATCH}", "lr_scheduler.warmup_steps=1"]

TOPOLOGIES = {
    "local": ["parallel.dispatch=local"],
    "flat": ["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat"],
    "two hops under dualpipe": [
        *("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.nodes=4", "parallel.dispatch=two_hop"),
        "pipeline.schedule=dualpipe",
    ],
}


def reads_of_a_run(settings: list[str]) -> tuple[Counter[str], dict[str, int]]:
    """On each rank: what the host has read in a whole run, and what it must have."""
    from parallel.pipeline.schedule import Schedule
    from train.assemble import assemble, join, meet
    from train.compose import compose
    from train.loop import run
    from train.stopping import StopRequest
    from train.track.sinks import Tracker

    config = compose(settings)
    with meet(config, print, print) as met, join(config, met, print) as groups:
        job = assemble(config, groups)
        assert run(job, Tracker(), 1.0, StopRequest())

    def moe_forwards(schedule: Schedule) -> int:
        parts = [part for action in schedule.ranks[groups.mesh.pp_rank] for part in action.parts]
        return sum(len(job.stages[part.stage].model.routers()) for part in parts if part.kind == "F")

    dp = config.parallel.dp
    forwards = STEPS * moe_forwards(config.schedule(GLOBAL_BATCH // dp)) + moe_forwards(
        config.forward_schedule(NUM_VALID // dp)
    )
    counts = "hop counts" if config.parallel.dispatch == "two_hop" else "expert counts"
    expected = {counts: forwards} | {"gradient norm": STEPS, "step": STEPS, "validation loss": 1, "stop": 2}
    return groups.host.num_reads, expected


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_reads_of_a_run(ranks: Ranks, tmp_path: Path, topology: str) -> None:
    settings = [*RUN, *prepare_text(tmp_path / "data"), f"run.dir={tmp_path / 'run'}", *TOPOLOGIES[topology]]
    world_size = {"local": 1, "flat": 2}.get(topology, 4)
    for found, expected in ranks.run(reads_of_a_run, settings, world_size=world_size, with_group=False):
        assert found == expected


def test_a_cpu_reads_when_asked() -> None:
    asked: list[int] = []
    host = Host()
    reading = host.start("counts", lambda: asked.append(1) or (torch.arange(3), torch.ones(1, 2)))  # type: ignore[func-returns-value]
    assert not asked
    assert reading.wait() == [[0, 1, 2], [[1, 1]]] and asked == [1]
    assert host.read("counts", torch.tensor(5)) == [5]
    assert host.num_reads == {"counts": 2}


class Device:
    """A GPU's streams and events that only note what is asked of them, and when."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def stream(self, _device: Any = None) -> Any:
        return mock.Mock(wait_stream=lambda other: self.done.append("the copying stream waits for the computing one"))

    @contextmanager
    def on(self, _stream: Any) -> Iterator[None]:
        self.done.append("on the copying stream")
        yield
        self.done.append("back")

    def event(self) -> Any:
        return mock.Mock(
            record=lambda stream: self.done.append("record"),
            synchronize=lambda: self.done.append("the host waits"),
        )


def test_a_gpu_is_waited_for_late_and_beside_what_computes() -> None:
    device, make = Device(), torch.empty

    def counts() -> tuple[Tensor, Tensor]:
        device.done.append("counts arrive")
        return torch.arange(6).view(2, 3), torch.tensor([7])

    with (
        mock.patch.object(torch.cuda, "Stream", device.stream),
        mock.patch.object(torch.cuda, "current_stream", device.stream),
        mock.patch.object(torch.cuda, "stream", device.on),
        mock.patch.object(torch.cuda, "Event", device.event),
        mock.patch.object(torch, "empty", lambda shape, dtype, pin_memory: make(shape, dtype=dtype)),
    ):
        reading = CudaHost(torch.device("cuda", 0)).start("counts", counts)
        queued = [
            *("the copying stream waits for the computing one", "on the copying stream"),
            *("counts arrive", "record", "back"),
        ]
        assert device.done == queued
        assert reading.wait() == [[[0, 1, 2], [3, 4, 5]], [7]]
        assert device.done == [*queued, "the host waits"]


class Streams:
    """Streams that note what each is told, under the name of the one that is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.on = "compute"
        self._made: list[str] = []

    def make(self, _device: Any = None, priority: int = 0) -> Any:
        self._made.append(f"lane {len(self._made)}" if priority else "copying")
        return self.named(self._made[-1])

    def named(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.said.append(f"{name} waits for {other.name}"))

    def current(self, _device: Any = None) -> Any:
        return self.named(self.on)

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        before, self.on = self.on, stream.name
        yield
        self.on = before

    def kept(self, tensor: Tensor, stream: Any) -> None:
        self.said.append(f"{int(tensor)} is kept for {stream.name}")


@dataclass(frozen=True)
class SomePlan:
    numbers: Tensor
    others: tuple[Tensor, ...]


def test_a_trip_runs_on_a_stream_of_its_way() -> None:
    """It waits for what is there when it begins and not for what comes while it is under way; what it takes and gives
    is known to the allocator on both streams, and what is queued behind it waits for it."""
    streams = Streams()

    def trip(name: str) -> Iterator[str]:
        for slot in ("first hop", "last hop"):
            streams.said.append(f"{name} launches on {streams.on}")
            yield slot
        streams.said.append(f"{name} ends on {streams.on}")
        return torch.tensor(7), SomePlan(torch.tensor(8), (torch.tensor(9),))  # type: ignore[return-value]

    with (
        mock.patch.object(torch.cuda, "Stream", streams.make),
        mock.patch.object(torch.cuda, "current_stream", streams.current),
        mock.patch.object(torch.cuda, "stream", streams.within),
        mock.patch.object(Tensor, "record_stream", lambda tensor, stream: streams.kept(tensor, stream)),
    ):
        host = CudaHost(torch.device("cuda", 0))
        out = host.beside("F", trip("out"), (torch.tensor(1), SomePlan(torch.tensor(2), ())))  # type: ignore[arg-type]
        home = host.beside("B", trip("home"), ())  # type: ignore[arg-type]
        again = host.beside("F", trip("again"), ())  # type: ignore[arg-type]
        assert streams.said == []  # what a trip waits for is there when it begins, not when it is made
        assert [next(out), next(home), next(out)] == ["first hop", "first hop", "last hop"]
        assert streams.said == [
            *("lane 1 waits for compute", "1 is kept for lane 1", "2 is kept for lane 1", "out launches on lane 1"),
            *("lane 2 waits for compute", "home launches on lane 2", "out launches on lane 1"),
        ]
        streams.said.clear()
        with pytest.raises(StopIteration) as end:
            next(out)
        assert int(end.value.value[0]) == 7
        kept = [f"{number} is kept for compute" for number in (7, 8, 9)]
        assert streams.said == ["out ends on lane 1", "compute waits for lane 1", *kept]
        streams.said.clear()
        next(again)
        assert streams.said == ["lane 1 waits for compute", "again launches on lane 1"]


def test_a_cpu_runs_a_trip_as_it_is() -> None:
    steps = iter(())
    assert Host().beside("F", steps, ()) is steps  # type: ignore[arg-type]
