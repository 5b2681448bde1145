"""What people type is taken as they typed it; what cannot be is refused in words that help."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.imports import start_state
from tests.exports import checkpoint_of, random_family
from tests.train.data_texts import text
from train import compose
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.goes_on import resume_decision
from train.checkpoint.state import differences
from train.checkpoint.step_folders import find_checkpoint, run_of
from train.cli import foreign_keys, refusals
from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
from train.data.tokenizer import Tokenizer
from train.own_files import placed
from train.settings import read
from train.typed import as_typed, holds_text, quoted

CHARACTERS = "ab/=é数据~#& '\"[](){},<|>\\:;*?!%^@+-_.0123456789\tnulltrue"


def set_by(word: str) -> object:
    (found,) = compose._parsed([word])
    return found.value()


@pytest.mark.parametrize("seed", range(8))
def test_any_text_is_the_text_that_was_typed(seed: int) -> None:
    """Unless Hydra's grammar reads text of its own in it, or choices; and the quoted form that we show always works."""
    draw = random.Random(seed)
    for _ in range(60):
        typed = "".join(draw.choice(CHARACTERS) for _ in range(draw.randint(1, 9)))
        try:
            (plain,) = compose._parsed([f"x={typed}"])
            is_text = plain.is_sweep_override() or isinstance(plain.value(), str)
        except ValueError:
            is_text = False
        (word,) = as_typed([f"run.name={typed}"])
        if is_text:
            assert word == f"run.name={typed}"
        else:
            assert set_by(word) == (os.path.expanduser(typed) if typed.startswith("~/") else typed)
        (pasted,) = shlex.split(quoted("run.name", typed))
        (word,) = as_typed([pasted])
        assert set_by(word) == typed


NAMES = (
    "1.10",
    "3e-4",
    "2026_11_28",
    "null",
    "true",
    "1_000",
    "010",
    "inf",
    "0x1F",
    "1e5",
    "-1",
    "[a]",
    "a=1,b=2",
    "it's",
)


def test_names_stay_what_was_typed_in_the_tree_and_in_its_file(tmp_path: Path) -> None:
    for name in NAMES:
        config = compose.compose([f"run.name={name}"])
        assert (config.run.name, config.run.dir) == (name, f"runs/{name}")
        (tmp_path / "config.yaml").write_text(compose.text(config))
        assert compose.load(tmp_path / "config.yaml") == config
        changed = compose.compose(["--config", str(tmp_path / "config.yaml"), f"track.name=_{name}"])
        assert changed.track.name == f"_{name}"


