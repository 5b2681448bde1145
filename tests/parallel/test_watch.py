"""What a rank says of its waits: in words, when a peer is lost, and when a wait does not end."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Handle, all_gather
from parallel.pipeline.actions import Chunk, parse_action
from parallel.watch import Need, PeerError, Watch, Watchdog, blamed
from tests.behind import Device
from tests.spawn import STOP_S, Ranks

ROWS = Need("experts", "rows of {what} from {peers}", None, Chunk("F", 2, 5))


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Need]:
    """Makes needs of a group of the ranks 4, 7, 9, of which this is 7; or of others."""

    def need(source: int | None = None, ranks: tuple[int, ...] = (4, 7, 9)) -> Need:
        monkeypatch.setattr(dist, "get_process_group_ranks", lambda _group: list(ranks))
        monkeypatch.setattr(dist, "get_rank", lambda: 7)
        return Need("experts", "rows of {what} from {peers}", "a group", Chunk("F", 2, 5), source)  # type: ignore[arg-type]

    return need


class Clock:
    """Shows a later second at every reading."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def a_watch() -> Watch:
    here = Watch("rank 7 (pipeline rank 1, data rank 2)")
    here.clock = Clock()
    here.during = "step 3"
    here.do(parse_action("F2.5"))
    return here


def test_a_wait_is_known_while_it_lasts_and_told_when_it_is_over() -> None:
    here, told = a_watch(), []
    here.listener = lambda *wait: told.append(wait)

    def call() -> str:
        assert here.waiting is not None and here.waiting.need is ROWS
        return "came"

    assert here.wait(ROWS, call) == "came"
    assert here.waiting is None and told == [("experts", 1.0, 2.0)]


def test_who_is_late_is_named(three: Callable[..., Need]) -> None:
    assert three().words(None) == "rows of F2.5 from ranks 4, 9"
    assert three().words(2) == "rows of F2.5 from rank 9"
    assert three(source=0).words(None) == "rows of F2.5 from rank 4"
    many = three(ranks=tuple(range(20)))
    assert many.words(None) == "rows of F2.5 from ranks 0, 1, 2, 3, 4, 5, 6, 8 and 11 more"


def broken() -> None:
    raise RuntimeError("[/a/b/pair.cc:553] Connection closed by peer [10.0.0.1]:201. Check the logs.\nmore")


def test_a_lost_peer_is_a_sentence(three: Callable[..., Need]) -> None:
    here = a_watch()
    with pytest.raises(PeerError) as caught:
        here.wait(three(), broken, lambda: 2)
    assert str(caught.value) == (
        "rank 7 (pipeline rank 1, data rank 2), step 3, F2.5 (micro-batch 5 on stage 2): waited 1.0 s for rows of F2.5 "
        "from rank 9, and that failed: Connection closed by peer [10.0.0.1]:201"
    )
    assert here.waiting is None and blamed(str(caught.value)) == [9]
    with pytest.raises(
        PeerError, match=r"was about to wait for rows of F2\.5 from ranks 4, 9, and that failed"
    ) as caught:
        here.launch(three(), broken)  # type: ignore[arg-type]
    assert blamed(str(caught.value)) == [4, 9]


def test_other_errors_pass_as_they_are(three: Callable[..., Need]) -> None:
    here = a_watch()
    with pytest.raises(PeerError, match=r"^once$"):
        here.wait(three(), lambda: here.reach(three(), once))
    with pytest.raises(KeyError):
        here.wait(three(), lambda: {}["no"])


def once() -> None:
    raise PeerError("once")


def test_whom_a_sentence_blames(three: Callable[..., Need]) -> None:
    here = a_watch()
    here.do(parse_action("F2.5&D3.4"))
    said = []
    for group in ({}, {"source": 2}, {"ranks": tuple(range(20))}):
        here.wait(three(**group), lambda: said.append(here.hang(here.waiting)))  # type: ignore[arg-type]
    assert said[0].startswith(
        "rank 7 (pipeline rank 1, data rank 2), step 3, F2.5&D3.4 (micro-batch 5 on stage 2, 4 on 3)"
    )
    assert list(map(blamed, said)) == [[4, 9], [9], [0, 1, 2, 3, 4, 5, 6, 8]]
    assert blamed("rank 3 failed for a reason of its own, from rank 2") == []
    assert blamed("") == []


# --- the watchdog ---


def looks(dog: Watchdog, here: Watch, times_s: list[float]) -> list[bool]:
    return [dog.look(time_s) is not None for time_s in times_s]


