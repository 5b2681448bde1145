"""A plan against whole traced ranks, against itself, and DeepSeek-V3's against what was published."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.plan import advice, answer, cluster
from launch.plan.clock import Clock
from launch.plan.events import Event, Launch, Memory
from launch.plan.job import Plan
from launch.plan.kernels import AS_WRITTEN, KERNELS, PUBLISHED
from launch.plan.loads import make_routing
from launch.plan.record import Recorder, events_of
from launch.plan.world import world
from train import loop
from train.compose import compose
from train.split import device_costs

SMALL = [
    "experiment=first_run",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "parallel.pp=2",
    "parallel.dp=2",
    "parallel.ep=2",
    "model.num_hidden_layers=5",
    "model.hidden_size=256",
]
RUNS = {
    "1f1b": ["pipeline.schedule=1f1b", "precision=bf16"],
    "dualpipe": ["pipeline.schedule=dualpipe", "precision=fp8", "recompute.norm=true"],
    "zbv": ["pipeline.schedule=zbv", "parallel.dispatch=two_hop", "parallel.nodes=4"],
}


def whole_rank(plan: Plan, rank: int) -> tuple[int, float, Clock]:
    """One rank's whole step, traced at once: the peak of what it takes, its device's time, and the clock."""
    recorder, config = Recorder(), plan.config
    with world(config, rank, plan.device, recorder=recorder) as job:
        step = job.recipe.at(job.recipe.num_steps - 1)
        micro_batches = list(job.micro_batches(step))
        terms = loop.loss_terms(job, step)

        def run() -> None:
            job.forward_backward(lambda n: job.train_rows.rows(*micro_batches[n]), terms, len(micro_batches))

        # Quantised copies of weights are made once per step, which a plan counts with the optimizer's part.
        run()
        with recorder.on():
            run()
        entries = recorder.entries()
    now = peak = 0
    for entry in entries:
        if isinstance(entry.event, Memory):
            now += entry.event.num_bytes
            peak = max(peak, now)
    clock = Clock(plan.host(AS_WRITTEN))
    pricing = plan.pricing(AS_WRITTEN, beside=plan.step(AS_WRITTEN).has_pairs)
    for event, seconds in pricing.events(events_of(entries)):
        if not is_link(event):
            clock.see(event, seconds, 0)
    return peak, clock.compute_s, clock


def is_link(event: Event) -> bool:
    """What neighbours send waits between actions, not in them."""
    return isinstance(event, Launch) and event.group == "link"


def check_against_whole(plan: Plan, pp_rank: int) -> None:
    """Time, kernels and memory within 1 %, bytes exactly."""
    peak, seconds, clock = whole_rank(plan, pp_rank * plan.config.parallel.dp)
    composed = plan.step(AS_WRITTEN)
    assert plan.ranks[pp_rank].step.num_bytes == pytest.approx(peak, rel=0.01)
    assert composed.ranks_s[pp_rank] == pytest.approx(seconds, rel=0.01)
    totals = composed.pipeline.totals[pp_rank]
    assert totals.num_kernels == pytest.approx(clock.totals.num_kernels, rel=0.01)
    exchanged = {group: size for group, size in clock.totals.sent_bytes.items() if size and group != "link"}
    assert {group: size for group, size in totals.sent_bytes.items() if size} == exchanged


# The two ranks of DualPipe are mirrors of each other: one is looked at. ZB-V holds two chunks as they do.
@pytest.mark.parametrize("name", ["1f1b", "dualpipe", pytest.param("zbv", marks=pytest.mark.slow)])
def test_layers_put_together_are_a_whole_rank(name: str) -> None:
    h100 = cluster.load("h100")
    # The whole rank is priced at once, and does not know which of its actions are pairs.
    figures = replace(h100, exchange=replace(h100.exchange, num_units_taken=0))
    plan = Plan(compose([*SMALL, *RUNS[name]]), figures)
    for pp_rank in (0,) if name == "dualpipe" else (0, 1):
        check_against_whole(plan, pp_rank)


@pytest.mark.slow
@pytest.mark.parametrize("pp_rank", [0, 7, 15])
def test_layers_put_together_are_ranks_of_the_published_job(pp_rank: int) -> None:
    """The first, a middle and the last rank of 2,048, with as few micro-batches as DualPipe takes on 16 ranks."""
    h800 = cluster.load("h800")
    figures = replace(h800, exchange=replace(h800.exchange, num_units_taken=0))
    short = ["train.batch_ramp.start=null", "train.batch_ramp.tokens=0", "train.global_batch_size=4096"]
    plan = Plan(compose(["experiment=v3_h800_2048", "precision=bf16", *short]), figures)
    assert plan.num_micro_batches == 32
    peak, seconds, clock = whole_rank(plan, pp_rank * plan.config.parallel.dp)
    composed = plan.step(AS_WRITTEN)
    assert plan.ranks[pp_rank].step.num_bytes == pytest.approx(peak, rel=0.01)
    assert composed.ranks_s[pp_rank] == pytest.approx(seconds, rel=0.01)
    assert composed.pipeline.totals[pp_rank].num_kernels == pytest.approx(clock.totals.num_kernels, rel=0.01)


@pytest.fixture(scope="module")
def v3() -> Plan:
    """DeepSeek-V3's published job, planned, with no more recomputed than the report has."""
    settings = ["experiment=v3_h800_2048", "recompute.experts_up_proj=false"]
    return Plan(compose(settings), cluster.load("h800"))


