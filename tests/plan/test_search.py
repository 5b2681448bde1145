"""Searches against every plan of their space, guesses against plans, and what advice promises against what comes."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.plan import advice, cluster, search
from launch.plan.guess import Guesses
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN
from launch.plan.layout import Layout, change, settings
from launch.plan.page import search as page
from launch.plan.space import Space, space_of
from launch.plan.world import balanced
from tests.train.test_report import parsed
from train.compose import compose

SMALL = [
    "model=tiny",
    "train.global_batch_size=16",
    "train.seq_len=128",
    "zero.engine=native",
    "model.num_hidden_layers=5",
]
HELD = ["precision=bf16", "recompute.norm=true", "train.micro_batch_size=1", "pipeline.stages_per_rank=null"]
H800 = cluster.load("h800")


@pytest.fixture(scope="module")
def found() -> tuple[Space, search.Found]:
    space = space_of([*SMALL, *HELD], 4, H800)
    return space, search.search(space, H800, balanced, num_best=100, num_processes=1)


def test_the_best_of_a_space_is_found(found: tuple[Space, search.Found]) -> None:
    """All layouts of a small space, planned one by one."""
    space, result = found
    kept: dict[str, Any] = {}
    plans = {Layout.of(each): Plan(each, H800, kept=kept) for each in space.layouts()}
    assert len(plans) > 15 and {layout.pp for layout in plans} == {1, 2, 4}
    step_s = {layout: plan.step(AS_WRITTEN).step_s for layout, plan in plans.items()}
    assert [Layout.of(each.config) for each in result.best] == sorted(step_s, key=step_s.__getitem__)
    for each in result.best:
        plan = plans[Layout.of(each.config)]
        assert each.step_s == plan.step(AS_WRITTEN).step_s == pytest.approx(sum(each.parts_s.values()))
        assert each.num_bytes == max(rank.total for rank in plan.ranks)


def test_a_search_is_drawn(found: tuple[Space, search.Found], tmp_path: Path) -> None:
    """Every layout as a point, those that were planned once more, and the table of the terminal."""
    result = found[1]
    small = replace(H800, memory=replace(H800.memory, device_gb=result.best[3].num_bytes / 1e9))
    some = replace(result, best=result.best[:3], too_large=result.best[3:5])
    numbers = search.numbers(some, small)
    written = page.write_search(some, small, numbers, tmp_path / "found")
    assert written.name == "search.html" and json.loads((tmp_path / "found/search.json").read_text()) == numbers
    tree = parsed(written.read_text())
    curves = [each for each in tree.iter("path") if each.get("data-name")]
    points = {each.get("data-name"): str(each.get("d")).count("M") for each in curves}
    assert points == {"guessed": len(result.guesses), "planned": 3, "planned, too large": 2}
    text = "".join(tree.itertext())
    assert all(search.lacks(each, some, small) in text for each in some.too_large)
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert all(row in rows for row in search.cells(some.best))
    assert all(cell in search.table(some, small) for row in search.cells(some.best) for cell in row)


def test_its_settings_are_the_runs(found: tuple[Space, search.Found]) -> None:
    """What is printed composes to the very run that was planned."""
    for each in found[1].best[:4]:
        run = compose([*SMALL, *HELD, *settings(each.config)])
        assert replace(run, pipeline=replace(run.pipeline, short_steps="refuse")) == replace(
            each.config, pipeline=replace(each.config.pipeline, short_steps="refuse")
        )


def test_what_was_typed_stays() -> None:
    typed = ["parallel.pp=2", "pipeline.schedule=zbv", "precision=bf16", "recompute.nodes=[experts]"]
    layouts = list(space_of([*SMALL, *typed], 8, H800).layouts())
    assert layouts and {each.parallel.pp for each in layouts} == {2}
    assert {each.pipeline.schedule for each in layouts} == {"zbv"}
    assert {each.precision.name for each in layouts} == {"bf16"}
    assert all(each.recompute.nodes == ["experts"] and not each.recompute.norm for each in layouts)
    assert {each.parallel.ep for each in layouts} == {1, 2, 4}
    for each in layouts:
        each.check()


def test_guesses_of_memory_are_those_of_plans() -> None:
    """Two sets of traced layers, scaled to other depths, orders, experts, micro-batches and whole nodes recomputed."""
    base = compose(["experiment=v3_16b", "precision=bf16", "train.global_batch_size=64"])
    space = Space(base, 16, 8, {"precision", "parallel.nodes"}, [base.precision])
    layouts = list(space.layouts())
    kept: dict[str, Any] = {}
    guesses = Guesses({Guesses.key(each): Plan(each, H800, kept=kept) for each in search._to_trace(layouts)})
    chosen = [each for each in layouts if each.parallel.pp in (2, 4) and each.parallel.ep in (2, 4)]
    chosen = random.Random(0).sample(chosen, 5)
    assert len({(each.recompute.norm, *each.recompute.nodes) for each in chosen}) > 1
    for each in chosen:
        planned = max(rank.total for rank in Plan(each, H800, kept=kept).ranks)
        # What a pass holds for a moment is taken from the largest layer, and not when the rank is fullest.
        assert guesses.of(each).num_bytes == pytest.approx(planned, rel=0.1), Layout.of(each)


def test_what_does_not_fit_says_what_frees_most(found: tuple[Space, search.Found]) -> None:
    """In memory for no layout at all; and the setting that is named does free what it says."""
    space, result = found
    most_gb = 0.95 * min(each.num_bytes for each in result.best) / 1e9
    tiny = replace(H800, memory=replace(H800.memory, device_gb=most_gb))
    none = search.search(space, tiny, balanced, num_best=3, num_processes=1)
    assert not none.best and len(none.too_large) == 3
    text = search.table(none, tiny)
    assert f"nothing fits in {most_gb:g} GB" in text and "lacks" in text
    row = search.numbers(none, tiny)["too_large"][0]  # type: ignore[index]
    assert row["lacks_bytes"] > 0
    if "frees_most" in row:
        words = [*SMALL, *HELD, *row["settings"], *row["frees_most"].split()]
        freed = row["peak_bytes"] - max(rank.total for rank in Plan(compose(words), tiny).ranks)
        assert freed > 0


def test_stages_are_evened() -> None:
    """Layers move away from the stage with the head until no rank works much longer than the mean."""
    config = compose(
        [*SMALL, "parallel.pp=2", "model.num_hidden_layers=12", "model.vocab_size=65536", "precision=bf16"]
    )
    lopsided = replace(config, pipeline=replace(config.pipeline, layers=[2, 10]))
    plan = Plan(lopsided, H800)
    layers = advice.evened(plan)
    assert sum(layers) == 12 and layers[1] < 6
    works = [max(each.step(AS_WRITTEN).ranks_s) for each in (plan, plan.with_layers(layers))]
    assert works[1] < 0.8 * works[0]


def test_advice_is_of_the_run() -> None:
    small = replace(H800, memory=replace(H800.memory, device_gb=3.0))
    config = compose(["model=v3_16b", "train.global_batch_size=16", "parallel.ep=8", "precision=bf16"])
    (sentence, *_) = advice.advice(Plan(config, small))
    assert re.match(r"It lacks \d+\.\d GB: of single settings \S+=.* frees most, about \d+ GB", sentence)
    assert change(config, config) == ""


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    held = ["parallel.pp=1", "parallel.ep=2", "pipeline.schedule=1f1b", "train.micro_batch_size=1", "precision=bf16"]
    words = [*SMALL, *held, "recompute.norm=false", "parallel.dispatch=flat"]
    assert main(["plan", "search", "cluster=h800", "gpus=4", "json=true", *words]) == 0
    said = json.loads(capsys.readouterr().out)
    (best,) = said["best"]
    assert said["num_layouts"] == 1 and best["layout"]["dp"] == 4 and best["tokens_per_s_per_gpu"] > 0
    for bad, sentence in {
        "gpus=0": "gpus=0 must be at least 1",
        "memory_gb=-1": "memory_gb=-1 must be a number above 0",
        "gpus=7": "gpus=7 has no legal layout",
        "gpu=4": "gpu",
        "memory_gb=0.5": "must be above the reserve",
    }.items():
        asked = [word for word in words if not (bad == "gpus=7" and word.startswith("parallel.ep"))]
        assert main(["plan", "search", "cluster=h800", *asked, bad]) == 2
        assert sentence in capsys.readouterr().err
