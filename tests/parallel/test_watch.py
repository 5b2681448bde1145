"""What a rank says of its waits: in words, when a peer is lost, and when a wait does not end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Handle, all_gather
from parallel.pipeline.actions import Chunk, parse_action
from parallel.watch import Need, PeerError, Watch, Watchdog, blamed
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


def test_a_device_that_runs_behind_keeps_its_last_wait() -> None:
    here = Watch(behind=True)
    here.wait(ROWS, lambda: None)
    assert here.waiting is not None
    here.do("optimizer")
    assert here.waiting is None


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
