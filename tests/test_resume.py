"""A run that was killed or stopped, and then given the same command again, is the run that never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as launch_main
from tests.deviation import worst
from tests.launched import Forked, last_step, local, torchrun
from tests.plain_run import PlainRun, plain_run
from tests.runs import SMALL, Finished, forget_after, last_checkpoint, prepare_text, run_in, train_main
from tests.spawn import Ranks
from train import run_folder
from train.compose import compose
from train.track.events import EVENTS
from train.track.metrics_file import read_metrics

NUMBERS = ("train/", "valid/", "moe/")
FOUR = ["parallel.dp=4", "parallel.ep=2", "parallel.dispatch=flat"]
NUM_STEPS = 10
LONG = [f"train.max_steps={NUM_STEPS}", "evaluate.interval=4", "checkpoint.interval=3", "checkpoint.async_mode=async"]
CONSTANT = ["lr_scheduler.phases=[{kind:constant}]"]  # no phase's border depends on the end
# A run that is asked to stop is not done before it hears of it, however late; how far it gets is its own matter.
ENDLESS = [*LONG, *CONSTANT, "train.max_steps=1000000"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture
def dice() -> random.Random:
    """Other moments every time; where a test fails its report says how to repeat them."""
    return random.Random(int(os.environ["HALOCLINE_SEED"]))


def numbers(run: Finished) -> list[dict[str, float]]:
    """What must not depend on when a run was interrupted."""
    return [{k: v for k, v in row.items() if k == "step" or k.startswith(NUMBERS)} for row in run.rows]


def small_state(run: Finished) -> dict[str, Any]:
    state = json.loads((last_checkpoint(run.folder) / "state.json").read_text())
    return {name: value for name, value in state.items() if name != "wandb_id"}  # drawn once per run


def assert_the_same(run: Finished, undisturbed: Finished) -> None:
    """Bit for bit: every number of every step (each once, without a gap), every tensor, the small state."""
    assert [row["step"] for row in run.rows] == list(range(1, len(undisturbed.rows) + 1))
    assert numbers(run) == numbers(undisturbed)
    ours, theirs = run.masters, undisturbed.masters
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    assert small_state(run) == small_state(undisturbed)


def finished(folder: Path) -> Finished:
    return Finished(folder, read_metrics(folder / "metrics.jsonl"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its logs, and its events: each start is one, whatever becomes of it."""
    paths = [
        path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs" and path.name != EVENTS
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- the same command again ---

PIPELINE = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "pipeline.schedule=dualpipe"]
KILLED = {
    "dualpipe-fp32-deepspeed": [*PIPELINE, "precision=fp32", "zero.engine=deepspeed"],
    "dualpipe-bf16-native": [*PIPELINE, "precision=bf16", "zero.engine=native"],
    "fp32-deepspeed": [*FOUR, "precision=fp32", "zero.engine=deepspeed"],
    "bf16-native": [*FOUR, "precision=bf16", "zero.engine=native"],
}
KILLED_IN_CI = "dualpipe-fp32-deepspeed"
NUM_KILLS = 2


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == KILLED_IN_CI else pytest.mark.slow) for case in KILLED]
)
def test_killed_at_any_moment_equals_undisturbed(
    ranks: Ranks, tmp_path: Path, text: list[str], dice: random.Random, case: str
) -> None:
    settings = [*SMALL, *text, *LONG, *KILLED[case]]
    undisturbed = run_in(ranks, tmp_path / "undisturbed", settings, 4)
    folder = tmp_path / "killed"
    for _ in range(NUM_KILLS):
        job = Forked(settings, folder, 4)
        step, rank, delay_s = last_step(folder) * 2 // 3 + dice.randrange(1, 6), dice.randrange(4), dice.uniform(0, 0.3)
        print(f"SIGKILL to rank {rank}, {delay_s:.3f} s after step {step}")
        job.wait_for_step(step)
        time.sleep(delay_s)
        job.processes[rank].kill()
        codes = job.codes()
        # Nobody claims success, unless the rank was killed when there was nothing left to do.
        assert codes[rank] in (0, -signal.SIGKILL)
        done = last_step(folder) == NUM_STEPS and last_checkpoint(folder).name == f"step-{NUM_STEPS:08d}"
        assert 0 not in codes or done, codes
    assert Forked(settings, folder, 4).codes() == [0] * 4
    assert_the_same(finished(folder), undisturbed)


