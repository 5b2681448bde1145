"""`events.jsonl`: every kind as it is declared, lines that are whole whoever writes them, never fewer than before."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
from pathlib import Path

import pytest

from train.track.events import EVENTS, KINDS, Event, Events, read_events
from train.track.last_step import METRICS, last_step


def add_many(folder: Path, writer: int, count: int) -> None:
    for number in range(count):
        Events(folder).add("give_up", step=number, code=writer, reason="because " * (1 + number % 50))


def test_every_kind_makes_a_sentence_of_its_own_fields() -> None:
    for name, kind in KINDS.items():
        values = dict.fromkeys(kind.fields, 1)
        assert Event("2030-01-01T00:00:00.000+00:00", name, values).sentence
        assert next(iter(kind.fields)) == "step", "where it stands in a picture"
        assert all(meaning for meaning in kind.fields.values())


def test_an_event_has_its_kinds_fields_and_no_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Events(tmp_path).add("save", step=1)
    with pytest.raises(AssertionError):
        Events(tmp_path).add("give_up", step=1, code=1, reason="r", more=1)
    Events(tmp_path, writes=False).add("give_up", step=1, code=1, reason="of a rank that does not write")
    assert not (tmp_path / EVENTS).exists()


def test_lines_of_several_writers_are_whole(tmp_path: Path) -> None:
    """Ranks and launchers append at once: nothing is torn, nothing missing, each writer's lines in its order."""
    context = mp.get_context("fork")
    writers = [context.Process(target=add_many, args=(tmp_path, writer, 60)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    events = read_events(tmp_path / EVENTS)
    assert len(events) == 240
    for writer in range(4):
        assert [event.step for event in events if event.values["code"] == writer] == list(range(60))


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    """A kill may tear any line at any byte, and the next start appends behind it."""
    dice = random.Random(int(os.environ["HALOCLINE_SEED"]))
    path, meant = tmp_path / EVENTS, []
    for number in range(40):
        Events(tmp_path).add("give_up", step=number, code=1, reason="ö" * dice.randrange(20))
        if dice.random() < 0.4:
            content = path.read_bytes()
            line = content.splitlines(keepends=True)[-1]
            cut = dice.randrange(1, len(line))  # a cut of the line's end alone leaves an event that is whole
            path.write_bytes(content[:-cut])
            meant += [number] if cut == 1 else []
        else:
            meant.append(number)
    assert [event.step for event in read_events(path)] == meant


def test_lines_of_other_kinds_and_other_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / EVENTS
    path.write_text('{"time": "2030-01-01T00:00:00+00:00", "kind": "later", "step": 1}\n[1]\nnull\n"x"\n{}\n\n')
    assert read_events(path) == [] == read_events(tmp_path / "none")
    Events(tmp_path).add("give_up", step=3, code=1, reason="r")
    (event,) = read_events(path)
    assert (event.kind, event.step, event.sentence) == ("give_up", 3, "r") and event.time_s > 1.7e9


def test_a_disk_that_refuses_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / EVENTS).mkdir()
    Events(tmp_path, say=said.append).add("give_up", step=3, code=1, reason="r")
    assert len(said) == 1 and "Is a directory" in said[0] and '"kind": "give_up"' in said[0]


@pytest.mark.parametrize("torn", [b"", b'{"step": 8', b'{"step": 8, "x": "\xc3'])
def test_the_last_step_is_read_from_the_end(tmp_path: Path, torn: bytes) -> None:
    assert last_step(tmp_path / METRICS) == 0
    (tmp_path / METRICS).write_bytes(torn)
    assert last_step(tmp_path / METRICS) == 0
    values = {f"valid/{number}/loss": 1.0 for number in range(150)}  # 300 such lines are more than is read of the end
    lines = [json.dumps({"step": step, **values}) for step in range(1, 301)]
    (tmp_path / METRICS).write_bytes("".join(f"{line}\n" for line in lines).encode() + torn)
    assert last_step(tmp_path / METRICS) == 300


SCRIPT = 'printf "%s|%s|%s|" "$HALOCLINE_EVENT" "$HALOCLINE_SENTENCE" "$HALOCLINE_RUN" >> {out}; cat >> {out}'


def test_a_command_is_told_of_what_was_lost_and_of_nothing_else(tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "run"
    events = Events(run, alert=SCRIPT.format(out=out))
    events.add("start", step=0, num_ranks=2, num_nodes=1, topology="pp=1")
    events.add("save", step=3, num_bytes=10, stalled_s=0.0, duration_s=0.1)
    for outcome, code in (("done", 0), ("stopped", 0), ("hung", 5), ("not_finite", 3)):
        events.add("end", step=4, outcome=outcome, code=code, reason=f'it is "{outcome}"; $HOME')
    events.add("lost", step=4, code=137, reason="rank 1 was ended by SIGKILL")
    told = out.read_text().splitlines()
    assert [line.split("|")[0] for line in told] == ["end", "end", "lost"]
    assert told[0].split("|")[1:3] == ['it is "hung"; $HOME', str(run)]
    assert json.loads(told[2].split("|")[3])["code"] == 137


def test_an_alert_that_fails_or_hangs_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.track.alert.PATIENCE_S", 0.2)
    said: list[str] = []
    for command in ("exit 7", "exec sleep 5", "exec < /dev/null; exit 0"):
        Events(tmp_path, say=said.append, alert=command).add("give_up", step=1, code=1, reason="r" * 200_000)
    assert [each.removeprefix("track.alert=") for each in said] == [
        "exit 7 has failed with exit code 7",
        "exec sleep 5 has not ended within 0 s: it is left to itself",
    ]
    assert len(read_events(tmp_path / EVENTS)) == 3
