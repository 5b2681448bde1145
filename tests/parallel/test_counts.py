"""What a rank of a large job holds, and asks of the store as it starts, as functions of the number of ranks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from parallel import meeting, process, store
from parallel.everyone import WIDTH
from parallel.meeting import Meeting
from parallel.mesh import KINDS, Mesh, ParallelConfig
from parallel.process import held_groups, sizes_in_tree
from parallel.store import Wait, pace

# DeepSeek-V3's job, and eight times as many ranks of it: pipelines of 16, experts over 64 ranks of 8 nodes.
JOBS = {
    8: ParallelConfig(pp=2, dp=4, ep=4, nodes=2, dispatch="two_hop"),
    2048: ParallelConfig(pp=16, dp=128, ep=64, nodes=256, dispatch="two_hop"),
    16_384: ParallelConfig(pp=16, dp=1024, ep=64, nodes=2048, dispatch="two_hop"),
}


class Counting(dist.Store):
    """A store that counts what is asked of it, by kind; `add` of 0 is asked by those who wait, as `check` is."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self._inner, self.asked = inner, Counter[str]()

    def set(self, key: str, value: Any) -> None:
        self.asked["set"] += 1
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.asked["get"] += 1
        return self._inner.get(key)

    def add(self, key: str, value: int) -> int:
        self.asked["add" if value else "poll"] += 1
        return self._inner.add(key, value)

    def check(self, keys: list[str]) -> bool:
        self.asked["poll"] += 1
        return self._inner.check(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self.asked["wait"] += 1
        self._inner.wait(keys, *([] if timeout is None else [timeout]))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.asked["multi_get"] += 1
        return self._inner.multi_get(keys)

    def set_timeout(self, timeout: timedelta) -> None:
        self._inner.set_timeout(timeout)


@pytest.fixture
def meeting_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """Threads of this process meet as ranks do."""
    place = dist.HashStore()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(meeting, "open_store", lambda *_: Counting(place))
    monkeypatch.setattr(meeting, "BEAT_S", 1e6)
    yield place


def asked_by_each(num_ranks: int) -> list[Counter[str]]:
    """What each of so many ranks asks for, that come, are told something and compare facts."""
    found: dict[int, Counter[str]] = {}

    def rank(number: int) -> None:
        one = Meeting(number, num_ranks, 600.0, lambda _: None)
        one.come()
        one.from_first("composes the config", lambda: "a config")
        one.on_all("looks at its device", lambda: "cpu")
        assert one.differing({"a setting": 1}) == {}
        assert isinstance(one.store, Counting)
        found[number] = one.store.asked
        one.close()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(num_ranks)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return [found[number] for number in range(num_ranks)]


def test_requests_of_a_rank_do_not_grow_with_their_number(meeting_place: dist.Store) -> None:
    few = asked_by_each(4)
    for key in meeting_place.list_keys():
        meeting_place.delete_key(key)
    many = asked_by_each(40)
    for asked in (*few, *many):
        del asked["poll"], asked["get"]  # as long as a rank waits; how often: the next test
    for asked in (few[0], many[0]):
        assert asked.pop("multi_get") <= 8  # at once, or in parts as the others come
    assert few[0] == many[0] and few[1:] == [few[1]] * 3 and many[1:] == [few[1]] * 39
    assert max(sum(asked.values()) for asked in many) <= 20


@pytest.mark.parametrize("num_ranks", [2, 2048, 16_384])
def test_those_who_wait_ask_the_store_seldom_enough_for_all(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together 25 thousand requests a second, which a store answers, however many they are."""
    now_s = 0.0

    def sleep(pause_s: float) -> None:
        nonlocal now_s
        now_s += pause_s

    monkeypatch.setattr(store.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(store.time, "sleep", sleep)
    wait, num_requests = Wait(1e5, num_ranks), 0

    def look() -> None:
        nonlocal num_requests
        num_requests += 3

    begun_s = -1.0
    while now_s < 200 * pace(num_ranks):
        if begun_s < 0 and now_s > 100 * pace(num_ranks):  # it asks more often at first
            begun_s, num_requests = now_s, 0
        num_requests += 1
        wait.looks(look)
        wait.rest()
    beats = 1 / (meeting.BEAT_S * pace(num_ranks))
    assert num_ranks * (num_requests / (now_s - begun_s) + beats) <= max(25_000, 20 * num_ranks / 2)


@pytest.mark.parametrize("num_ranks", JOBS)
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_rank_holds_few_groups_and_connections(num_ranks: int, backend: str) -> None:
    """As docs/running.md has it."""
    config = JOBS[num_ranks]
    most_groups = most_sockets = 0
    for pp_rank in (0, 1, config.pp - 1):
        mesh = Mesh(config, pp_rank * config.dp, mirrored=True)
        held = held_groups(mesh, backend)
        most_groups = max(most_groups, sum(map(len, held.values())))
        checkpoint = sizes_in_tree(mesh)
        assert len(checkpoint) <= 4 and sum(size - 1 for size in checkpoint) <= 3 * (WIDTH - 1) + WIDTH
        trees = [*checkpoint, *(held.get("world", []) if backend == "gloo" else [])]
        most_sockets = max(most_sockets, sum(size - 1 for size in trees))
    # Dense, expert, node, rail and world on NCCL, and one for the pipeline's links beside them.
    assert most_groups <= (5 if backend == "nccl" else 6 + 3)
    assert most_sockets <= 2 * 4 * (WIDTH - 1)


def test_the_count_is_that_of_the_groups_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over groups without peers, whose sizes torch knows."""
    from launch.plan.world import fake_world

    config = JOBS[2048]
    for rank in (0, 2047):
        with fake_world(config.world_size, rank, "cpu"):
            groups = process.start(config, mirrored=True, backend="fake_gloo")
            mesh, held = groups.mesh, held_groups(groups.mesh, "fake_gloo")
            made = {
                kind: [dist.get_world_size(getattr(groups, kind))] for kind in ("dense", "expert", "node", "rail", "ep")
            }
            made["world"] = [dist.get_world_size(group) for group in groups.world.groups]
            assert held == made and sizes_in_tree(mesh) == made["world"]
            assert [dist.get_world_size(group) for group in groups.checkpoint.groups] == made["world"]


def test_each_group_has_its_priority_and_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/running.md has it: what would be asked of NCCL, where torch has none."""
    made: dict[str, dict[str, Any]] = {}

    class Options:
        def __init__(self, is_high_priority_stream: bool) -> None:
            self.is_urgent = is_high_priority_stream

    monkeypatch.setattr(process.dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    monkeypatch.setattr(process.dist, "new_group", lambda _, **options: made.update({options["group_desc"]: options}))
    timeouts = timedelta(seconds=620), timedelta(hours=1)
    for kind in (*KINDS, "embedding", "world"):
        process._maker(kind, "nccl", timeouts[0])([0, 1])
    process._maker("checkpoint", "gloo", max(timeouts))([0, 1])
    assert {kind for kind, options in made.items() if "pg_options" in options} == {"ep", "node", "rail"}
    assert all(made[kind]["pg_options"].is_urgent for kind in ("ep", "node", "rail"))
    assert {kind: options["timeout"] for kind, options in made.items() if options["timeout"] != timeouts[0]} == {
        "checkpoint": process.CHECKPOINT_TIMEOUT
    }
