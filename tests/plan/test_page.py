"""A plan's page: well-formed, whole by itself, with the figures of the JSON that lies beside it."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from launch.__main__ import main
from launch.plan import answer, cluster
from launch.plan.job import Plan
from launch.plan.kernels import KERNELS
from launch.plan.layers import Kept
from launch.plan.page import write
from launch.plan.page.timeline import timeline_section
from tests.spawn import STOP_S
from tests.train.test_report import CHROMIUM, parsed
from train.compose import compose
from train.view.report.panels import short_bytes

WORDS = ["experiment=first_run", "model.num_hidden_layers=3", "pipeline.schedule=dualpipe", "parallel.pp=2"]
# Without a pipeline, without experts, without anybody to talk to.
ALONE = ["model=tiny_dense"]


@pytest.fixture(scope="module")
def kept() -> Kept:
    """Layers that several plans have."""
    return {}


@pytest.fixture(scope="module")
def plan(kept: Kept) -> Plan:
    return Plan(compose([*WORDS, "run.name=<a> & 'b'"]), cluster.load("h800"), kept=kept)


@pytest.fixture(scope="module")
def figures(plan: Plan) -> dict[str, Any]:
    return answer.numbers(plan)


@pytest.fixture(scope="module")
def text(plan: Plan, figures: dict[str, Any]) -> str:
    return write.page_of(plan, figures)


@pytest.fixture(scope="module")
def alone() -> Plan:
    return Plan(compose(ALONE), cluster.load("h800"))


def words_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def headings(text: str) -> list[str]:
    return [str(each.text).strip() for name in ("h1", "h2", "h3") for each in parsed(text).iter(name)]


def panel(text: str, title: str) -> ElementTree.Element:
    """The section that has this heading."""
    return next(
        each
        for each in parsed(text).iter("section")
        if any(str(head.text).strip() == title for head in each.findall("h3"))
    )


def bars(section: ElementTree.Element) -> list[tuple[str, list[float], list[str]]]:
    """Of each row of bars its name, the widths of its parts in per cent, and its figures."""
    found = []
    for grid in section.iter("div"):
        if grid.get("class") != "bars":
            continue
        for cell in grid:
            if cell.get("class") == "name":
                found.append((words_of(cell), list[float](), list[str]()))
            elif cell.get("class") == "track":
                styles = [str(part.get("style")) for part in cell.iter("i")]
                found[-1][1].extend(float(style[len("width:") : -1]) for style in styles)
            elif found and cell.tag == "span":
                found[-1][2].append(words_of(cell))
    return found


def test_the_page_is_whole_by_itself(text: str) -> None:
    parsed(text)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|<img|fetch\(|XMLHttp", text)
    assert re.findall(r'(?:src|href)="', text) == []
    assert "&lt;a&gt; &amp;" in text, "the settings of the run are text"
    assert "nan" not in re.sub(r"<script>.*|<pre>.*?</pre>", "", text, flags=re.S).lower()


def test_heading_and_sets_are_those_of_the_json(text: str, figures: dict[str, Any]) -> None:
    assert figures["fits"] is True
    assert words_of(next(parsed(text).iter("h1"))).endswith("on 4 devices: fits")
    rows = {words_of(row[0]): [words_of(cell) for cell in row[1:]] for row in parsed(text).iter("tr") if len(row) == 4}
    for name, key, scale in (("step, ms", "step_s", 1e3), ("tokens/s per device", "tokens_per_s_per_gpu", 1.0)):
        shown = [float(cell.replace(",", "")) for cell in rows[name]]
        assert shown == pytest.approx([scale * figures[kernels][key] for kernels in KERNELS], rel=1e-2, abs=1e-3)
    parts = figures["as_written"]["parts_s"]
    assert {part: float(rows[part][0]) for part in parts} == pytest.approx(
        {part: 1e3 * seconds for part, seconds in parts.items()}, abs=1e-3
    )


def test_the_timeline_has_every_action(text: str, plan: Plan) -> None:
    said = [str(each.text) for each in parsed(text).iter("title")]
    actions = [event.action for event in plan.step().pipeline.simulation.events]
    assert len(actions) == sum(map(len, plan.schedule.ranks))
    for action in actions:
        # A pair is two bars, one over the other.
        assert sum(each.endswith(f": {action.words}") for each in said) == (2 if action.kind == "pair" else 1)
    assert sum(each.endswith("the optimizer") for each in said) == 2


def test_a_long_step_is_shown_in_stretches(kept: Kept, text: str) -> None:
    """Its beginning, a part of its middle and its end, all equally long, below a picture of all of it."""
    stretches = ["The beginning", "A stretch of the middle", "The end"]
    assert not set(stretches) & set(headings(text))
    num_layers = len(kept)
    longer = Plan(compose([*WORDS, "train.global_batch_size=256"]), cluster.load("h800"), kept=kept)
    section = timeline_section(longer)
    assert len(kept) == num_layers, "layers are traced anew for a longer step"
    assert [each for each in stretches if f"<h3>{each} " in section] == stretches
    spans = [tuple(map(float, each)) for each in re.findall(r"seconds ([\d.e-]+) to ([\d.e-]+)<", section)]
    lengths = [stop - start for start, stop in spans]
    assert lengths == pytest.approx([lengths[0]] * 3, rel=0.02)
    assert spans[0][0] == 0 and spans[2][1] == pytest.approx(longer.step().step_s, rel=1e-3)
    assert section.count("<svg") == 4


def test_memory_over_the_step_adds_up_to_the_peak(text: str, figures: dict[str, Any]) -> None:
    found = figures["memory_over_step"]
    fullest = figures["memory"][found["rank"]]
    totals = np.sum(list(found["during"].values()), axis=0) + sum(found["always"].values())
    assert totals.max() == totals[found["peak_at"]] == fullest["total"] == max(figures["as_written"]["peak_bytes"])
    assert found["actions"][found["peak_at"]] == fullest["at"]
    after = np.sum(list(found["after"].values()), axis=0) + sum(found["always"].values())
    assert (after <= totals).all()
    # The areas of the picture are as high, where the step is at its peak; what an idle device holds is not drawn.
    (svg,) = [each for each in parsed(text).iter("svg") if each.get("data-across") == "s"]
    at = (found["start_s"][found["peak_at"]] + found["stop_s"][found["peak_at"]]) / 2
    x, high = 1000 * at / float(svg.get("data-x", "")), float(svg.get("data-high", ""))
    drawn = 0.0
    for path in svg.iter("path"):
        if str(path.get("class")).startswith("area"):
            points = [tuple(map(float, each)) for each in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.get("d", ""))]
            (over,) = [place for place in range(0, len(points) // 2, 2) if points[place][0] <= x < points[place + 1][0]]
            drawn += (points[-1 - over][1] - points[over][1]) / 1000 * high
    assert drawn == pytest.approx((fullest["total"] - fullest["reserve"]) / 1e6, rel=2e-3)


def test_what_is_alive_at_the_peak(text: str, figures: dict[str, Any]) -> None:
    fullest = figures["memory"][figures["memory_over_step"]["rank"]]
    shown = {name: figure for name, _, (figure,) in bars(panel(text, "Alive at the peak"))}
    assert shown == {
        f"micro-batch {number} on stage {stage}": short_bytes(size)
        for (stage, number), size in ((key.split("."), size) for key, size in fullest["by_micro_batch"].items())
    }
    tensors = words_of(panel(text, "Largest tensors at the peak"))
    for label, size in fullest["largest"].items():
        assert f"{short_bytes(size)}{label}" in tensors.replace("GB ", "GB").replace("MB ", "MB")


def test_all_ranks_side_by_side(text: str, figures: dict[str, Any]) -> None:
    rows = bars(panel(text, "Every rank of the pipeline at its own peak"))
    peaks = figures["as_written"]["peak_bytes"]
    assert [figure for *_, (figure,) in rows] == [short_bytes(peak) for peak in peaks]
    longest = max(sum(widths) for _, widths, _ in rows)
    assert longest == pytest.approx(100, abs=1)


def test_time_by_part_and_by_rank(text: str, figures: dict[str, Any]) -> None:
    steps, by_node = (figures[kernels] for kernels in KERNELS), bars(panel(text, "The step by its parts"))
    # Two pictures lie in the panel: three rows of the step, three of a pair.
    for column, (_, widths, _), (_, inside, _) in zip(steps, by_node[:3], by_node[3:], strict=True):
        first, pair = figures["as_written"]["step_s"], figures["as_written"]["pair_s"]
        assert sum(widths) == pytest.approx(100 * column["step_s"] / first, abs=0.1)
        assert sum(inside) == pytest.approx(100 * column["pair_s"] / pair, abs=0.1)
        assert sum(column["pair_by_part_s"].values()) == pytest.approx(column["pair_s"])
        for times in column["rank_time_s"]:
            assert sum(times.values()) == pytest.approx(column["step_s"])
    pieces = {name: shown for name, _, shown in bars(panel(text, "By layer, node and pass"))}
    for piece in figures["costliest_differences"]:
        assert float(pieces[piece["piece"]][0]) == pytest.approx(1e3 * piece["as_written_s"], rel=0.01, abs=1e-3)
    assert sum(float(shown[0]) for shown in pieces.values()) == pytest.approx(
        1e3 * figures["as_written"]["pair_s"], rel=0.01
    )


def test_traffic_counts_every_message(plan: Plan, text: str, figures: dict[str, Any]) -> None:
    found = {each["level"]: each for each in figures["as_written"]["traffic"]}
    assert {"ep", "link", "dense", "world"} <= set(found)
    # Each micro-batch passes the one border between two ranks once on its way and once back.
    assert found["link"]["sent_bytes_per_rank"] * 2 == 2 * plan.num_micro_batches * plan.boundary_bytes
    exchanged = sum(totals.sent_bytes["ep"] for totals in plan.step().pipeline.totals)
    assert found["ep"]["sent_bytes_per_rank"] * 2 == exchanged > 0
    tokens = plan.num_tokens / plan.config.parallel.dp
    for each in found.values():
        assert each["sent_bytes_per_token"] * tokens == pytest.approx(2 * each["sent_bytes_per_rank"])
    rows = [words_of(row) for row in parsed(text).iter("tr")]
    for level, each in found.items():
        assert any(row.startswith(f"{level}: ") and short_bytes(each["sent_bytes_per_token"]) in row for row in rows)


def test_without_pairs_a_forward_and_its_backward_are_told_together(alone: Plan) -> None:
    """Of one micro-batch through one stage, so that no half of the work is left out of the pieces."""
    step, figures = alone.step(), answer.numbers(alone)["as_written"]
    forward, backward = step.pair
    assert (forward.kind, backward.kind) == ("F", "D") and str(forward)[1:] == str(backward)[1:]
    assert figures["pair"] == f"{forward} {backward}"
    assert figures["pair_s"] == pytest.approx(step.costs.cost(forward).seconds + step.costs.cost(backward).seconds)
    assert {piece.split()[-1] for piece in figures["pair_by_part_s"] if piece != "waits for the host"} == set("FBW")


def test_what_does_not_apply_is_not_there(alone: Plan, text: str) -> None:
    page = write.page_of(alone, answer.numbers(alone))
    missing = {"One pipeline's step", "Every rank of the pipeline at its own peak", "Traffic"}
    assert missing <= set(headings(text)) and not missing & set(headings(page))
    assert not re.search("experts over|dispatch|combine", page.split("<pre>")[0].split("</style>")[1])


def test_out_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page, or a folder for one; what stood there is replaced."""
    folder = tmp_path / "deep" / "v3"
    assert main(["plan", *ALONE, "cluster=h800", f"out={folder}", "json=true"]) == 0
    printed = capsys.readouterr().out
    assert {each.name for each in folder.iterdir()} == {"plan.html", "plan.json"}
    assert (folder / "plan.json").read_text() == printed
    own = tmp_path / "own.html"
    own.write_text("old " * 10**6)
    assert main(["plan", *ALONE, "cluster=h800", f"out={own}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {own}"
    assert own.read_text() == (folder / "plan.html").read_text() and (tmp_path / "own.json").read_text() == printed
    assert {each.name for each in tmp_path.iterdir()} == {"deep", "own.html", "own.json"}, "nothing left aside"


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("file/plan", "cannot be written"),
        ("file/plan.html", "cannot be written"),
        ("folder.html", "folder.html is a folder"),
        ("plan.pdf", "must end in .html, .svg, .png"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_traced(
    out: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr("launch.plan.job.layers_of", lambda *_: pytest.fail("traced"))
    assert main(["plan", *ALONE, "cluster=h800", f"out={tmp_path / out}"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1
    assert {each.name for each in tmp_path.iterdir()} == {"file", "folder.html"}


@pytest.mark.parametrize(
    ("part", "out", "sentence"),
    [("compare", "plan.html", "plan compare draws nothing"), ("search", "plan.svg", "plan search writes a page")],
)
def test_several_plans_are_no_picture(
    part: str, out: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", part, *ALONE, "cluster=h800", "parallel.dp=1,2", f"out={tmp_path / out}"]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_plan_that_fails_to_be_drawn_leaves_the_old_page(
    alone: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plan.html"
    out.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match="cannot be written"):
        write.write(alone, answer.numbers(alone), out)
    assert [each.name for each in tmp_path.iterdir()] == ["plan.html"] and out.read_text() == "old"


def test_a_picture(plan: Plan, figures: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "plan.svg"
    assert write.write(plan, figures, out) == out
    tree = ElementTree.parse(out)
    words = {words_of(each) for each in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {"as written", "published", "bound", "activations"} <= words
    assert any(word.startswith("peak ") and figures["memory_over_step"]["actions"] for word in words)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_draws_it(text: str, tmp_path: Path) -> None:
    """In a real browser: bars and areas are there in their colours, and the script breaks nothing."""
    page, shot = tmp_path / "plan.html", tmp_path / "shot.png"
    page.write_text(text)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1200,2600", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=STOP_S)
    pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
    colors = {"activations": (0xD9, 0x77, 0x2B), "a forward": (0xF6, 0xB6, 0x4B), "a backward": (0x8F, 0xCF, 0x8A)}
    for name, color in colors.items():
        assert (abs(pixels - np.array(color)) < 12).all(axis=-1).sum() > 500, name
