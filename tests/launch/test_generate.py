"""`python -m launch generate`: from a run's folder, written by several ranks, to a text and its figures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from tests.runs import SMALL, last_checkpoint, prepare_text, read_checkpoint, run_in
from tests.spawn import Ranks
from tests.texts import write_library
from train import compose
from train.assemble import load_model
from train.checkpoint.state import TrainState
from train.checkpoint.step_folders import find_checkpoint
from train.data.meta import TOKENIZER
from train.data.prepare.all_sources import prepare_sources
from train.data.tokenizer import TextStream, Tokenizer
from train.generate import Transcript, generate


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose experts and optimizer were spread over two ranks, with an average of its weights."""
    folder = tmp_path_factory.mktemp("run")
    settings = [*SMALL, *prepare_text(folder / "data"), "precision=fp64", "optimizer.ema_decay=0.5"]
    settings += ["train.max_steps=2", "evaluate.interval=0", "evaluate.num_sequences=2", "model.num_hidden_layers=2"]
    settings += ["parallel.dp=2", "parallel.ep=2", "parallel.dispatch=flat", "model.max_position_embeddings=64"]
    return run_in(ranks, folder / "run", settings, 2).folder


def said(capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    assert main(["generate", *settings]) == 0
    return capsys.readouterr().out


def tokenizer_of(run: Path) -> Tokenizer:
    return Tokenizer.load(run.parent / "data" / TOKENIZER)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_run_goes_on_with_a_text(run: Path, capsys: pytest.CaptureFixture[str], weights: str) -> None:
    out = said(
        capsys, f"checkpoint={run}", "prompt=import re", "max_new_tokens=20", "speculative=true", f"weights={weights}"
    )
    head, body = out.split("\n\n", 1)
    assert head == f"{last_checkpoint(run)}: {weights} weights in fp64 on cpu"
    tokenizer, config = tokenizer_of(run), compose.load(run / "config.yaml")
    prompt = tokenizer.encode(["import re"])[0].tolist()
    name = {"model": "master", "ema": "ema"}[weights]
    model = load_model(last_checkpoint(run), config.model, config.precision, torch.device("cpu"), name)
    transcript = Transcript()
    list(generate(model, prompt, 20, transcript, stop=tokenizer.eod))
    text = tokenizer.decode([token for token in transcript.tokens if token != tokenizer.eod])
    assert body.startswith(f"import re{text}\n\nprompt ")
    for line in (r"plain +\d+ tokens, [\d.]+ tokens/s", r"speculative .* tokens per pass", r"drafts +depth 1: \d+ of"):
        assert re.search(f"^{line}", body, re.M)
    assert re.search(r"^texts +equal$", body, re.M)
    # 2 layers and a depth of 8 + 4 numbers in 8 bytes; 2 heads of 12 + 8.
    assert "192 bytes per token, and 96 of the prediction depths" in body and "MHA would keep 640, 3.3x" in body


def test_every_weight_is_the_checkpoints(run: Path) -> None:
    folder, config = last_checkpoint(run), compose.load(run / "config.yaml")
    model, stored = load_model(folder, config.model, config.precision, torch.device("cpu")), read_checkpoint(folder)
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in names.items():
        found = stored[f"master.{name}" if f"master.{name}" in stored else name]
        assert torch.equal(tensor.detach().flatten(), found.to(tensor.dtype))
    assert len(names) == sum(not name.startswith(("exp_avg", "ema.")) for name in stored)


def test_nothing_beside_the_checkpoint_is_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run may be writing its next checkpoint there."""
    aside = run / "checkpoints" / ".step-00000009.partial"
    aside.mkdir()
    said(capsys, f"checkpoint={run}", "prompt=a", "max_new_tokens=1")
    assert aside.is_dir()
    aside.rmdir()


def test_sampling_repeats_with_its_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(seed: int, *more: str) -> str:
        out = said(capsys, f"checkpoint={run}", "prompt=a", "temperature=1", "max_new_tokens=12", f"seed={seed}", *more)
        return re.split(r"\n\nprompt ", out.split("\n\n", 1)[1])[0]

    assert text(1) == text(1) != text(2)
    assert text(1, "top_p=0.001") == text(2, "top_p=0.001")
    text(1, "speculative=true", "precision=bf16")


def test_a_checkpoint_is_found(run: Path) -> None:
    last = last_checkpoint(run)
    assert {find_checkpoint(each, "checkpoint") for each in (run, run / "checkpoints", last)} == {last}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["promt=a"], "promt is not a key of generate; did you mean prompt?"),
        (["prompt="], "prompt is empty: it needs a value, prompt=..."),
        ([], "generate needs prompt=TEXT or prompt_file=PATH, one of the two"),
        (["prompt=a", "prompt_file=b"], "generate needs prompt=TEXT or prompt_file=PATH, one of the two"),
        (["prompt_file=/nowhere"], "prompt_file=/nowhere cannot be read: No such file or directory"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens=0 must be a whole number of at least 1"),
        (["prompt=a", "max_new_tokens=64"], "max_new_tokens=64 behind a prompt of 1 tokens is above model.max_pos"),
        (["prompt=" + 70 * "é~"], "tokens and leaves no position for another: model.max_position_embeddings=64"),
        (["prompt=a", "temperature=-1"], "temperature=-1 must be a number of at least 0"),
        (["prompt=a", "temperature=1", "top_p=0"], "top_p=0 must be above 0 and at most 1"),
        (["prompt=a", "top_p=0.5"], "top_p=0.5 needs a temperature above 0"),
        (["prompt=a", "weights=moments"], "weights=moments is not one of model, ema"),
        (["prompt=a", "precision=int8"], "precision=int8 is not one of fp64, fp32, bf16, fp8"),
        (["prompt=a", "speculative=maybe"], "speculative=maybe must be true or false"),
        (["prompt=a", "tokenizer=/nowhere.json"], "/nowhere.json, the tokenizer of the run, is missing"),
        (["prompt=a", "tokenizer=/x", "tokenizer=/y"], "tokenizer is given twice"),
    ],
)
def test_refuses(run: Path, settings: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"checkpoint={run}", *settings]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_refuses_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "prompt=a"]) == 2
    assert "checkpoint=... is missing: generate needs checkpoint" in capsys.readouterr().err
    assert main(["generate", "checkpoint=/nowhere", "prompt=a"]) == 2
    assert "checkpoint=/nowhere does not exist" in capsys.readouterr().err
    assert main(["generate", f"checkpoint={tmp_path}", "prompt=a"]) == 2
    assert f"checkpoint={tmp_path} holds no checkpoint: name a run's folder" in capsys.readouterr().err


def copy_of(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(last_checkpoint(run), tmp_path / "step-00000002")
    return tmp_path / "step-00000002"


def test_refuses_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(run, tmp_path)
    large = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    large.write_bytes(content)
    assert main(["generate", f"checkpoint={folder}", "prompt=a"]) == 2
    assert f"{large} is damaged" in capsys.readouterr().err


def test_refuses_tokens_that_were_prepared_anew(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tokenizer would make another text of the same numbers."""
    read = TrainState.from_json

    def other_data(text: str, config: str) -> TrainState:
        changed = json.loads(text)
        changed["fingerprints"]["data"] = "of other tokens"
        return read(json.dumps(changed), config)

    monkeypatch.setattr(TrainState, "from_json", other_data)
    assert main(["generate", f"checkpoint={run}", "prompt=a"]) == 2
    assert "was prepared anew since the run: name the run's tokenizer with tokenizer=PATH" in capsys.readouterr().err
    assert main(["export", f"checkpoint={run}", f"to={tmp_path / 'hf'}"]) == 2
    assert "was prepared anew since the run" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    own = run.parent / "data" / TOKENIZER
    assert main(["generate", f"checkpoint={run}", "prompt=a", "max_new_tokens=1", f"tokenizer={own}"]) == 0
    assert main(["export", f"checkpoint={run}", f"to={tmp_path / 'hf'}", f"tokenizer={own}"]) == 0


def test_refuses_what_the_run_has_not(run: Path, capsys: pytest.CaptureFixture[str], ranks: Ranks) -> None:
    folder = run.parent / "plain"
    settings = [*SMALL, *prepare_text(run.parent / "data"), "model.num_nextn_predict_layers=0", "train.max_steps=1"]
    run_in(ranks, folder, [*settings, "model.num_hidden_layers=1", "evaluate.num_sequences=1"], 1)
    assert main(["generate", f"checkpoint={folder}", "prompt=a", "weights=ema"]) == 2
    assert "holds no moving average, as optimizer.ema_decay was 0 in the run" in capsys.readouterr().err
    assert main(["generate", f"checkpoint={folder}", "prompt=a", "speculative=true"]) == 2
    assert "speculative=true needs prediction depths" in capsys.readouterr().err
    assert "plain" in said(capsys, f"checkpoint={folder}", "prompt=a", "max_new_tokens=3")


@pytest.mark.parametrize("text", ["plain", "é", "日本語 text", "🙂🙃", "a\n\tb", ""])
def test_text_comes_in_whole_characters(run: Path, text: str) -> None:
    tokenizer = tokenizer_of(run)
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in tokenizer.encode([text])[0].tolist()]
    assert "".join(parts) == text and stream.end() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)


