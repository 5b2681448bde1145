"""Models in Hugging Face's layout: written from a run's checkpoint, read by others and by us, trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.__main__ import main
from tests.exports import export, import_from, logits, state_of, transformers_model
from tests.runs import SMALL, last_checkpoint, prepare_text, run_in, train_main
from tests.spawn import Ranks
from tests.train.model_cases import random_tokens
from train import compose
from train.model.config import ModelConfig
from train.track.metrics_file import read_metrics

STEPS = ["train.max_steps=3", "optimizer.ema_decay=0.5", "lr_scheduler.phases=[{kind:constant}]"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare_text(tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture(scope="module")
def run(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train_main([*SMALL, *text, *STEPS, f"run.dir={folder}"]) == 0
    return folder


def model_of(checkpoint: Path) -> ModelConfig:
    return compose.load(checkpoint / "config.yaml").model


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_exported_fp32_is_the_model(run: Path, tmp_path: Path, weights: str) -> None:
    """Loaded in fp64 from fp32 files; the oracle's norms, router and rotary tables are float32 whatever it is asked."""
    checkpoint = last_checkpoint(run)
    config = model_of(checkpoint)
    folder = export(run, tmp_path / "hf", "dtype=fp32", f"weights={weights}", "max_shard_bytes=20000")
    assert len(list(folder.glob("*.safetensors"))) > 5
    oracle = transformers_model(folder, torch.float64)
    tokens = random_tokens(config, 3, 23)
    state = state_of(checkpoint, config, {"model": "master.", "ema": "ema."}[weights])
    ours = logits(config, state, tokens, torch.float64)
    expected = oracle(input_ids=tokens).logits.detach()
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tokenizer(run: Path, text: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from train.data.tokenizer import Tokenizer

    folder = export(run, tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder / "tokenizer.json")
    for sample in ("def f(x):\n    return  x", "Grüße 你好", " leading", "a\t\n\n b"):
        assert loaded(sample)["input_ids"] == list(ours.encode([sample])[0])
        assert loaded.decode(loaded(sample)["input_ids"]) == sample
    assert loaded.eos_token_id == ours.eod == json.loads((folder / "config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_there_and_back(run: Path, tmp_path: Path, dtype: str) -> None:
    checkpoint = last_checkpoint(run)
    config = model_of(checkpoint)
    folder = export(checkpoint, tmp_path / "hf", f"dtype={dtype}")
    import_from(folder, tmp_path / "back")
    before, after = state_of(checkpoint, config), state_of(tmp_path / "back", config)
    if dtype == "fp32":
        assert all(torch.equal(before[name], after[name]) for name in before)
    elif dtype == "bf16":
        # Rounded once, to nearest.
        assert all(
            torch.equal(after[name], before[name] if "bias" in name else before[name].bfloat16().float())
            for name in before
        )
    # What was on the grid of the file stays there, bit for bit.
    again = export(tmp_path / "back", tmp_path / "again", f"dtype={dtype}")
    assert main(["import", f"from={again}", f"to={tmp_path / 'twice'}"]) == 0
    twice = state_of(tmp_path / "twice", config)
    assert all(torch.equal(after[name], twice[name]) for name in after)
    for file in folder.glob("*"):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_an_imported_model_trains_on(run: Path, text: list[str], tmp_path: Path, capfd: Any) -> None:
    """Like the run whose weights it has: the same bits at every step, from fresh moments."""
    imported = import_from(export(run, tmp_path / "hf", "dtype=fp32"), tmp_path / "imported")
    assert f"checkpoint.init_from={imported}" in capfd.readouterr().out
    settings = [*SMALL, *text, "lr_scheduler.phases=[{kind:constant}]", "optimizer.ema_decay=0.5"]
    losses = []
    for number, source in enumerate([imported, last_checkpoint(run)]):
        started = tmp_path / f"started{number}"
        more = ["train.max_steps=4", f"checkpoint.init_from={source}", f"run.dir={started}"]
        assert train_main([*settings, *more]) == 0
        losses.append([row["train/loss"] for row in read_metrics(started / "metrics.jsonl")])
    assert losses[0] == losses[1]
    # Its first step sees the weights that the run ended with: less loss than at that run's start, and falling.
    first = read_metrics(run / "metrics.jsonl")[0]["train/loss"]
    assert losses[0][-1] < losses[0][0] < first
    export(tmp_path / "started0", tmp_path / "on")
    # Going on from its own checkpoint needs the imported one no more.
    shutil.rmtree(imported)
    more = ["train.max_steps=5", f"checkpoint.init_from={imported}", f"run.dir={tmp_path / 'started0'}"]
    assert train_main([*settings, *more]) == 0
    assert len(read_metrics(tmp_path / "started0" / "metrics.jsonl")) == 5
    capfd.readouterr()
    assert train_main([*settings, "train.max_steps=6", f"run.dir={tmp_path / 'started0'}"]) == 2
    assert f"checkpoint.init_from was {imported} there and is None here" in capfd.readouterr().err


def test_the_average_begins_as_the_weights_it_starts_from(run: Path, text: list[str], tmp_path: Path) -> None:
    """One step at a rate of next to nothing: masters and averages are still those of the source."""
    quiet = ["optimizer.ema_decay=0.5", "lr_scheduler.lr=1e-12", "lr_scheduler.phases=[]", "train.max_steps=1"]
    started = tmp_path / "started"
    source = last_checkpoint(run)
    assert train_main([*SMALL, *text, *quiet, f"checkpoint.init_from={source}", f"run.dir={started}"]) == 0
    config = model_of(source)
    before = state_of(source, config)
    for kind in ("master.", "ema."):
        after = state_of(last_checkpoint(started), config, kind)
        for name, weight in before.items():
            if "bias" not in name:
                torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-8)


OTHERS = [
    (["model.hidden_size=48"], "holds another model: model.hidden_size was 32 there and is 48 here"),
    (["model.rope_theta=500.0"], "holds another model: model.rope_theta was 10000.0 there and is 500.0 here"),
    (["checkpoint.resume=/nowhere"], "checkpoint.resume=/nowhere goes on with another one: give one of them"),
    (["checkpoint.init_from=/nowhere"], "checkpoint.init_from=/nowhere does not exist"),
]


@pytest.mark.parametrize(("settings", "words"), OTHERS, ids=[settings[0] for settings, _ in OTHERS])
def test_starts_that_are_refused(
    run: Path, text: list[str], tmp_path: Path, capfd: Any, settings: list[str], words: str
) -> None:
    start = [*SMALL, *text, *STEPS, f"checkpoint.init_from={last_checkpoint(run)}", f"run.dir={tmp_path / 'run'}"]
    assert train_main([*start, *settings]) == 2
    said = capfd.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_longer_context_is_no_other_model(run: Path, text: list[str], tmp_path: Path) -> None:
    yarn = "model.rope_scaling={type:yarn,factor:4,original_max_position_embeddings:24}"
    start = [*SMALL, *text, *STEPS, "train.max_steps=1", yarn, "model.max_position_embeddings=96"]
    assert train_main([*start, f"checkpoint.init_from={last_checkpoint(run)}", f"run.dir={tmp_path / 'run'}"]) == 0


@pytest.mark.slow
def test_any_topology_is_exported_and_started_from(ranks: Ranks, text: list[str], tmp_path: Path) -> None:
    four = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "pipeline.schedule=dualpipe"]
    settings = [*SMALL, *text, *STEPS, *four, "zero.engine=deepspeed", "precision=bf16"]
    first = run_in(ranks, tmp_path / "run", settings, 4)
    checkpoint = last_checkpoint(first.folder)
    config = model_of(checkpoint)
    for kind, weights in (("master.", "model"), ("ema.", "ema")):
        folder = export(checkpoint, tmp_path / weights, "dtype=fp32", f"weights={weights}")
        back = import_from(folder, tmp_path / f"back-{weights}")
        before, after = state_of(checkpoint, config, kind), state_of(back, config)
        assert all(torch.equal(before[name], after[name]) for name in before)
    start = [*settings, "train.max_steps=1", f"checkpoint.init_from={tmp_path / 'back-model'}"]
    run_in(ranks, tmp_path / "started", start, 4)