@pytest.mark.slow
def test_launched_then_killed_then_stopped_equals_undisturbed(
    ranks: Ranks, tmp_path: Path, text: list[str], dice: random.Random
) -> None:
    settings = [*SMALL, *text, *FOUR, *ENDLESS, "zero.engine=deepspeed"]
    folder, rank = tmp_path / "interrupted", dice.randrange(4)
    with local(settings, folder) as job:
        job.wait_for_step(dice.randrange(1, 6))
        job.strike(rank)
        code, _, error = job.finish()
    assert code == 128 + signal.SIGKILL
    # One sentence, and nothing of what the others said when their peer was gone.
    assert error == f"rank {rank} was ended by SIGKILL; its log: {folder}/logs/rank_{rank}.log\n"
    with local(settings, folder) as job:
        job.wait_for_step(last_step(folder) + 1)
        job.process.send_signal(signal.SIGTERM)
        code, out, error = job.finish()
    assert (code, error) == (0, "")
    assert f"stopped and saved after step {last_step(folder)}" in out
    assert last_checkpoint(folder).name == f"step-{last_step(folder):08d}"
    end = last_step(folder) + 4
    settings.append(f"train.max_steps={end}")
    with local(settings, folder) as job:
        code, out, error = job.finish()
    assert (code, error) == (0, "")
    # What rank 0 says reaches the terminal while it trains and at the end.
    assert f"step={end}/{end}" in out and f"done after step {end}" in out and str(last_checkpoint(folder)) in out
    assert_the_same(finished(folder), run_in(ranks, tmp_path / "undisturbed", settings, 4))


@pytest.mark.slow
def test_torchrun_stopped_equals_undisturbed(
    ranks: Ranks, tmp_path: Path, text: list[str], dice: random.Random
) -> None:
    settings = [*SMALL, *text, "parallel.dp=2", *ENDLESS, "checkpoint.interval=0"]
    folder = tmp_path / "stopped"
    with torchrun(settings, folder, 2) as job:
        job.wait_for_step(dice.randrange(1, 10))
        job.process.send_signal(signal.SIGTERM)
        _, out, _ = job.finish()  # torchrun itself ends by its own exception
    assert f"stopped and saved after step {last_step(folder)}" in out
    assert last_step(folder) > 0
    settings.append(f"train.max_steps={last_step(folder) + 4}")
    assert Forked(settings, folder, 2).codes() == [0, 0]
    assert_the_same(finished(folder), run_in(ranks, tmp_path / "undisturbed", settings, 2))


# --- another topology ---


@pytest.fixture(scope="module")
def plain_fp64(text: list[str]) -> PlainRun:
    return plain_run(compose([*SMALL, *text, "precision=fp64"]))


