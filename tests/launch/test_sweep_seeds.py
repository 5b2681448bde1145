"""Jobs of a sweep that differ in their seed alone: their mean and spread, in numbers, as a table, as a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from launch.__main__ import main
from launch.sweep import picture, table
from launch.sweep.config import SweepConfig
from launch.sweep.jobs import Outcome
from launch.sweep.run import sweep
from launch.sweep.search import Proposal
from launch.sweep.seeds import Spread, grouped
from tests.launch.test_sweep import FakeMachine

CONFIG = SweepConfig()


def job(number: int, values: dict[str, str], loss: float, status: str = "finished", folder: Path = Path()) -> Outcome:
    return Outcome(Proposal(number, f"job {number}", values), folder, status, "", 1, loss - 0.1, loss, loss)


def jobs(losses: dict[tuple[str, str], float]) -> list[Outcome]:
    """By (rate, seed)."""
    return [
        job(number, {"lr": lr, "train.seed": seed}, loss) for number, ((lr, seed), loss) in enumerate(losses.items())
    ]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_a_spread_is_what_numpy_says(numbers: list[float]) -> None:
    spread = Spread.of(numbers)
    assert (spread.mean, spread.count) == (pytest.approx(np.mean(numbers), rel=1e-12, abs=1e-12), len(numbers))
    if len(numbers) > 1:
        assert spread.deviation == pytest.approx(np.std(numbers, ddof=1), rel=1e-9, abs=1e-9)
    else:
        assert math.isnan(spread.deviation) and "±" not in str(spread)


def test_groups_are_ranked_by_their_means_and_bad_seeds_come_last() -> None:
    found = jobs({("1", "0"): 3.0, ("1", "1"): 5.0, ("2", "0"): 3.5, ("2", "1"): 3.7, ("3", "0"): 1.0, ("3", "1"): 9.0})
    found[-1].status, found[-1].value = "diverged", math.nan
    groups = grouped(table.ranked(found, CONFIG), CONFIG)
    assert [(each.values["lr"], each.status) for each in groups] == [
        ("2", "finished"), ("1", "finished"), ("3", "1 finished, 1 diverged"),
    ]  # fmt: skip
    assert groups[0].value.mean == pytest.approx(3.6) and groups[2].value.count == 1
    upwards = SweepConfig(direction="maximize")
    assert [each.values["lr"] for each in grouped(table.ranked(found, upwards), upwards)] == ["1", "2", "3"]


def test_the_table_has_a_row_for_all_seeds_and_one_for_each(tmp_path: Path) -> None:
    found = jobs({("1", "0"): 3.0, ("1", "1"): 4.0, ("1", "2"): 5.0, ("2", "0"): 2.0})
    rows = table.write_means(found, ["lr", "train.seed"], CONFIG, tmp_path / "seeds.csv")
    assert rows[0] == ["lr", "train.seed", "status", "step", "train/loss", "valid/loss", "n", "reason"]
    assert [row[:2] + row[5:7] for row in rows[1:]] == [
        ["2", "all", "2.0000", "1"], ["", "0", "2.0000", ""],
        ["1", "all", "4.0000 ± 1.0000", "3"], ["", "0", "3.0000", ""], ["", "1", "4.0000", ""], ["", "2", "5.0000", ""],
    ]  # fmt: skip
    with (tmp_path / "seeds.csv").open() as file:
        means = list(csv.DictReader(file))
    assert [(each["lr"], each["valid/loss mean"], each["valid/loss deviation"], each["n"]) for each in means] == [
        ("2", "2", "nan", "1"), ("1", "4", "1", "3"),
    ]  # fmt: skip


def test_a_sweep_over_seeds_says_its_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.max_steps=2", f"run.dir={tmp_path / 'run'}", "lr_scheduler.lr=0.001,0.002", "train.seed=1,2,3"]
    assert sweep(words, FakeMachine()) == 0
    out = capsys.readouterr().out
    assert out.count(" all ") == 2 and out.count("±") == 4
    root = tmp_path / "run-sweep"
    assert len((root / "seeds.csv").read_text().splitlines()) == 3
    assert len((root / "results.csv").read_text().splitlines()) == 7, "every job by itself, as ever"
    assert (root / "sweep.png").stat().st_size > 0


# --- the picture ---


def drawn(outcomes: Sequence[Outcome], varied: Sequence[str], out: Path) -> Figure:
    """The figure that is about to be written."""
    found: list[Any] = []
    with mock.patch.object(picture, "save", lambda figure, _: found.append(figure)):
        picture.draw_sweep(table.ranked(outcomes, CONFIG), varied, CONFIG, out)
    return found[0]


def words_of_key(figure: Figure) -> list[str]:
    key = figure.axes[0].get_legend()
    return [] if key is None else [text.get_text() for text in key.get_texts()]


def with_curves(outcomes: Sequence[Outcome], folder: Path, num_steps: int = 30) -> list[Outcome]:
    for outcome in outcomes:
        outcome.folder = folder / str(outcome.proposal.number)
        outcome.folder.mkdir()
        steps = range(num_steps if outcome.status == "finished" else 5)
        rows = [{"step": step, "valid/loss": 9.0, "train/consumed_tokens": 10 * step} for step in (0, *steps)]
        for row in rows[1:]:
            row["train/loss"] = outcome.value + 3 / (1 + row["step"])
        (outcome.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(outcomes)


def test_seeds_are_one_curve_in_a_band(tmp_path: Path) -> None:
    found = jobs({("1", "0"): 3.0, ("1", "1"): 4.0, ("1", "2"): 5.0, ("2", "0"): 3.5, ("2", "1"): 3.5})
    figure = drawn(with_curves(found, tmp_path), ["lr", "train.seed"], tmp_path / "a.png")
    curves, (panel,) = figure.axes[0], figure.axes[1:]
    assert words_of_key(figure) == ["lr=2", "lr=1"]
    assert len(curves.get_lines()) == len(curves.collections) == 2
    mean = next(line for line in curves.get_lines() if line.get_label() == "lr=1")
    assert mean.get_ydata()[-1] == pytest.approx(4.0 + 3 / 30)
    band = next(path for each in curves.collections for path in each.get_paths() if path.vertices[:, 1].max() > 6)
    assert band.vertices[:, 1].min() == pytest.approx(3.0 + 3 / 30), "one deviation below the mean"
    assert panel.get_title(loc="left") == "lr", "a seed is no setting to compare"
    dots = [float(line.get_ydata()[0]) for line in panel.get_lines() if len(line.get_ydata()) == 1]
    assert sorted(dots) == [3.0, 3.5, 3.5, 3.5, 4.0, 4.0, 5.0], "each job, and two means"


def test_what_all_jobs_share_is_not_in_the_key_and_no_word_is_there_twice(tmp_path: Path) -> None:
    shared = {"data.seed": "7", "lr_scheduler.lr": "0.1"}
    long = "a word of many letters that goes on for very long, "
    found = [
        job(0, {**shared, "run.name": long + "first", "model.seed": "1"}, 3.0),
        job(1, {**shared, "run.name": long + "second", "model.seed": "1"}, 4.0),
        job(2, {**shared, "run.name": long + "third", "model.seed": "1", "train.seed": "1"}, 5.0, "diverged"),
        job(3, {**shared, "run.name": long + "third", "model.seed": "1", "train.seed": "2"}, 5.0, "diverged"),
    ]
    for outcome in found[:2]:
        outcome.proposal.values["train.seed"] = "1"
    varied = ["data.seed", "lr_scheduler.lr", "run.name", "model.seed", "train.seed"]
    words = words_of_key(drawn(with_curves(found, tmp_path), varied, tmp_path / "a.png"))
    assert len(words) == len(set(words)) == 3 and all(word.startswith("name=a word") for word in words)
    assert [word for word in words if "0.1" in word or "seed" in word] == []


def test_settings_of_one_last_word_are_told_apart() -> None:
    found = [job(n, {"data.seed": str(n), "model.seed": str(n % 2)}, 3.0 + n) for n in range(4)]
    groups = grouped(found, CONFIG)
    assert picture.labels_of(groups, ["data.seed", "model.seed"])[1] == "data.seed=1, model.seed=1"


def test_seeds_alone_make_one_band(tmp_path: Path) -> None:
    found = jobs({("1", str(seed)): 3.0 + seed for seed in range(3)})
    figure = drawn(with_curves(found, tmp_path), ["train.seed"], tmp_path / "a.png")
    assert words_of_key(figure) == [] and len(figure.axes[0].get_lines()) == 1
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "1", "2"]


# --- the metric ---


@pytest.mark.parametrize("metric", ["valid/web/loss", "valid/<source>/los", "valid//loss"])
def test_a_sources_metric_needs_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str) -> None:
    words = [f"run.dir={tmp_path / 'run'}", "lr_scheduler.lr=0.1,0.2", f"sweep.metric={metric}"]
    assert main(["local", "--multirun", *words]) == 2
    assert f"sweep.metric={metric}" in capsys.readouterr().err
    assert not (tmp_path / "run-sweep").exists()


def test_a_sources_metric_is_known_where_the_source_is(tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path / 'run'}", "train.seed=1,2", "sweep.metric=valid/web/loss", "train.max_steps=1"]
    assert sweep([*words, "data.valid_sources=[{name: web, source: web.txt}]"], FakeMachine()) == 0
