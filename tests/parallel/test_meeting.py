"""Ranks before there is a process group: what one does for all, what fails on one, what differs, waits in words."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from launch.ranks import HeldPort
from parallel import store
from parallel.meeting import Meeting, meet
from parallel.store import Place, Wait, has_ended, own_place
from parallel.watch import HangError, PeerError, blamed
from tests.spawn import STOP_S, Ranks

PEERS = (ValueError, PeerError, HangError)


def place() -> tuple[int, int]:
    """This process's rank, and how many there are to be."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name and the words of what it raises."""
    try:
        return call()
    except (*PEERS, KeyError) as error:
        return type(error).__name__, str(error)


def in_meeting(body: Callable[[Meeting], Any], limit_s: float = STOP_S) -> Any:
    with meet(*place(), limit_s, print, end_hung=print) as meeting:
        meeting.come()
        found = body(meeting)
        meeting.part()
        return found


def talk(meeting: Meeting) -> list[Any]:
    rank = meeting.rank

    def refuse(who: tuple[int, ...], error: Exception | None = None) -> Callable[[], int]:
        def work() -> int:
            if rank in who:
                raise error or ValueError(f"rank {rank} does not like it")
            return rank

        return work

    return [
        meeting.from_first("counts", lambda: {"a": [1, 2]} if rank == 0 else 1 / 0),
        outcome(lambda: meeting.from_first("counts", refuse((0,)))),
        meeting.on_all("counts", refuse(())),
        outcome(lambda: meeting.on_all("counts", refuse((1, 2)))),
        outcome(lambda: meeting.on_all("counts", refuse((0,)))),
        outcome(lambda: meeting.on_all("counts", refuse((2,), KeyError("a fault of ours")))),
        meeting.differing({"same": 1, "own": rank, "odd": "x" if rank == 1 else "y"}),
        meeting.differing({f"only on {rank}": "here"} if rank else {}),
        meeting.differing({}),
    ]


def talks() -> list[Any]:
    return in_meeting(talk)


def test_what_one_does_and_what_fails_on_one(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks.run(talks, world_size=3, with_group=False)):
        assert found[:3] == [{"a": [1, 2]}, ("ValueError", "rank 0 does not like it"), rank]
        assert found[3] == ("ValueError", "rank 1 does not like it; rank 2 does not like it")
        assert found[4] == ("ValueError", "rank 0 does not like it")
        ours = "'a fault of ours'"
        assert found[5] == (
            ("KeyError", ours)
            if rank == 2
            else ("PeerError", f"rank 2 broke off before the first step: KeyError: {ours}")
        )
        assert found[6] == {"own": {0: 0, 1: 1, 2: 2}, "odd": {0: "y", 1: "x", 2: "y"}}
        assert found[7] == {
            "only on 1": {0: None, 1: "here", 2: None},
            "only on 2": {0: None, 1: None, 2: "here"},
        }
        assert found[8] == {}


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def alone(meeting: Meeting) -> None:
        assert meeting.store is None
        assert meeting.from_first("", lambda: 3) == meeting.on_all("", lambda: 3) == 3
        assert meeting.differing({"a": 1}) == {}
        with pytest.raises(ValueError, match=r"^no$"):
            meeting.on_all("", mock.Mock(side_effect=ValueError("no")))

    in_meeting(alone)


def waits_for_long(folder: Path) -> list[str]:
    """Rank 0 works until each of the others has said what it waits for, twice at least."""
    said: list[str] = []
    rank = int(os.environ["RANK"])

    def say(sentence: str) -> None:
        said.append(sentence)
        if sentence.endswith("34 %"):  # a beat later than it begins
            (folder / f"{rank}-{len(said)}").touch()

    with mock.patch.object(store, "SAY_EVERY_S", 0.1), meet(*place(), STOP_S, say, end_hung=print) as meeting:
        meeting.come()

        def work() -> None:
            meeting.doing = "prepares the data: 34 %"
            while not all(len(list(folder.glob(f"{other}-*"))) >= 2 for other in (1, 2)):
                time.sleep(0.01)

        meeting.from_first("prepares the data", work)
        meeting.part()
    return said


def test_those_who_wait_say_for_whom_and_for_what(ranks: Ranks, tmp_path: Path) -> None:
    _, *others = ranks.run(waits_for_long, tmp_path, world_size=3, with_group=False)
    for rank, said in enumerate(others, 1):
        for sentence in said:
            assert sentence.startswith(f"rank {rank} has waited ") and " s for rank 0" in sentence
        assert said[-1].endswith("rank 0, which prepares the data: 34 %")


def incomplete(world_size: int, limit_s: float) -> tuple[list[str], Any]:
    said: list[str] = []
    os.environ["WORLD_SIZE"] = str(world_size)
    with meet(*place(), limit_s, said.append, end_hung=print) as meeting:
        return said, outcome(meeting.come)