def test_the_published_step(v3: Plan) -> None:
    """arXiv 2505.09343, Table 4, and the hours of the technical report's Table 1.

    Their routers' MaxVio is not published. 0.5 was taken with these figures known, so this holds what is planned where
    it is, and is no proof; docs/planner.md says what misses.
    """
    uneven = Plan(v3.config, v3.cluster, make_routing=make_routing(0.5, None))
    figures = answer.column(uneven, PUBLISHED)
    assert figures["step_s"] == pytest.approx(19.926, rel=0.08)
    assert figures["tokens_per_day"] == pytest.approx(272.8e9, rel=0.08)
    assert figures["mfu_causal"] == pytest.approx(0.3894, rel=0.08)
    assert figures["mfu_noncausal"] == pytest.approx(0.4373, rel=0.08)
    assert figures["gpu_hours"] == pytest.approx(2.664e6, rel=0.08)
    assert figures["parts_s"]["1F1B"] == pytest.approx(13.95, rel=0.05)
    assert figures["pair_s"] == pytest.approx(0.1395, rel=0.05)
    # Their own trace of a pair has routers in balance (128.98 ms, 3.3 % of it exposed).
    assert answer.column(v3, PUBLISHED)["pair_s"] == pytest.approx(0.129, rel=0.05)


@pytest.mark.xfail(strict=True, reason="11 % short: our pipeline hides what theirs shows (docs/planner.md)")
def test_the_published_step_in_balance_within_5_percent(v3: Plan) -> None:
    assert answer.column(v3, PUBLISHED)["step_s"] == pytest.approx(19.926, rel=0.05)


def test_stages_are_split_by_what_devices_take(v3: Plan) -> None:
    """Costs of layers, from sizes alone, are those of a plan with kernels as good as DeepSeek's, so that ranks work
    alike. Half a layer at an end is a twentieth of what a rank holds."""
    layers, end = device_costs(v3.config.model, v3.config.train.seq_len, fp8_layers=True)
    planned = advice.kind_seconds(v3, PUBLISHED)
    assert layers[0] / layers[-1] == pytest.approx(planned["dense"] / planned["moe"], rel=0.05)
    assert end / layers[-1] == pytest.approx((planned["head"] + planned["mtp"]) / planned["moe"], abs=0.5)
    assert answer.column(v3, PUBLISHED)["end_over_middle"] <= 1.05


def test_the_published_job_fits(v3: Plan) -> None:
    """In FP8 with the published recompute, routers in balance: docs/planner.md has the budget by component."""
    assert max(rank.total for rank in v3.ranks) <= 1e9 * v3.cluster.memory.device_gb


def test_the_published_job_hides_its_exchanges(v3: Plan) -> None:
    """As written, hops between nodes and inside of them, and the host's reads: DeepSeek's own trace shows 3.3 %."""
    totals = v3.step(AS_WRITTEN).pair_totals
    assert sum(totals.exposed_s.values()) + totals.host_s < 0.02 * totals.length_s


def test_the_published_job_within_its_bounds() -> None:
    """As the experiment stands, with routers out of balance: room in memory for what a plan does not know, ranks that
    work alike, exchanges that hide, few launches, and a utilisation near DeepSeek's."""
    uneven = Plan(compose(["experiment=v3_h800_2048"]), cluster.load("h800"), make_routing=make_routing(0.5, None))
    figures = answer.column(uneven, AS_WRITTEN)
    assert max(figures["peak_bytes"]) <= 76e9
    assert figures["end_over_middle"] <= 1.05
    assert figures["exposed_share_of_pair"] <= 0.02
    assert figures["launches_per_pair"] <= 800
    assert figures["mfu_causal"] >= 0.36


