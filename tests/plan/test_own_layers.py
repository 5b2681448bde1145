"""A run's own layers, timed: pieces by the names of the trace, a plan that is made of them, and what is not timed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from launch import forecast
from launch.plan import here, own_layers
from launch.plan.events import Enter, Launch
from launch.plan.forecast import write_plan
from launch.plan.job import Plan
from launch.plan.kernels import PUBLISHED
from launch.plan.own_layers import OwnTimes, Timed, as_plain, few_layers, from_plain, own_times, too_large
from launch.plan.own_scales import all_of
from launch.plan.pieces import UPDATE, ZERO_GRAD
from launch.plan.price import Pricing
from launch.plan.state import update_events
from launch.plan.timed import timed
from launch.plan.unmeasured import unmeasured
from tests.plan.jobs import job
from tests.spawn import STOP_S, Ranks
from train import compose
from train.config import RunConfig
from train.stopping import StopRequest

BATCH = "train.global_batch_size=8"
TWO = ["parallel.pp=1", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", BATCH]


def modelled(plan: Plan) -> dict[Enter, float]:
    """What an unmeasured machine's figures say of each piece."""
    pricing = Pricing(plan.cluster, plan.rates, plan.config.precision.name, "as_written", False, False, {}, {})
    found: dict[Enter, float] = {}
    update = pricing.update(update_events(few_layers(plan.config), 0, "cpu"), 0)
    for events in (*(pricing.events(all_of(each)) for each in plan.layers.passes.values()), update):
        enter = Enter("", "", "")
        for event, seconds in events:
            if isinstance(event, Enter):
                enter = event
            if not isinstance(event, Launch):
                found[enter] = found.get(enter, 0.0) + seconds
    return found


@pytest.mark.parametrize("settings", [["parallel.pp=2", "pipeline.schedule=1f1b"], ["precision=bf16"]])
def test_a_plan_is_made_of_what_pieces_took(settings: list[str]) -> None:
    """Pieces that take three times what the figures say make a pipeline that takes three times as long."""
    config = job(BATCH, *settings)
    plain = Plan(config, unmeasured())
    times = OwnTimes({enter: 3 * seconds for enter, seconds in modelled(plain).items()})
    plan = Plan(config, unmeasured(), timed=Timed(times))
    slow, quick = plan.step(), plain.step()
    messages_s = (config.parallel.pp - 1) * 4 * slow.costs.latency
    assert slow.pipeline.simulation.step == pytest.approx(3 * quick.pipeline.simulation.step, abs=2 * messages_s + 1e-9)
    worked_s = [[sum(each.busy_s.values()) + each.host_s for each in step.updates] for step in (slow, quick)]
    assert worked_s[0] == pytest.approx([3 * seconds for seconds in worked_s[1]], rel=0.01)
    assert plan.step(PUBLISHED).step_s == pytest.approx(plain.step(PUBLISHED).step_s), "its kernels were not timed"


def test_what_belongs_to_no_operation_counts_for_its_layer() -> None:
    config = job(BATCH)
    plain = Plan(config, unmeasured())
    times = modelled(plain) | {Enter("moe", "moe", "F"): 1.0, Enter("step", "rest", "U"): 5.0}
    plan = Plan(config, unmeasured(), timed=Timed(OwnTimes(times, once_s={"moe": 7.0})))
    num_moe, num = config.model.num_moe_layers, plan.num_micro_batches
    forwards_s = plan.step().pipeline.simulation.step - plain.step().pipeline.simulation.step
    assert forwards_s == pytest.approx(num_moe * num, rel=0.01)
    assert plan.step().rest_s == pytest.approx(5.0 + 7.0 * num_moe)


def seen(config: RunConfig) -> tuple[dict[str, Any], int]:
    found = own_times(few_layers(config), budget_s=0.0)
    return as_plain(found), dist.get_world_size()


def test_pieces_are_timed_over_all_ranks(ranks: Ranks) -> None:
    """Every piece that a plan knows is timed, also where experts are elsewhere; waits lie where rows travel."""
    config = job(*TWO, "optimizer.ema_decay=0.9", "pipeline.schedule=1f1b")
    (plain, world_size), other = ranks.run(seen, config, world_size=2)
    times = from_plain(json.loads(json.dumps(plain)))
    assert world_size == 2 and other[0]["work_s"] == plain["work_s"], "the mean of all ranks, on every rank"
    plan = Plan(config, unmeasured(), timed=Timed(times))
    known = {enter for enter, seconds in modelled(plan).items() if seconds}
    layers = {enter for enter in known if enter.layer in ("dense", "moe", "mtp", "head", "embedding")}
    assert layers <= times.work_s.keys() and {UPDATE, ZERO_GRAD} <= times.work_s.keys()
    assert all(seconds > -1e-9 for found in (times.work_s, times.waits_s) for seconds in found.values())
    assert times.waits_s[Enter("moe", "dispatch", "F")] > 0 == times.waits_s[Enter("dense", "dense", "F")]
    whole = sum(plan.step().parts_s.values())
    assert whole == pytest.approx(plan.step().step_s) and whole > 0