def test_a_rank_that_never_comes_is_named_again_and_again(ranks: Ranks) -> None:
    (said, end), (_, other) = ranks.run(incomplete, 4, 2.0, world_size=2, with_group=False)
    # How many have come when the first word is due is the machine's matter.
    assert len(said) >= 3 and all("of 4 ranks have come to 127.0.0.1:" in sentence for sentence in said)
    assert said[-1].startswith("2 of 4 ranks") and "ranks 2, 3" in said[-1] and said[-1].endswith("are missing")
    kind, words = end
    assert kind == "HangError" and words.startswith("2 of 4 ranks have come") and "run.hang_timeout_s" in words
    assert other == end


def counts(sizes: list[int], rank_of: list[int], refused: Path) -> Any:
    """The job lasts until one of its processes is refused."""
    rank = int(os.environ["RANK"])
    os.environ.update(RANK=str(rank_of[rank]), WORLD_SIZE=str(sizes[rank]))

    def last(_: Meeting) -> None:
        while not refused.exists():
            time.sleep(0.01)

    found = outcome(lambda: in_meeting(last))
    if found is not None:
        refused.touch()
    return found


def test_ranks_that_cannot_be_one_job_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(counts, [2, 3], [0, 1], tmp_path / "sizes", world_size=2, with_group=False):
        assert found == (
            "ValueError",
            "WORLD_SIZE=2 on rank 0 and WORLD_SIZE=3 on rank 1 must be the same on all ranks",
        )
    first, *both = ranks.run(counts, [2, 2, 2], [0, 1, 1], tmp_path / "twice", world_size=3, with_group=False)
    assert first is None and None in both
    assert ("ValueError", "RANK=1 is the rank of two processes of this job: give each its own") in both


def test_a_port_in_use_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match=f"^MASTER_PORT={port} is in use on this machine"):
            in_meeting(lambda meeting: None)


def test_without_rank_0_the_others_name_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with HeldPort() as port, meet(*place(), 0.4, said.append, end_hung=print) as meeting:
        meeting.rank, meeting.world_size = 1, 2
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(HangError, match=rf"for rank 0 to come to 127\.0\.0\.1:{port} \(Connection refused\)"):
            meeting.come()
    assert said and all("MASTER_ADDR and MASTER_PORT must be of the machine of rank 0" in each for each in said)


def test_a_process_that_has_ended_is_known_on_its_machine() -> None:
    assert not has_ended(own_place())
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{other.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    place = own_place()._replace(pid=other.pid, started=started)
    assert not has_ended(place)
    assert has_ended(place._replace(started="7")), "the number was given to another process"
    assert not has_ended(place._replace(machine="another")) and not has_ended(Place("", other.pid, ""))
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(place), "it is not yet reaped"
    other.communicate()
    assert has_ended(place)


def dies(folder: Path) -> Any:
    """Rank 1 ends without a word while rank 0 waits for it."""

    def body(meeting: Meeting) -> Any:
        if meeting.rank == 0:
            return outcome(lambda: meeting.on_all("counts", lambda: None))
        (folder / "pid").write_text(str(os.getpid()))
        os._exit(1)

    child = os.fork() if os.environ["RANK"] == "1" else 0  # so that the long-lived rank lives on
    if child == 0:
        with meet(*place(), STOP_S, print, end_hung=print) as meeting:
            meeting.come()
            return body(meeting)
    os.waitpid(child, 0)
    return None


def test_a_rank_that_dies_before_the_groups_is_missed(ranks: Ranks, tmp_path: Path) -> None:
    (kind, words), _ = ranks.run(dies, tmp_path, world_size=2, with_group=False)
    assert kind == "PeerError" and "the process has ended" in words and blamed(words) == [1]


class Clock:
    """Time that passes only in sleep."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s


def test_only_silence_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(store, "time", clock)
    wait, said = Wait(600.0), []
    for beat in range(3000):  # most of an hour in which the other rank works
        for _ in range(4):
            wait.hear(str(beat))
            wait.rest()
            if wait.is_due():
                said.append(wait.lasted_s)
            assert not wait.is_too_long()
    assert 2000 < wait.lasted_s == pytest.approx(clock.now_s - 100)
    gaps = [after - before for before, after in zip([0.0, *said], said, strict=False)]
    assert all(60 <= gap < 61 for gap in gaps)
    begun_s = clock.now_s
    while not wait.is_too_long():
        wait.hear(str(2999))
        wait.rest()
    assert clock.now_s - begun_s == pytest.approx(600, abs=2)


def test_time_in_which_this_process_was_stopped_is_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(store, "time", clock)
    wait = Wait(600.0)
    clock.now_s += 10_000
    wait.rest()
    assert wait.lasted_s < 100 and not wait.is_too_long()