PATHS = (
    "a=b",
    "é/数据",
    "a #b",
    "a&b",
    "x y",
    "a(b)",
    "a'b",
    'a"b',
    "{a}",
    "a:b",
    "a<|eos|>",
    "runs/lr=0.1,seed=2",
    "$a",
)


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_taken_as_they_are_by_every_verb(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(path).mkdir(parents=True)
    for key in ("data.source", "data.dir", "data.tokenizer", "run.dir", "checkpoint.dir", "checkpoint.init_from"):
        tree = compose.raw([f"{key}={path}"])
        section, _, name = key.partition(".")
        assert tree[section][name] == path, key
    from launch.settings import ExportSettings, GenerateSettings, ReportSettings

    assert read(ExportSettings, [f"checkpoint={path}", f"to={path}"], "export").checkpoint == Path(path)
    assert read(GenerateSettings, [f"checkpoint={path}", "prompt=a"], "generate").checkpoint == Path(path)
    assert read(ReportSettings, [f"run={path}"], "report").run == [Path(path)]


def test_home_null_lists_and_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    config = compose.compose(
        ["data.source=~/texts", "run.name=a=${train.seed}", "run.dir=${run.name}-b=1,2", "data.tokenizer=null"]
    )
    assert (config.data.source, config.run.name, config.run.dir) == ("/home/x/texts", "a=0", "a=0-b=1,2")
    assert config.data.tokenizer is None
    assert compose.compose(["data.suffixes=[1.10,.md,'a,b',x=y]"]).data.suffixes == ("1.10", ".md", "a,b", "x=y")
    assert compose.compose(["checkpoint.async_mode=true"]).checkpoint.async_mode is True
    assert compose.compose(["data.end_of_document=<|eos|>", "data.tokenizer=t"]).data.end_of_document == "<|eos|>"
    from launch.settings import ImportSettings

    assert read(ImportSettings, ["from=~/a", "to=b"], "import").from_ == Path("/home/x/a")
    assert holds_text("run.name") and not holds_text("checkpoint.async_mode") and not holds_text("train.seed")


def test_several_values_are_a_sweeps_or_one_text_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="has several values") as error:
        compose.compose(["data.source=a,b"])
    shown = str(error.value).rpartition("type ")[2]
    (pasted,) = shlex.split(shown)
    assert compose.compose([pasted]).data.source == "a,b"
    (tmp_path / "a,b").mkdir()
    assert compose.compose(["data.source=a,b"]).data.source == "a,b"
    fixed, swept = compose.space(["run.name=1.10,x y", "checkpoint.init_from=s/a=1,b=2", "train.seed=1,2"])
    assert [(each.key, each.choices) for each in swept] == [("run.name", ("1.10", "x y")), ("train.seed", ("1", "2"))]
    assert compose.compose(fixed).checkpoint.init_from == "s/a=1,b=2"
    ((each,),) = [compose.space(["data.source='a,b',c"])[1]]
    assert [compose.compose([f"data.source={choice}"]).data.source for choice in each.choices] == ["a,b", "c"]


def test_files_of_ones_own_are_taken_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1, b").mkdir()
    sizes = (compose.CONFIGS / "model" / "tiny.yaml").read_text()
    for name in ("tiny.yaml", "a=1, b/own model.yml"):
        (tmp_path / name).write_text(f"{sizes}\nrms_norm_eps: 0.25\n")
        config = compose.compose([f"model={name}", "train.seed=3"])
        assert (config.model.rms_norm_eps, config.train.seed) == (0.25, 3)
    (tmp_path / "long.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: small\ntrain:\n  seed: 7\n"
    )
    config = compose.compose([f"experiment={tmp_path}/long.yaml", "model.rms_norm_eps=0.5"])
    small = compose.compose(["model=small"]).model
    assert (config.train.seed, config.model.hidden_size) == (7, small.hidden_size)
    for word, why in (
        ("model=tny", "did you mean tiny"),
        ("model=tinny.yaml", "did you mean tiny.yaml"),
        ("experiment=./lng.yaml", "did you mean long.yaml"),
        ("experiment=/nowhere/x.yaml", "no such file, nor a folder /nowhere"),
        ("model=a=1, b/zzz.yaml", "a=1, b has own model.yml"),
        ("model=a=1, b", "names no file|no such file|cannot be read"),
    ):
        with pytest.raises(ValueError, match=why):
            compose.compose([word])
    (tmp_path / "odd.yaml").write_text("hiden_size: 3\n")
    with pytest.raises(ValueError, match=r"model.hiden_size is not a key of .*; did you mean model.hidden_size"):
        compose.compose(["model=odd.yaml"])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"broken.yaml is no YAML"):
        compose.compose(["model=broken.yaml"])
    with placed(["model=tiny.yaml"], refusals.groups()) as (_, own):
        folder = Path(own[-1].partition("file://")[2].rstrip("]"))
        assert folder.is_dir()
    assert not folder.exists()


# --- checkpoints ---