@pytest.fixture(scope="module")
def halves(ranks: Ranks, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(precision, engine) -> a run on four ranks as it was after step 5 of 10."""
    made: dict[tuple[str, str], Path] = {}

    def make(precision: str, engine: str) -> Path:
        key = (precision, engine)
        if key not in made:
            more = [f"precision={precision}", f"zero.engine={engine}", "checkpoint.interval=5"]
            folder = tmp_path_factory.mktemp("half") / "run"
            run_in(ranks, folder, [*SMALL, *text, *FOUR, *more], 4)
            forget_after(folder, 5)
            made[key] = folder
        return made[key]

    return make


TOPOLOGIES = [
    (2, "parallel.dp=2 parallel.ep=2 parallel.dispatch=flat train.micro_batch_size=2"),
    (1, "train.micro_batch_size=4"),
    (4, "parallel.dp=4 parallel.ep=4 parallel.dispatch=two_hop parallel.nodes=2"),
]
RESUMED = [pytest.param(*case, id=case[1], marks=() if case[0] == 4 else pytest.mark.slow) for case in TOPOLOGIES]


@pytest.mark.parametrize(("world_size", "topology"), RESUMED)
def test_resumed_on_another_topology_in_fp64(
    ranks: Ranks, tmp_path: Path, text: list[str], halves: Any, plain_fp64: PlainRun, world_size: int, topology: str
) -> None:
    shutil.copytree(halves("fp64", "native"), tmp_path / "run")
    settings = [*SMALL, *text, "precision=fp64", "checkpoint.interval=5", *topology.split()]
    run = run_in(ranks, tmp_path / "run", settings, world_size)
    # The bound of the runs that never changed topology: sums in another order, ten steps of AdamW.
    assert worst(run, plain_fp64) < 1e-9


@pytest.mark.parametrize(("world_size", "topology"), TOPOLOGIES[-1:], ids=[each for _, each in TOPOLOGIES[-1:]])
def test_resumed_on_another_topology_and_engine_in_fp32(
    ranks: Ranks, tmp_path: Path, text: list[str], halves: Any, world_size: int, topology: str
) -> None:
    engines = ("native", "deepspeed")
    saved_by, loaded_by = engines if world_size == 2 else engines[::-1]
    undisturbed = run_in(ranks, tmp_path / "plain", [*SMALL, *text, "precision=fp32"], 1)
    shutil.copytree(halves("fp32", saved_by), tmp_path / "run")
    settings = [*SMALL, *text, "precision=fp32", *topology.split(), f"zero.engine={loaded_by}"]
    run = run_in(ranks, tmp_path / "run", settings, world_size)
    assert [row["step"] for row in run.rows] == list(range(1, 11))
    for ours, theirs in zip(run.rows, undisturbed.rows, strict=True):
        # A router's tie may fall otherwise under a re-associated sum, and then one token takes another way.
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)


# Runs that go on in one folder, each for two steps more: (ranks, place).
RELAYS = {
    "dualpipe, zbv, one rank": [
        (4, " ".join(PIPELINE)),
        # Layers dealt out in another way than the run before has dealt them.
        (2, "parallel.pp=2 pipeline.schedule=zbv pipeline.layers=[0,2,0,1]"),
        (1, "train.micro_batch_size=4"),
    ],
    "ep=4, a stage without a layer, pairs, dualpipev, dualpipe": [
        (4, "parallel.dp=4 parallel.ep=4 parallel.dispatch=two_hop parallel.nodes=2"),
        (4, "parallel.pp=4 pipeline.schedule=dualpipe pipeline.layers=[2,0,0,1]"),
        (4, "parallel.pp=2 parallel.dp=2 pipeline.schedule=1f1b pipeline.pairs=true train.micro_batch_size=2"),
        (3, "parallel.pp=3 pipeline.schedule=dualpipev"),
        (4, " ".join(PIPELINE)),
    ],
}


@pytest.mark.parametrize(
    "relay", [pytest.param(name, marks=() if len(RELAYS[name]) < 4 else pytest.mark.slow) for name in RELAYS]
)
def test_handed_from_schedule_to_schedule_in_fp64(ranks: Ranks, tmp_path: Path, text: list[str], relay: str) -> None:
    settings = [*SMALL, *text, *CONSTANT, "precision=fp64"]
    for number, (world_size, place) in enumerate(RELAYS[relay], start=1):
        steps = f"train.max_steps={2 * number}"
        run = run_in(ranks, tmp_path / "run", [*settings, "parallel.dp=1", *place.split(), steps], world_size)
    # The plain run evaluates at its own end and at every fifth step only.
    for row in run.rows[:-1]:
        if row["step"] % 5:
            row.pop("valid/loss", None)
    assert worst(run, plain_run(compose([*settings, steps]))) < 1e-9


# --- never a silent resume ---


@pytest.fixture(scope="module")
def done(ranks: Ranks, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps."""
    folder = tmp_path_factory.mktemp("done") / "run"
    run_in(ranks, folder, [*SMALL, *text, *CONSTANT, "train.max_steps=4", "checkpoint.interval=2"], 1)
    return folder


OTHERS = [
    ("lr_scheduler.lr=0.001", ("lr_scheduler.lr", "0.003", "0.001")),
    ("lr_scheduler.warmup_steps=2", ("lr_scheduler.warmup_steps", "4", "2")),
    ("optimizer.weight_decay=0.25", ("optimizer.weight_decay", "0.1", "0.25")),
    ("moe.bias_update_rate=0.02", ("moe.bias_update_rate", "0.01", "0.02")),
    ("mtp.loss_weight=0.1", ("mtp.loss_weight", "0.3", "0.1")),
    ("precision=bf16", ("precision", "fp32", "bf16")),
    ("model.hidden_size=48", ("model.hidden_size", "32", "48")),
    ("model.rope_theta=500.0", ("model.rope_theta", "10000.0", "500.0")),
    ("train.seed=1", ("train.seed", "0", "1")),
    ("train.seq_len=16", ("train.seq_len", "24", "16")),
    ("train.global_batch_size=16", ("train.global_batch_size", "8", "16")),
]


@pytest.mark.parametrize(("setting", "words"), OTHERS, ids=[setting for setting, _ in OTHERS])
def test_another_run_is_refused_and_nothing_touched(
    tmp_path: Path, text: list[str], done: Path, setting: str, words: tuple[str, ...], capfd: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    before = content(folder)
    settings = [*SMALL, *text, *CONSTANT, "train.max_steps=6", setting, f"run.dir={folder}"]
    assert train_main(settings) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    key, was, now = words
    assert f"{key} was {was} there and is {now} here" in said or f"{key}.name was {was} there and is {now} here" in said
    # What may change does not distract from what may not.
    assert "max_steps" not in said
    assert content(folder) == before


def test_other_data_is_refused(ranks: Ranks, tmp_path: Path, text: list[str], done: Path, capfd: Any) -> None:
    source = tmp_path / "text"
    source.mkdir()
    (source / "other.py").write_text("print('another text')\n" * 4000)
    for i in range(20):
        (source / f"{i}.py").write_text(f"x = {i}\n" * 100)
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    before = content(folder)
    data = [f"data.source={source}", f"data.dir={tmp_path / 'tokens'}", "data.vocab_size=257"]
    settings = [*SMALL, *text, *CONSTANT, "train.max_steps=6", *data, f"run.dir={folder}"]
    assert train_main(settings) == 2
    said = capfd.readouterr().err
    assert str(source) in said and len(said.splitlines()) == 1
    assert content(folder) == before


@pytest.mark.parametrize(
    "more",
    ["train.micro_batch_size=4", "zero.engine=deepspeed", "checkpoint.interval=3", "evaluate.interval=2"],
)
def test_a_longer_run_goes_on(tmp_path: Path, text: list[str], done: Path, more: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    assert train_main([*SMALL, *text, *CONSTANT, "train.max_steps=6", more, f"run.dir={folder}"]) == 0
    run, before = finished(folder), finished(done)
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5, 6]
    assert run.rows[:4] == before.rows


def test_a_longer_run_with_a_border_that_moves_is_refused(tmp_path: Path, text: list[str], capfd: Any) -> None:
    """The default recipe holds for half of the run: with another end it is another recipe."""
    assert train_main([*SMALL, *text, "train.max_steps=4", f"run.dir={tmp_path}"]) == 0
    assert train_main([*SMALL, *text, "train.max_steps=6", f"run.dir={tmp_path}"]) == 2
    assert "train.max_steps was 4 there and is 6 here" in capfd.readouterr().err


def test_a_finished_run_says_where_things_lie(tmp_path: Path, text: list[str], done: Path, capfd: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    before = content(folder)
    assert train_main([*SMALL, *text, *CONSTANT, "train.max_steps=4", f"run.dir={folder}"]) == 0
    said = capfd.readouterr().out
    for words in ("this run is done after step 4", "validation loss", "loss.png", "metrics.jsonl", "step-00000004"):
        assert words in said
    assert content(folder) == before


def test_never_beside_checkpoints_is_refused(tmp_path: Path, text: list[str], done: Path, capfd: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    before = content(folder)
    settings = [*SMALL, *text, *CONSTANT, "train.max_steps=4", "checkpoint.resume=never", f"run.dir={folder}"]
    assert train_main(settings) == 2
    assert "checkpoint.resume=never would start anew beside" in capfd.readouterr().err
    assert content(folder) == before
    shutil.rmtree(folder / "checkpoints")
    # Without them it does start anew, and the numbers of the earlier run are gone.
    assert train_main([*settings, "train.seed=5"]) == 0
    assert [row["step"] for row in finished(folder).rows] == [1, 2, 3, 4]
    assert finished(folder).rows[0]["train/loss"] != finished(done).rows[0]["train/loss"]


def test_a_folder_in_use_is_refused(tmp_path: Path, text: list[str], done: Path, capfd: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    settings = [*SMALL, *text, *CONSTANT, "train.max_steps=6", f"run.dir={folder}"]
    before = content(folder)
    with run_folder.opened(folder, 0, ()):
        names = ("logs/rank_0.log", EVENTS)
        said_before = [(folder / name).read_bytes() for name in names]
        assert train_main(settings) == 2
        assert launch_main(["local", *settings]) == 2
        said = f"run.dir={folder} is in use by a running job: choose another run.dir\n"
        assert capfd.readouterr().err == 2 * said
        assert [(folder / name).read_bytes() for name in names] == said_before
    assert content(folder) == before
    assert train_main(settings) == 0