def test_half_a_character_is_shown_at_the_end(run: Path) -> None:
    tokenizer = tokenizer_of(run)
    stream = TextStream(tokenizer)
    half = tokenizer.encode(["a🙂"])[0].tolist()[:-1]
    assert "".join(stream.push(token) for token in half) == "a"
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"


def test_a_run_on_a_blend_finds_its_tokenizer(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = tmp_path / "library"
    for seed, name in enumerate(("json", "wsgiref", "email")):
        write_library(library / name, seed, num_files=4)
    sources = ",".join(
        f"{{name:{name},weight:{weight},source:{library / name},settings:{{suffixes:[.py]}}}}"
        for name, weight in (("json", 0.7), ("wsgiref", 0.3))
    )
    data = [
        f"data.blend=[{sources}]",
        f"data.dir={tmp_path / 'data'}",
        "data.vocab_size=300",
        "data.valid_fraction=0.3",
    ]
    settings = [*SMALL, *data, "data.max_document_bytes=64", "train.max_steps=1", "evaluate.num_sequences=1"]
    prepare_sources(compose.compose(settings).data, lambda line: None)
    run_in(ranks, tmp_path / "run", settings, 1)
    assert "plain" in said(capsys, f"checkpoint={tmp_path / 'run'}", "prompt=a", "max_new_tokens=2")
    # Another source in the same place: its tokens may be others' numbers.
    shutil.rmtree(tmp_path / "data" / "json")
    other = [each.replace(str(library / "json"), str(library / "email")) for each in settings]
    prepare_sources(
        compose.compose([*other, f"data.tokenizer={tmp_path / 'data' / TOKENIZER}"]).data, lambda line: None
    )
    assert main(["generate", f"checkpoint={tmp_path / 'run'}", "prompt=a"]) == 2
    assert "was prepared anew since the run" in capsys.readouterr().err