def test_every_way_to_have_no_checkpoint_has_its_own_words(tmp_path: Path) -> None:
    model = random_family("llama", 0)
    run = tmp_path / "a=1,b=2"
    steps = run / "checkpoints"
    for number in (20, 30):
        checkpoint_of(model, steps / f"step-{number:08}")
    (steps / "latest").write_text("step-00000030\n")
    (run / "config.yaml").write_text("checkpoint:\n  dir: null\n")
    last = steps / "step-00000030"
    for key in ("checkpoint", "checkpoint.resume", "checkpoint.init_from"):
        assert [find_checkpoint(each, key) for each in (run, steps, last)] == [last] * 3
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text(f"checkpoint:\n  dir: {json.dumps(str(steps))}\n")
    assert find_checkpoint(tmp_path / "elsewhere", "checkpoint") == last
    assert run_of(last) == run_of(steps) == run_of(run) == run
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "young" / "config.yaml").write_text("")
    (tmp_path / "bare").mkdir()
    (steps / "step-00000040").mkdir()
    (run / "notes").write_text("words")
    for path, why in (
        (steps / "step-00000010", r"is not there \(checkpoint.keep_latest_k .*; .* has step-00000030, step-00000020"),
        (steps / "step-00000040", r"was never completed: it has no manifest.json; .* has step-00000030, step-00000020"),
        (tmp_path / "a=1,b=3", "does not exist; did you mean .*a=1,b=2?"),
        (tmp_path / "zzzz", "zzzz does not exist$"),
        (run / "notes", "is a file: name a run's folder, a folder of checkpoints, or one step-XXXXXXXX"),
        (tmp_path / "young", "is a run that has no checkpoint yet"),
        (tmp_path / "bare", "holds no checkpoint: name a run's folder"),
    ):
        for key in ("checkpoint", "checkpoint.resume"):
            with pytest.raises(ValueError, match=f"^{key}=.*{why}"):
                find_checkpoint(path, key)
    (last / "manifest.json").unlink()
    (steps / "step-00000020" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds no complete checkpoint, only broken ones: .*never completed"):
        find_checkpoint(run, "checkpoint")


def test_resume_takes_a_runs_folder(tmp_path: Path) -> None:
    model = random_family("llama", 0)
    step = checkpoint_of(model, tmp_path / "run" / "checkpoints" / "step-00000003")
    now = start_state(model)
    for named in (step, step.parent, tmp_path / "run"):
        found = resume_decision(CheckpointConfig(resume=str(named)), tmp_path / "other", now)
        assert found is not None and found[0] == step
    with pytest.raises(ValueError, match=r"^checkpoint.resume=.*/none does not exist"):
        resume_decision(CheckpointConfig(resume=str(tmp_path / "none")), tmp_path / "other", now)


def test_the_same_tokens_under_another_name_are_the_same_data() -> None:
    """Older checkpoints have the name of the source among what makes the data."""
    from dataclasses import replace

    state = start_state(random_family("llama", 0))

    def of(**data: object) -> dict[str, str]:
        return {**state.fingerprints, "data": json.dumps({"data": data}, sort_keys=True, indent=0)}

    old = replace(state, fingerprints=of(train="x", source='a "b"', document_mask=False))
    new = replace(state, fingerprints=of(train="x", document_mask=False))
    assert not differences(new, old) and not differences(old, new)
    other = replace(state, fingerprints=of(train="y", document_mask=False))
    assert differences(other, old)


# --- advice that can be taken ---


def test_advice_on_a_single_document_can_be_taken(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(1, 900))
    config = DataConfig(source=str(tmp_path / "book.txt"), dir=str(tmp_path / "t"), vocab_size=300, num_workers=1)
    with pytest.raises(ValueError, match="holds one document") as error:
        prepare(config, lambda line: None)
    assert "valid_fraction=0 " not in str(error.value) and "valid_fraction=0;" not in str(error.value)
    key, _, value = str(error.value).rpartition("with ")[2].partition("=")
    assert key == "data.max_document_bytes"
    splits = prepare(
        DataConfig(**{**vars(config), "max_document_bytes": int(value)}), lambda line: None
    ).splits  # fmt: skip
    assert all(split.num_documents for split in splits.values())


def test_the_end_of_document_of_the_run_is_exported(tmp_path: Path) -> None:
    """A token that no list of known names has, as prepare, train and generate take it."""
    model = random_family("llama", 0)
    trained = Tokenizer.train([text(2, 400)], 300, ["<|my end|>"]).text.replace("<|endoftext|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(trained)
    from dataclasses import asdict, replace

    import yaml

    model = replace(model, vocab_size=400)
    source = checkpoint_of(model, tmp_path / "checkpoint")
    data = {"end_of_document": "<|my end|>", "tokenizer": str(tmp_path / "tokenizer.json")}
    shutil.copy(tmp_path / "tokenizer.json", source / "tokenizer.json")
    rewrite_config(source, yaml.safe_dump({"model": asdict(model), "data": data}))
    assert main(["export", f"checkpoint={source}", f"to={tmp_path / 'hf'}"]) == 0
    end = Tokenizer(trained, "<|my end|>").eod
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == end
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == "<|my end|>"


def rewrite_config(checkpoint: Path, config: str) -> None:
    """A checkpoint with another resolved config, whole by its manifest."""
    from train.checkpoint import step_folders
    from train.files import CRC32, record_of

    (checkpoint / "config.yaml").write_text(config)
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    step_folders.write_manifest(checkpoint, {name: record_of(checkpoint / name, CRC32) for name in names})


def test_a_decay_within_the_warm_up_is_said() -> None:
    def remarks(*words: str) -> tuple[str, ...]:
        return compose.compose(["train.max_steps=100", *words]).recipe().remarks()

    phases = "lr_scheduler.phases=[{kind:constant,share:0.2},{kind:cosine,end_lr:0}]"
    assert not remarks("lr_scheduler.warmup_steps=20", phases)
    (said,) = remarks("lr_scheduler.warmup_steps=21", phases)
    assert "begins to fall after 20 steps" in said and "lr_scheduler.warmup_steps=21" in said
    assert not remarks("lr_scheduler.warmup_steps=90", "lr_scheduler.phases=[]")
    (said,) = remarks("lr_scheduler.warmup_steps=101", "lr_scheduler.phases=[]")
    assert "does not end within the 100 steps" in said
    (said,) = remarks("lr_scheduler.warmup_steps=9", "lr_scheduler.phases=[{kind:constant,lr:1e-9}]")
    assert "begins to fall after 0 steps" in said


def test_gradient_accumulation_is_explained_where_people_look_for_it() -> None:
    for name in (
        "gradient_accumulation_steps",
        "--gradient-accumulation-steps",
        "grad_accum_steps",
        "num_micro_batches",
    ):
        with pytest.raises(ValueError, match=r"train.global_batch_size / \(parallel.dp x train.micro_batch_size\)"):
            compose.compose([f"{name}=4"])
    assert "gradient accumulation" in foreign_keys.answer("gradient_accumulation")[1]
    assert "Gradient accumulation" in refusals.keys()["train.micro_batch_size"].text


def test_a_checkpoint_of_more_files_than_may_be_open_is_read(tmp_path: Path) -> None:
    """As thousands of ranks write it; an import writes one file, so the tensors are spread over shards here."""
    import resource

    from safetensors.torch import load_file, save_file

    from tests.exports import export, import_from

    model = random_family("deepseek_v3", 1)
    folder = export(checkpoint_of(model, tmp_path / "c"), tmp_path / "hf", "dtype=fp32", "tokenizer=none")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    files = {f"model-{number:05}.safetensors": name for number, name in enumerate(tensors)}
    for file, name in files.items():
        save_file({name: tensors[name]}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, name in files.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = 20
    assert len(files) > free, "fewer files may be opened than there are"
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + free, limits[1]))
    try:
        back = import_from(folder, tmp_path / "back")
        again = export(back, tmp_path / "again", "dtype=fp32", "tokenizer=none", "max_shard_bytes=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    found = {name: tensor for path in again.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
