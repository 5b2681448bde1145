"""The report: one page, whole by itself, with every series of every run; and the loads that it draws."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.__main__ import main
from tests.spawn import STOP_S
from tests.train.test_metrics import report
from train import compose
from train.track.config import TrackConfig
from train.track.events import Events
from train.track.metrics_file import JsonlSink, Loads, LoadsSink, read_loads
from train.view.report import heatmap
from train.view.report.chart import MAX_POINTS, log_ticks, thin, ticks
from train.view.report.page import page, write_report
from train.view.report.runs import find_runs, read_run

CHROMIUM = shutil.which("chromium")
MEASURED = {
    "train/mtp_loss": 3.0,
    "perf/mfu": 0.3,
    "moe/max_vio": 0.5,
    "moe/min_load": 0.4,
    "perf/bubble_s": 0.01,
    "perf/exposed_comm_s": 0.02,
}


def write_run(folder: Path, num_steps: int = 40, *more: str, loads: bool = True, **values: Any) -> Path:
    """A run's folder as a run leaves it."""
    folder.mkdir(parents=True)
    config = compose.compose([f"run.dir={folder.name[0]}", "train.max_steps=40", *more])
    (folder / "config.yaml").write_text(compose.text(config))
    lines, counts = JsonlSink(folder / "metrics.jsonl"), LoadsSink(folder / "loads.jsonl")
    for step in range(1, num_steps + 1):
        routers = [[10 + step, 10, 5, 0]] * 2 if loads else None
        valid = {"valid/loss": 4.0} if step % 10 == 0 else {}
        lines.write(report(step, **(valid | values)))
        counts.write(report(step, loads=routers))
    return folder


