"""`python -m launch timeline`: numbers, pictures, traces, and what it refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from launch.__main__ import main
from parallel.pipeline.events import Event, Timeline, read_trace, write_trace
from parallel.pipeline.measure import measured_costs
from parallel.pipeline.registry import NAMES, build
from parallel.pipeline.simulate import Costs, simulate

PNG = b"\x89PNG\r\n\x1a\n"


def settings(name: str = "dualpipe", num_ranks: int = 4, num: int = 8, *more: str) -> list[str]:
    sizes = [f"pipeline.schedule={name}", f"parallel.pp={num_ranks}", f"pipeline.num_micro_batches={num}"]
    last = {each.partition("=")[0]: each for each in [*sizes, *more]}
    return ["timeline", *last.values()]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "dualpipe.svg"
    costs = ["cost.f=1", "cost.b=1", "cost.w=1"]
    code, printed, _ = run(capsys, *settings("dualpipe", 8, 20, *costs, f"out={out}", "json=true"))
    assert code == 0 and out.exists()
    assert json.loads(printed) == {"step": 66, "bubble": [6] * 8, "peak_activations": [9] * 8}


def test_the_same_numbers_as_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, _ = run(capsys, *settings("1f1b", 4, 8, "cost.b=2"))
    assert code == 0 and (tmp_path / "timeline.svg").exists()
    lines = [line.split() for line in printed.splitlines()[:5]]
    assert lines[0][:3] == ["rank", "step", "bubble"]
    assert [line[:3] + line[4:] for line in lines[1:]] == [[str(r), "44", "12", str(4 - r)] for r in range(4)]
    assert "timeline.svg" in printed


def test_json_without_out_draws_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, printed, _ = run(capsys, *settings("dualpipe", 4, 8, "cost.pair=2.5", "json=TRUE"))
    assert json.loads(printed)["bubble"] == [1.5] * 4  # (P/2 - 1)(F&B + D - 3W)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_schedule_is_drawn_action_by_action(
    name: str, num_ranks: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "step.svg"
    code, _, _ = run(capsys, *settings(name, num_ranks, 2 * num_ranks, f"out={out}"))
    assert code == 0
    schedule = build(name, num_ranks, 2 * num_ranks)
    texts = ["".join(node.itertext()).strip() for node in ET.parse(out).iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text.startswith("rank")] == [f"rank {rank}" for rank in range(num_ranks)]
    num_chunks = sum(2 if action.kind == "pair" else 1 for actions in schedule.ranks for action in actions)
    assert sum(text.isdigit() for text in texts) >= num_chunks
    assert sum("Forward and backward, overlapped" in text for text in texts) == schedule.has_pairs
    assert any(name in text for text in texts)


def test_pictures_are_reproducible_and_also_png(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ("a.svg", "b.svg", "c.png")
    for name in names:
        more = ("pipeline.pairs=true", "pipeline.stages_per_rank=3", f"out={tmp_path / name}")
        assert run(capsys, *settings("interleaved_1f1b", 2, 4, *more))[0] == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_a_trace_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    assert run(capsys, *settings("dualpipev", 3, 7, "cost.f=0.3", "cost.latency=0.01", f"out={out}"))[0] == 0
    expected = simulate(build("dualpipev", 3, 7), Costs(f=0.3, latency=0.01)).events
    found = read_trace(out)
    assert found.schedule == build("dualpipev", 3, 7) and set(found.pipelines["simulated"]) == set(expected)
    entries = json.loads(out.read_text())["traceEvents"]
    alive = [entry["args"]["chunks"] for entry in entries if entry["ph"] == "C" and entry["name"].endswith("rank 0")]
    assert max(alive) == 7 and alive[-1] == 0  # P + 1/2 activations are 2 P + 1 chunks of half a stage
    tracks = {entry["args"]["name"] for entry in entries if entry["name"] == "thread_name"}
    assert tracks == {"rank 0", "rank 1", "rank 2"}


def recorded(path: Path, costs: Costs, name: str = "dualpipe") -> tuple[Event, ...]:
    """A step as a real run might have it: it starts late, and at its end it knows no costs."""
    schedule = build(name, 4, 8)
    events = simulate(schedule, costs).events
    write_trace(Timeline("recorded", schedule, {"pipeline 0": [event.moved(100) for event in events]}), path)
    return events


def test_a_recorded_step_under_the_simulated_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, out = tmp_path / "recorded.json", tmp_path / "both.svg"
    recorded(file, Costs(0.2, 0.3, 0.1, pair=0.5, latency=0.05))
    code, printed, _ = run(capsys, *settings("dualpipe", 4, 8, f"events={file}", f"out={out}", "json=true"))
    assert code == 0
    found = json.loads(printed)
    # Costs are read off the recorded step; only what its links cost is missing from the simulated one.
    linkless = simulate(build("dualpipe", 4, 8), Costs(0.2, 0.3, 0.1, pair=0.5))
    assert found["step"] == pytest.approx(linkless.step) and found["recorded"]["step"] > found["step"]
    assert found["bubble"] == pytest.approx(list(linkless.bubble))
    assert len(found["recorded"]["bubble"]) == 4
    assert out.read_text().count("recorded</text>") == 4
    assert "recorded step" in run(capsys, *settings("dualpipe", 4, 8, f"events={file}", f"out={out}"))[1]
    given = run(capsys, *settings("dualpipe", 4, 8, f"events={file}", "cost.f=1", "json=true"))[1]
    assert json.loads(given)["step"] > 20


@pytest.mark.parametrize("name", NAMES)
def test_costs_read_off_a_step_give_that_step(name: str, tmp_path: Path) -> None:
    num_slices = build(name, 4, 8).placement.num_slices
    uneven = Costs(*([1.0 + 0.25 * ((at * step) % 3) for at in range(num_slices)] for step in (1, 2, 4)), pair=3.5)
    events = recorded(tmp_path / "events.json", uneven, name)
    schedule = build(name, 4, 8)
    again = simulate(schedule, measured_costs(schedule, events))
    if name in ("1f1b", "interleaved_1f1b", "zb_h1", "zbv"):  # every stage runs each of its kinds alone
        assert again.step == pytest.approx(max(event.stop_s for event in events))
    else:
        assert again.step == pytest.approx(max(event.stop_s for event in events), rel=0.1)


def test_a_step_of_another_schedule_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    recorded(file, Costs())
    code, _, error = run(capsys, *settings("dualpipe", 4, 10, f"events={file}", "json=true"))
    assert code == 2 and "rank 0 recorded" in error
    code, _, error = run(capsys, *settings("dualpipev", 4, 8, f"events={file}", "json=true"))
    assert code == 2 and "rank 0 recorded" in error
    file.write_text("{}")
    code, _, error = run(capsys, *settings("dualpipe", 4, 8, f"events={file}", "json=true"))
    assert code == 2 and re.search(r"recorded\.json is not a timeline", error)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["cots.f=1"], "cots.f is not a key of timeline; did you mean cost.f?"),
        (["pipeline.num_microbatches=8"], "did you mean pipeline.num_micro_batches?"),
        (["train.seed=1"], "train.seed is not a key of timeline"),
        (["cost.f"], "cost.f cannot be read as key=value"),
        (["cost.f=one"], "cost.f=one must be a number"),
        (["cost.f=-1"], "cost.f=-1"),
        (["cost.pair=nan"], "cost.pair=nan"),
        (["json=yes"], "json=yes must be true or false"),
        (["out=step.pdf"], "out=step.pdf must end in .svg, .png, .json"),
        (["parallel.pp=four"], "parallel.pp=four must be a whole number"),
        (["parallel.pp=3"], "parallel.pp=3 with pipeline.schedule=dualpipe must be even"),
        (["pipeline.num_micro_batches=6"], "must be at least 2 * parallel.pp = 8"),
        (["pipeline.schedule=dualpip"], "did you mean dualpipe?"),
        (["pipeline.schedule=zbv", "pipeline.pairs=true"], "pipeline.pairs=true with pipeline.schedule=zbv"),
        (["pipeline.stages_per_rank=2"], "belongs to pipeline.schedule=interleaved_1f1b"),
        (["events=nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(
    more: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, error = run(capsys, *settings("dualpipe", 4, 8, *more))
    assert code == 2 and not printed and words in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_sizes_must_be_given(missing: int, capsys: pytest.CaptureFixture[str]) -> None:
    given = settings()[1:]
    key = given.pop(missing).split("=")[0]
    code, _, error = run(capsys, "timeline", *given)
    assert code == 2 and f"timeline needs {key}=" in error