def test_only_one_and_the_same_wait_that_lasts_is_a_hang(three: Callable[..., Need]) -> None:
    here = a_watch()
    dog = Watchdog(here, 10, lambda _: None)
    start_s = dog._looked_s
    seconds = [start_s + second for second in range(1, 13)]
    assert not any(looks(dog, here, seconds)), "it works"
    found: list[bool] = []

    def a_wait(*times_s: float) -> None:
        here.wait(three(), lambda: found.extend(looks(dog, here, [start_s + time_s for time_s in times_s])))

    for second in range(15, 60, 5):  # a new wait every five seconds
        a_wait(second, second + 1, second + 2, second + 3)
    assert len(found) > 20 and not any(found)
    a_wait(*range(100, 113))
    assert found[-13:] == [False] * 10 + [True] * 3


def test_time_in_which_this_process_was_stopped_does_not_count(three: Callable[..., Need]) -> None:
    here = a_watch()
    dog = Watchdog(here, 10, lambda _: None)
    at_s = dog._looked_s
    found: list[bool] = []
    here.wait(three(), lambda: found.extend(looks(dog, here, [at_s + 1, at_s + 2, at_s + 1000, at_s + 1001])))
    assert found == [False] * 4


def test_it_speaks_from_its_thread(three: Callable[..., Need]) -> None:
    here, said, heard = a_watch(), [], threading.Event()

    def end(sentence: str) -> None:
        said.append(sentence)
        heard.set()

    with Watchdog(here, 0.1, end):
        assert here.wait(three(source=0), lambda: heard.wait(STOP_S))
    assert len(said) == 1 and said[0].endswith("for rows of F2.5 from rank 4")
    with Watchdog(here, 0.1, end):
        pass  # and ends with the rank


def test_a_long_wait_is_noted_and_so_is_its_end(three: Callable[..., Need]) -> None:
    here, noted = a_watch(), []
    dog = Watchdog(here, 10, lambda _: None, noted.append)
    at_s = dog._looked_s
    here.wait(three(source=0), lambda: looks(dog, here, [at_s + second for second in range(1, 9)]))
    assert len(noted) == 1 and blamed(noted[0]) == [4], "once, before the end"
    assert looks(dog, here, [at_s + 9, at_s + 10]) == [False, False]
    assert noted[1:] == [None]
    here.wait(three(), lambda: looks(dog, here, [at_s + second for second in range(11, 15)]))
    assert len(noted) == 2, "a short one is not worth a line"
    heard = threading.Event()
    noted.clear()
    with pytest.raises(KeyError), Watchdog(here, 0.2, lambda _: None, lambda said: (noted.append(said), heard.set())):
        here.wait(three(), lambda: heard.wait(STOP_S) and {}["of another cause"])
    assert len(noted) == 2 and noted[1] is None, "a rank that ends otherwise leaves no such words"


# --- a device that runs behind ---