def test_ranks_take_turns_where_threads_have_no_core() -> None:
    """Four ranks on two cores: twice as long if all work, as long as alone if the others wait, and between in between;
    the share of time in which they work comes out of the plan itself."""
    assert OwnTimes(num_ranks=2).slowdown(1.0) == {}
    times = OwnTimes(turns=2.0, num_ranks=4)
    assert [times.slowdown(share)["move"] for share in (1.0, 0.5, 0.0)] == [2.0, 1.25, 1.0]
    config = job("parallel.pp=4", "pipeline.schedule=1f1b", BATCH, "model.num_hidden_layers=8")
    pieces = modelled(Plan(config, unmeasured()))
    alone, crowded = (
        Plan(config, unmeasured(), timed=Timed(OwnTimes(pieces, turns=turns, num_ranks=4))).step()
        for turns in (1.0, 2.0)
    )
    ratio = crowded.pipeline.simulation.step / alone.pipeline.simulation.step
    worked_s = [sum(totals.busy_s.values()) + totals.host_s for totals in alone.pipeline.totals]
    share = sum(worked_s) / 4 / alone.pipeline.simulation.step
    assert ratio == pytest.approx((1 + 3 * share) / 2, rel=0.02) and 1.2 < ratio < 1.9


def test_few_layers_stand_for_all() -> None:
    mesh = ["parallel.pp=4", "parallel.dp=2", "parallel.ep=2"]
    config = job(BATCH, *mesh, "model.num_hidden_layers=40", "train.freeze=[embed_tokens.*]")
    few = few_layers(config)
    assert (few.parallel.pp, few.parallel.dp, few.parallel.ep) == (1, 8, 2)
    assert few.model.num_hidden_layers == 1 + own_layers.MOST_LAYERS
    assert few.model.hidden_size == config.model.hidden_size
    few.check()


def test_what_is_too_large_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = few_layers(job(BATCH))
    assert too_large(config) == ""
    monkeypatch.setattr(own_layers, "free_bytes", lambda: 1e6)
    assert "were not timed: they need about" in too_large(config)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    many = job("parallel.pp=8", BATCH, "train.micro_batch_size=1", "model.num_hidden_layers=8")
    assert timed(many).reason.endswith("not timed: 8 ranks are above the 4 that this machine's cores take")


def test_ranks_that_fail_leave_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Mapping[str, Any]:
        raise ValueError("rank 1 was ended by SIGKILL")

    monkeypatch.setattr("launch.plan.timed.found_by", fails)
    assert timed(job(BATCH)) == Timed(None, "the run's layers could not be timed: rank 1 was ended by SIGKILL")


@pytest.mark.parametrize("found", [{"reason": "too large"}, {"work_s": 3}], ids=["not timed", "nonsense"])
def test_a_plan_that_fails_is_a_sentence(
    tmp_path: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing has been measured
    resolved, out = tmp_path / "run.yaml", tmp_path / "plan.json"
    resolved.write_text(compose.text(job(BATCH)))
    write_plan(resolved, found, out)
    figures = json.loads(out.read_text())
    assert "step_s" not in figures and figures["reason"]
    assert ("peak_bytes" in figures) == ("reason" in found), "memory needs no figures of a machine"


def test_a_forecast_is_made_beside_the_run(tmp_path: Path) -> None:
    """By ranks and a process of its own, into the run's folder, where an older one is not left."""
    config = job(BATCH, f"run.dir={tmp_path / 'run'}", "run.device=cpu", "model.hidden_size=32", "train.seq_len=16")
    out = tmp_path / "run" / forecast.NAME
    out.parent.mkdir()
    out.write_text("old")
    with mock.patch.object(forecast, "LIMIT_S", STOP_S), forecast.Forecast(config, StopRequest()) as made:
        assert made.variables == {"HALOCLINE_PLAN": str(out)}
        end_s = time.monotonic() + STOP_S
        while not (out.exists() and out.read_text() != "old"):
            assert time.monotonic() < end_s
            time.sleep(0.05)
    figures = json.loads(out.read_text())
    assert figures["step_s"] > 0 and figures["peak_bytes"] > 0 and figures["reason"] == ""


@pytest.mark.parametrize("settings", [["track.plan=false"], ["run.device=cuda"]])
def test_what_is_not_planned(tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "found_by", None)
    config = job(BATCH, f"run.dir={tmp_path / 'run'}", *settings)
    with forecast.Forecast(config, StopRequest()) as made:
        assert made.variables == {}
    assert not (tmp_path / "run").exists()
