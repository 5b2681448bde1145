"""Pictures: what is drawn is what the steps say. Looks are judged by eye; these tests keep them from breaking."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from launch import recipe as launch_recipe
from tests.train.test_metrics import report
from tests.train.test_recipe import V3_LR, V3_MOE, V3_MTP, V3_TRAIN, tiny
from train.recipe.config import BatchRampConfig, LrPhaseConfig, LrSchedulerConfig
from train.recipe.recipe import Recipe
from train.view import curves as picture
from train.view.curves import draw_loss, short_rate, short_tokens, smooth


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, for a look at what they hold."""
    figures: list[Figure] = []
    save = picture.save

    def keep(figure: Figure, out: Path) -> None:
        figures.append(figure)
        save(figure, out)

    monkeypatch.setattr(picture, "save", keep)
    monkeypatch.setattr(launch_recipe, "save", keep)
    return figures


def run(num_steps: int, **values: Any) -> list[dict[str, float]]:
    return [report(step, **values).values for step in range(1, num_steps + 1)]


def texts(figure: Figure) -> str:
    return " | ".join(
        text.get_text()
        for axes in figure.axes
        for text in (*axes.texts, axes.title, axes._left_title, axes._right_title, *key_of(axes))
    )


def key_of(axes: Any) -> list[Any]:
    return axes.get_legend().get_texts() if axes.get_legend() else []


def test_a_run_is_drawn_as_its_steps_say(drawn: list[Figure], tmp_path: Path) -> None:
    steps = run(200)
    for step in steps[49::50]:
        step["valid/loss"] = step["train/loss"] + 0.5
    draw_loss({"tiny": steps}, tmp_path / "loss.png", unigram_entropy=3.25)
    (figure,) = drawn
    top, bottom = figure.axes
    raw, smoothed, valid = (np.array(line.get_xydata()) for line in top.lines[:3])
    assert raw.tolist() == [[step["train/consumed_tokens"], step["train/loss"]] for step in steps]
    assert smoothed[0].tolist() == raw[0].tolist() and len(smoothed) == 200
    assert valid.tolist() == [[1000 * n, 5 / n + 0.5] for n in (50, 100, 150, 200)]
    assert top.lines[3].get_ydata() == [3.25, 3.25]
    assert np.array(bottom.lines[0].get_xydata()).tolist() == [[step["train/consumed_tokens"], 1e-3] for step in steps]
    for words in ("tiny", "training", "validation 0.525", "unigram entropy 3.25", "Learning rate"):
        assert words in texts(figure)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_runs_over_each_other_keep_their_colours_and_names(drawn: list[Figure], tmp_path: Path) -> None:
    runs = {f"run {index}": run(60 + index) for index in range(10)}
    draw_loss(runs, tmp_path / "many.png", title="A sweep")
    (figure,) = drawn
    top, bottom = figure.axes
    assert [text.get_text() for text in key_of(top)] == list(runs)
    assert len(bottom.lines) == 10 and "A sweep" in texts(figure)
    assert len({line.get_color() for line in bottom.lines[:8]}) == 8


@pytest.mark.parametrize("losses", [[], [5.0], [math.nan], [5.0, math.inf], [5.0, math.nan, 4.0], [1.0] * 60])
def test_odd_runs_can_be_drawn(losses: list[float], drawn: list[Figure], tmp_path: Path) -> None:
    steps = [report(step, **{"train/loss": loss}).values for step, loss in enumerate(losses, start=1)]
    draw_loss({"odd": steps}, tmp_path / "deep" / "loss.png")
    assert ("loss not finite" in texts(drawn[0])) == any(not math.isfinite(loss) for loss in losses)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=1, max_size=230), st.integers(1, 60))
def test_smooth_equals_plain_windows(values: list[float], num_windows: int) -> None:
    n = len(values)
    for at, value in enumerate(smooth(np.array(values), num_windows)):
        half = min(n // num_windows // 2, at)
        window = [v for v in values[at - half : at + half + 1] if not math.isnan(v)]
        expected = sum(window) / len(window) if window else math.nan
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_short_forms() -> None:
    assert [short_tokens(n) for n in (0, 999, 12_600_000, 469e9, 14.8e12)] == ["0", "999", "12.6M", "469B", "14.8T"]
    assert [short_rate(r) for r in (0, 2.2e-4, 7.3e-6, 1e-3, 1)] == ["0", "2.2e-4", "7.3e-6", "1e-3", "1e0"]


def test_v3_schedule_is_drawn_with_its_borders(drawn: list[Figure], tmp_path: Path) -> None:
    schedule = Recipe(V3_TRAIN, V3_LR, V3_MOE, V3_MTP)
    table = launch_recipe.draw(schedule, tmp_path / "v3.png")
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    assert ["10T", f"{schedule.step_at(10**13):,}", "LR cosine 0.00022 -> 2.2e-05"] in rows
    assert rows[-1] == ["14.8T", f"{schedule.num_steps:,}", "the run ends"]
    assert [row[2] for row in rows if row[0] == "14.3T"] == ["LR constant 2.2e-05", "bias speed 0"]
    lr, batch, bias, mtp = (np.array(axes.lines[0].get_xydata()) for axes in drawn[0].axes)
    assert lr[:, 1].max() == 2.2e-4 and lr[-1].tolist() == [schedule.at(schedule.num_steps - 1).consumed_tokens, 7.3e-6]
    assert set(batch[[0, -1], 1]) == {3072, 15360}
    # A jump is drawn where it is: at the first token of the step that changes.
    for curve, tokens in ((bias, 14_300 * 10**9), (mtp, 10**13)):
        jump = curve[np.flatnonzero(np.diff(curve[:, 1]))[0] + 1, 0]
        assert jump == schedule.tokens_before(schedule.step_at(tokens))


@pytest.mark.parametrize("max_steps", [1, 3, 40])
def test_small_schedules_can_be_drawn(max_steps: int, tmp_path: Path) -> None:
    lr = LrSchedulerConfig(0.0, 5, [LrPhaseConfig("linear", end_lr=0.0)])
    schedule = tiny(lr, batch_ramp=BatchRampConfig(2, 200, 2), max_steps=max_steps)
    *lines, last = launch_recipe.draw(schedule, tmp_path / "x.png").splitlines()
    if max_steps < 5:
        assert last.startswith("note: the warm-up of lr_scheduler.warmup_steps=5 does not end within")
        last = lines[-1]
    assert last.endswith("the run ends")