def test_every_figure_of_a_plan_hangs_together(v3: Plan) -> None:
    figures = answer.numbers(v3)
    assert json.loads(json.dumps(figures)) == figures
    steps = [figures[kernels]["step_s"] for kernels in KERNELS]
    assert steps[-1] == min(steps), "nothing is quicker than the bound"
    for kernels in KERNELS:
        column = figures[kernels]
        assert sum(column["parts_s"].values()) == pytest.approx(column["step_s"])
        assert len(column["peak_bytes"]) == 16
        assert 0 <= column["exposed_share_of_pair"] < 1 and 0 < column["other_share"] < 1
    for rank, whole in zip(figures["memory"], figures["as_written"]["peak_bytes"], strict=True):
        kept = ("weights", "quantised_weights", "main_grad", "masters", "moments", "buffers", "reserve")
        assert sum(rank[part] for part in kept) + sum(rank["step"].values()) == whole == rank["total"]
        assert sum(rank["by_micro_batch"].values()) <= sum(rank["step"].values())
    assert figures["costliest_differences"][0]["difference_s"] > 0
    # Rank and mirror hold the same layers and do the same work.
    assert figures["memory"][0]["weights"] == figures["memory"][15]["weights"]


def test_the_picture_of_the_published_job_is_this_plan(v3: Plan) -> None:
    """docs/plan_v3.svg says what this plan does within 10 %: after a larger change it is to be drawn anew, as
    docs/planner.md says."""
    drawing = ElementTree.parse(Path(__file__).parents[2] / "docs" / "plan_v3.svg")
    texts = [str(each.text).strip() for each in drawing.iter("{http://www.w3.org/2000/svg}text")]
    (peak,) = [re.match(r"peak ([\d.]+) GB", text) for text in texts if text.startswith("peak")]
    assert peak is not None and float(peak[1]) == pytest.approx(max(rank.total for rank in v3.ranks) / 1e9, rel=0.1)
    steps, pairs = (
        [float(text.split()[0]) for text in texts if re.fullmatch(rf"[\d.]+ {unit}", text)] for unit in ("s", "ms")
    )
    assert steps[-3:] == pytest.approx([v3.step(kernels).step_s for kernels in KERNELS], rel=0.1)
    assert pairs == pytest.approx([1e3 * v3.step(kernels).pair_totals.length_s for kernels in KERNELS], rel=0.1)


# --- the verb ---


def test_one_screen_for_people_and_one_object_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, *RUNS["1f1b"], "cluster=b200"]
    assert main(["plan", *words, "json=true"]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert figures["fits"] is True and figures["num_ranks"] == 4
    assert main(["plan", *words]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 60 and max(map(len, screen.splitlines())) < 170
    for words_of_it in ("memory  fits", "as written", "tokens/s per device", "what costs most"):
        assert words_of_it in screen


def test_what_cannot_fit_says_by_how_much(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (Path(cluster.CLUSTERS) / "h100.yaml").read_text()
    own = tmp_path / "small.yaml"
    own.write_text(text.replace("device_gb: 84.94", "device_gb: 1.5"))
    assert main(["plan", *SMALL, *RUNS["1f1b"], "train.micro_batch_size=4", f"cluster={own}"]) == 0
    assert "DOES NOT FIT, by" in capsys.readouterr().out


def test_plans_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused stands at the end with its rule, and is in nobody's way."""
    words = [*SMALL, "cluster=h100", "precision=bf16", "pipeline.schedule=1f1b,zbv,dualpipe", "parallel.pp=2,4"]
    assert main(["plan", "compare", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6 and lines[0].split()[:2] == ["step,", "s:"]
    assert "pipeline.num_micro_batches=4 with pipeline.schedule=dualpipe must be" in lines[-1]
    steps = [float(line.split()[1]) for line in lines[1:-1]]
    assert steps == sorted(steps)
    assert main(["plan", "compare", *words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = [*SMALL, "precision=bf16", *(f"{key}={value}" for key, value in found[0]["values"].items())]
    alone = Plan(compose(settings), cluster.load("h100"))
    assert found[0]["as_written"]["step_s"] == alone.step(AS_WRITTEN).step_s
    assert main(["plan", "compare", *SMALL, "cluster=h100"]) == 2
    assert "needs a setting with several values" in capsys.readouterr().err
    assert main(["plan", "compair", *SMALL]) == 2
    assert capsys.readouterr().err == "plan compair is not known; did you mean compare?\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cluster=h8000"], "cluster=h8000 is not known; did you mean h800?"),
        (["cluster=h800", "max_vio=-1"], "max_vio=-1 must be a number of at least 0"),
        (["cluster=h800", "max_vio=0.5", "loads=runs/x/loads.jsonl"], "both say what experts get"),
        (["cluster=h800", "max_vio=1e3"], "max_vio=1000.0 is not from 0 to"),
        (["cluster=h800", "loads=nowhere.jsonl"], "nowhere.jsonl"),
        (["cluster=h800", "model.hidden_sise=4"], "did you mean model.hidden_size"),
        (["cluster=h800", "parallel.ep=3"], "parallel.ep=3"),
    ],
)
def test_refusals(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL[:5], *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1