class Moved:
    """A clock that is moved by hand."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_wait_that_a_device_is_in_is_told_from_what_the_host_does(three: Callable[..., Need]) -> None:
    clock = Moved()
    device = Device(clock)
    here = Watch("rank 7", device.mark)
    here.clock = clock
    here.do("F0.1")
    device.work(5)
    here.wait(three(source=0), lambda: device.wait_until(20))
    here.do("after the optimizer")
    here.wait(three(source=2), lambda: device.wait_until(30))
    seen = []
    for now_s in (1, 6, 12, 21, 31):
        clock.now_s = now_s
        seen.append(here.waiting and here.hang(here.waiting))
    # Since when is known to one look. To compute is not to wait, and a wait keeps the place at which the host met it.
    assert seen == [
        None,
        "rank 7, F0.1: has waited 0.0 s for rows of F2.5 from rank 4",
        "rank 7, F0.1: has waited 6.0 s for rows of F2.5 from rank 4",
        "rank 7, after the optimizer: has waited 0.0 s for rows of F2.5 from rank 9",
        None,
    ]
    here.wait(three(), lambda: None)
    assert len(here._ahead) == 1, "what is over is not kept"


def test_an_error_that_arrives_elsewhere_names_what_the_device_waited_for(three: Callable[..., Need]) -> None:
    clock = Moved()
    device = Device(clock)
    here = Watch("rank 7", device.mark)
    here.clock = clock
    here.do("F0.1")
    here.wait(three(source=0), lambda: device.wait_until(math.inf))
    assert here.waiting is not None
    clock.now_s = 3
    lost = "rank 7, F0.1: waited 3.0 s for rows of F2.5 from rank 4, and that failed: NCCL error 6"
    here.do("optimizer")
    # As an exception of a call about something else, of a wait for something else, and of one that nobody watches.
    for error in (dist.DistBackendError("NCCL error 6"), RuntimeError("NCCL error 6")):
        with pytest.raises(PeerError) as caught, here.losses():
            raise error
        assert str(caught.value) == lost and blamed(lost) == [4]
    with pytest.raises(PeerError) as caught:
        here.wait(three(source=2), lambda: _raise("NCCL error 6"))
    assert str(caught.value) == lost
    with pytest.raises(RuntimeError, match="out of memory"), here.losses():
        raise RuntimeError("CUDA error: out of memory")


def test_a_device_that_has_failed_does_not_silence_the_watchdog(three: Callable[..., Need]) -> None:
    class Broken:
        def passed(self) -> bool:
            raise RuntimeError("CUDA error: unspecified launch failure")

    here = Watch("rank 7", Broken)
    here.wait(three(), lambda: None)
    assert here.waiting is None
    here.wait(three(), lambda: None)


def _raise(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize("seed", range(40))
def test_a_hang_is_a_wait_of_the_device_and_nothing_else(three: Callable[..., Need], seed: int) -> None:
    """A random program of a host that runs ahead, works, saves and waits for itself, over a device that computes and
    waits: the watchdog speaks exactly where one of the device's waits, or of the host's own, outlasts the timeout."""
    draw, clock = random.Random(seed), Moved()
    device, timeout_s = Device(clock), 10.0
    here = Watch("rank 7", device.mark)
    here.clock = clock
    dog = Watchdog(here, timeout_s, lambda _: None)
    dog._looked_s = 0.0
    spoken: list[float] = []
    waits: list[tuple[float, float]] = []

    def pass_time(duration_s: float) -> None:
        until_s = clock.now_s + duration_s
        while clock.now_s < until_s:
            clock.now_s = min(until_s, clock.now_s + dog.tick_s)
            if dog.look(clock.now_s) is not None:
                spoken.append(clock.now_s)

    def wait_on_device(lasts_s: float) -> None:
        start_s = max(device.free_s, clock.now_s)
        device.wait_until(start_s + lasts_s)
        waits.append((start_s, device.free_s))

    def wait_here(lasts_s: float) -> None:
        waits.append((clock.now_s, clock.now_s + lasts_s))
        pass_time(lasts_s)

    for _ in range(60):
        # Well below the timeout or well above it, as the watchdog looks from time to time.
        lasts_s = draw.choice([0.0, 0.5, 4.0, *([25.0] if draw.random() < 0.1 else [])])
        kind = draw.choice(["compute", "rows", "rows", "words", "a save"])
        if kind == "compute":
            device.work(draw.choice([0.1, 40.0]))
        elif kind == "rows":
            here.wait(three(), lambda lasts_s=lasts_s: wait_on_device(lasts_s))
        elif kind == "words":
            pass_time(max(0.0, device.free_s - clock.now_s))  # as a host that reads: what it waits for here is its own
            here.wait(three(), lambda lasts_s=lasts_s: wait_here(lasts_s))
        else:
            pass_time(draw.choice([0.5, 30.0, 100.0]))
    pass_time(max(0.0, device.free_s - clock.now_s) + 1)
    slack_s = 3 * dog.tick_s
    for at_s in spoken:
        assert any(start_s + timeout_s - slack_s <= at_s <= end_s + slack_s for start_s, end_s in waits), at_s
    for start_s, end_s in waits:
        if end_s - start_s > timeout_s + slack_s:
            assert any(start_s <= at_s <= end_s for at_s in spoken), (start_s, end_s)


# --- real groups ---


def _late_rank_of_an_exchange() -> Any:
    """Rank 2 joins after the others have looked whom they wait for."""
    group = dist.new_group([0, 1, 2])
    here = Watch()
    handle = (
        here.launch(Need("numbers", "numbers from {peers}", group), lambda: all_gather(torch.ones(1), group))
        if dist.get_rank() < 2
        else None
    )
    said = ""
    if handle is not None:
        pending = handle.pending
        assert isinstance(pending, Handle)
        thread = threading.Thread(target=handle.wait)
        thread.start()
        while not (here.waiting and pending.waits_for() == 2):
            pass
        said = here.hang(here.waiting)
    dist.barrier()
    if handle is None:
        all_gather(torch.ones(1), group).wait()
    else:
        thread.join()
    return said


def test_the_rank_that_is_late_is_found_among_its_group(ranks: Ranks) -> None:
    said = ranks.run(_late_rank_of_an_exchange, world_size=3)
    assert [blamed(sentence) for sentence in said] == [[2], [2], []]