def parsed(text: str) -> ElementTree.Element:
    """The page's tree: it is XML too, so a tag that is not closed or a name that is not escaped is an error."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def titles(tree: ElementTree.Element) -> list[str]:
    return [str(each.text).strip() for each in tree.iter("h3")]


def curves(tree: ElementTree.Element, title: str) -> dict[str, str]:
    for section in tree.iter("section"):
        head = section.find("h3")
        if head is not None and str(head.text).strip() == title:
            found = (path for path in section.iter("path") if path.get("class", "").startswith("curve"))
            return {path.get("data-name", ""): path.get("d", "") for path in found}
    raise AssertionError(f"no panel {title}")


def test_a_run_has_all_that_it_measured(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "a <b> & 'c'", **MEASURED))])
    tree = parsed(text)
    wanted = {"Training and validation loss", "MTP loss", "Learning rate", "Gradient norm", "Batch size", "MaxVio"}
    assert wanted | {"Smallest load", "Throughput", "Step time", "MFU", "Peak memory"} <= set(titles(tree))
    assert set(curves(tree, "Training and validation loss")) >= {"training", "validation"}
    assert len(re.findall(r"[ML]", curves(tree, "MTP loss")["a <b> & 'c'"])) == 40
    assert len(re.findall("M", curves(tree, "Training and validation loss")["validation"])) == 4
    assert {"whole step", "waits: data", "waits: bubble", "waits: experts' exchange"} == set(curves(tree, "Step time"))
    assert [title for title in titles(tree) if title.startswith("layer")] == ["layer 1", "layer 2"]
    assert "done after step 40" in text and "lr_scheduler.lr" in text


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = page([read_run(write_run(tmp_path / "run", **MEASURED))])
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|fetch\(|XMLHttp", text)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)


def test_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    write_run(tmp_path / "one", **MEASURED)
    write_run(tmp_path / "two", 20, "lr_scheduler.lr=0.007", loads=False)
    write_run(tmp_path / "other" / "two", 30, "lr_scheduler.lr=0.007", loads=False)
    out = tmp_path / "all.html"
    assert main(["report", *(f"run={tmp_path / each}" for each in ("one", "two", "other")), f"out={out}"]) == 0
    tree = parsed(out.read_text())
    names = {"one", str(tmp_path / "two"), str(tmp_path / "other" / "two")}
    assert names <= set(curves(tree, "Learning rate")) and names <= set(curves(tree, "Step time"))
    assert len([each for each in tree.iter("input") if each.get("type") == "checkbox"]) == 3
    text = out.read_text()
    differing = text.split("Settings that differ")[1].split("<h2>")[0]
    assert re.findall(r"<td>(lr_scheduler\.lr|[\w.]*dir)</td>", differing) == ["lr_scheduler.lr"]
    assert "not finished: step 20 of 40" in text


@pytest.mark.parametrize(
    "values",
    [
        {"train/loss": math.nan, "train/grad_norm": math.inf},
        {"train/grad_norm": 0.0, "train/lr": 0.0},
        {"valid/loss": None},
        {"train/consumed_tokens": 0},
    ],
    ids=["not finite", "zeros", "no validation", "no tokens"],
)
@pytest.mark.parametrize("num_steps", [0, 1, 40])
def test_odd_runs_have_a_page_too(tmp_path: Path, values: dict[str, Any], num_steps: int) -> None:
    folder = write_run(tmp_path / "run", num_steps, loads=False, **values)
    (folder / "not_finite.json").write_text(json.dumps({"step": num_steps + 1}))
    text = page([read_run(folder)])
    parsed(text)
    assert f"not finite in step {num_steps + 1}" in text and "Expert load" not in text
    for d in re.findall(r' d="([^"]*)"', text):
        assert "nan" not in d and "inf" not in d


def test_a_resumed_run_says_where(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    events = Events(folder)
    events.add("save", step=8, num_bytes=1000, stalled_s=0.1, duration_s=0.5)
    events.add("lost", step=11, code=137, reason="rank 1 was ended by SIGKILL & <more>")
    events.add("resume", step=8, checkpoint="x/step-00000008", num_lost_steps=3)
    events.add("end", outcome="done", code=0, reason="done after step 40")
    (folder / "config.yaml").write_text("a: [")  # of no use: the rest is shown all the same
    text = page([read_run(folder)])
    tree = parsed(text)
    assert "resumed after step 8" in text
    marks = [(path.get("class"), path.get("d")) for path in tree.iter("path") if "mark" in path.get("class", "")]
    places = {str(look): float(d.removeprefix("M").split()[0]) for look, d in marks if d}
    assert places.keys() == {"mark short run0", "mark solid bad run0", "mark dotted run0"}, "a good end has no mark"
    assert places["mark short run0"] == places["mark dotted run0"] < places["mark solid bad run0"]
    legend = {icon.tail for icon in tree.iter("i")}
    assert {"checkpoint", "lost a rank", "resumed"} <= legend
    cells = [cell.text for cell in tree.iter("td")]
    assert "rank 1 was ended by SIGKILL & <more>" in cells and "done after step 40" in cells


def test_a_run_shows_its_samples_and_its_sources(tmp_path: Path) -> None:
    """Text of a model may hold anything; a line of step 0 holds losses alone."""
    run = write_run(tmp_path / "run", 30, **{"valid/web/loss": 5.0, "valid/book/loss": 6.0})
    text = "<b>&\x00\x1b]\ufffe\n\tand on"
    (run / "samples.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "tokens": step, "samples": [{"prompt": "go", "text": f"{text}{step}"}]}) + "\n"
            for step in (10, 20)
        )
    )
    lines = (run / "metrics.jsonl").read_text()
    at_start = {"step": 0, "train/consumed_tokens": 0, "valid/loss": 7.0, "valid/web/loss": 7.5}
    (run / "metrics.jsonl").write_text(json.dumps(at_start) + "\n" + lines)
    write_report([read_run(run)], tmp_path / "a.html")
    tree = parsed((tmp_path / "a.html").read_text())
    assert curves(tree, "Validation loss by source").keys() == {"web", "book"}
    cells = [cell.text or "" for cell in tree.iter("td")]
    shown = [cell for cell in cells if cell.startswith("<b>&")]
    assert shown == [f"<b>&\ufffd\ufffd]\ufffd\n\tand on{step}" for step in (20, 10)], "the newest first"
    assert [mark for mark in tree.iter("path") if "bad" in (mark.get("class") or "")] == [], "no loss is no bad loss"


def test_runs_are_named_once_for_all_panels(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, **{"valid/web/loss": 5.0})) for name in ("first", "second")]
    tree = parsed(page(runs))
    assert {"Validation loss: web"} <= set(titles(tree))
    keys = [each for each in tree.iter("div") if each.get("class") == "key"]
    assert keys == [] and sum(each.get("class") == "runs" for each in tree.iter("div")) == 1


def test_a_run_that_lost_its_patience_is_done(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", 30, "evaluate.patience=2", "evaluate.interval=10"))
    assert run.standing.startswith("done after step 30 of 40, as the validation loss has not improved on 4.0000")
    other = read_run(write_run(tmp_path / "other", 30, "evaluate.patience=3", "evaluate.interval=10"))
    assert other.standing == "not finished: step 30 of 40"


def test_the_verb_refuses_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        ([], "run=... is missing"),
        (["runs=x"], "runs is not a key of report; did you mean run?"),
        ([f"run={tmp_path}"], "no folder of a run or of a sweep"),
    ):
        assert main(["report", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    write_run(tmp_path / "sweep" / "job", 3)
    assert find_runs(tmp_path / "sweep") == [tmp_path / "sweep" / "job"]


# --- loads ---


@settings(max_examples=40, deadline=None)
@given(written=st.integers(0, 6), finished=st.integers(0, 6), lost_bytes=st.integers(0, 200))
def test_loads_are_cut_back_on_resume(
    tmp_path_factory: pytest.TempPathFactory, written: int, finished: int, lost_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("loads") / "loads.jsonl"

    def write(first: int, last: int, count: int) -> None:
        sink = LoadsSink(path, first - 1)
        for step in range(first, last + 1):
            sink.write(report(step, loads=[[count, step]] if step % 2 == 0 else None))
        sink.close(failed=False)

    write(1, written, 1)
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - lost_bytes)])
    kept = list(range(2, written + 1, 2))[: path.read_bytes().count(b"\n")]
    write(finished + 1, finished + 3, 2)
    found = [(each.step, each.loads[0]) for each in read_loads(path)]
    expected = [(step, [1, step]) for step in kept if step <= finished]
    assert found == expected + [(step, [2, step]) for step in range(finished + 1, finished + 4) if step % 2 == 0]


def test_which_steps_have_loads() -> None:
    due = [step for step in range(1, 28) if TrackConfig(load_interval=10).loads_due(step, 27)]
    assert due == [1, 10, 20, 27]
    assert not any(TrackConfig(load_interval=0).loads_due(step, 27) for step in range(1, 28))


def test_a_heatmaps_pixels_are_the_loads() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 50, (9, 3, 8))
    counts[:, 1, 5] = 0
    loads = [Loads(step, 100 * step, each.tolist()) for step, each in enumerate(counts, 1)]
    tokens, shares = heatmap.relative(loads, 1)
    assert tokens.tolist() == [100 * step for step in range(1, 10)]
    assert np.allclose(shares, (counts[:, 1] / counts[:, 1].mean(axis=1, keepdims=True)).T)
    data = base64.b64decode(heatmap.picture(shares).split(",")[1])
    pixels = (matplotlib.image.imread(io.BytesIO(data))[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (8, 9)
    assert (pixels[5] == heatmap.palette()[-1]).all()
    for expert, column in np.ndindex(8, 9):
        if shares[expert, column] > 0:
            place = (np.clip(np.log2(shares[expert, column]), -2, 2) + 2) / 4 * (heatmap.NUM_COLORS - 1)
            assert (pixels[expert, column] == heatmap.palette()[round(float(place))]).all()


def test_many_steps_make_few_columns() -> None:
    loads = [Loads(step, step, [[step, 1]]) for step in range(1, 1001)]
    tokens, shares = heatmap.relative(loads, 0)
    assert shares.shape == (2, heatmap.MAX_COLUMNS) and tokens[-1] == 1000
    assert np.allclose(shares.mean(axis=0), 1)


# --- charts ---


@settings(max_examples=100, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e7))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)
    powers = log_ticks(span, span * 1000)
    assert 2 <= len(powers) <= 8 and powers == sorted(powers)


def test_long_curves_are_thinned_by_means() -> None:
    x = np.arange(1.0, 10001.0)
    y = np.sin(x)
    y[:40] = np.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == MAX_POINTS and thin_x[-1] == 10000 and np.isnan(thin_y[0])
    assert np.isclose(np.nansum(thin_y[2:] * 20), y[40:].sum())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_it(tmp_path: Path) -> None:
    """In a real browser: the curves are there, in their colours, and the script breaks nothing."""
    write_report([read_run(write_run(tmp_path / "run", **MEASURED))], tmp_path / "report.html")
    shot = tmp_path / "shot.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1000,900", f"--screenshot={shot}", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=STOP_S)
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    for name, color in {"training": (0x0A, 0x6C, 0x8F), "validation": (0xD9, 0x77, 0x2B)}.items():
        at = np.argwhere((abs(pixels - np.array(color)) < 12).all(axis=-1))
        assert len(at) > 60, name
