"""Models in Hugging Face's layout: written from a run's checkpoint, read by others and by us, trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch.__main__ import main
from tests.runs import SMALL, last_checkpoint, prepare_text, read_checkpoint, train_main
from tests.train.model_cases import build, random_tokens
from train import compose
from train.disk import shapes
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.tape import Inline, drive
from train.track import read_metrics

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


def state_of(checkpoint: Path, config: ModelConfig, kind: str = "master.") -> dict[str, Tensor]:
    """The weights and biases of a checkpoint in their shapes."""
    flat = read_checkpoint(checkpoint)
    return {
        name: flat[name if name.endswith("correction_bias") else f"{kind}{name}"].view(shape)
        for name, shape in shapes(config).items()
    }


def logits(config: ModelConfig, state: dict[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model = build(config, dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    with torch.no_grad():
        x = model.embed_tokens(tokens)
        x = drive(model.run_layers(x, LossTerms(0, 0, 0), Inline(), model.empty_report(x.device)))
        return model.lm_head(model.norm(x))


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager).eval()


def export(source: Path, target: Path, *more: str) -> Path:
    assert main(["export", f"checkpoint={source}", f"to={target}", *more]) == 0
    return target


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_exported_fp32_is_the_model(run: Path, tmp_path: Path, weights: str) -> None:
    """Loaded in fp64 from fp32 files; the oracle's norms, router and rotary tables are float32 whatever it is asked."""
    checkpoint = last_checkpoint(run)
    config = model_of(checkpoint)
    folder = export(run, tmp_path / "hf", "dtype=fp32", f"weights={weights}", "max_shard_bytes=20000")
    assert len(list(folder.glob("*.safetensors"))) > 5
    oracle = theirs(folder, torch.float64)
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
    assert main(["import", f"from={folder}", f"to={tmp_path / 'back'}"]) == 0
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


def test_an_imported_model_trains_on(run: Path, text: list[str], tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    folder = export(run, tmp_path / "hf", "dtype=fp32")
    shutil.copytree(run, tmp_path / "same")
    assert main(["import", f"from={folder}", f"to={imported}"]) == 0
    fresh = [*SMALL, *text, "lr_scheduler.phases=[{kind:constant}]", "train.max_steps=4"]
    losses = []
    for number, source in enumerate([imported, last_checkpoint(run)]):
        started = tmp_path / f"started{number}"
        assert train_main([*fresh, f"checkpoint.init_from={source}", f"run.dir={started}"]) == 0
        losses.append([row["train/loss"] for row in read_metrics(started / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert main(["export", f"checkpoint={tmp_path / 'started0'}", f"to={tmp_path / 'on'}"]) == 0
