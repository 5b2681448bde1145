"""Export and import as a user meets them: killed midway, short of memory, asked for what cannot be."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.__main__ import main
from tests.exports import checkpoint_of
from tests.launched import ROOT
from tests.runs import environment
from tests.train.model_cases import TINY
from train.checkpoint import step_folders
from train.checkpoint.reader import RangeReader
from train.files import FileRecord, aside, new_folder
from train.hf.layout import disk_tensors, shapes
from train.hf.tensor_files import INDEX, Spec, TensorFolder, write_shard
from train.model.config import ModelConfig
from train.precision.config import PrecisionConfig
from train.settings import group

# Stacked experts of 34 MB in one piece, as a single process saves them; 31 M parameters in all.
LARGE = {
    **vars(TINY),
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "n_routed_experts": 32,
    "num_nextn_predict_layers": 0,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(ModelConfig(**LARGE), tmp_path_factory.mktemp("large") / "checkpoint")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(TINY, tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["export", f"checkpoint={tiny}", f"to={folder}", "dtype=fp8", "tokenizer=none"]) == 0
    return folder


# --- memory ---

SHARD_BYTES = 16_000_000
MEASURED = """
import sys, torch
from pathlib import Path
from launch.__main__ import main
torch.set_num_threads(1)
warm_up, measured = (argument.split(" ") for argument in sys.argv[1:])
def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
assert main(warm_up) == 0  # code is loaded as it is first used
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
assert main(measured) == 0
print("grown by", status("VmHWM") - before)
"""


def grown_bytes(warm_up: list[str], measured: list[str]) -> int:
    """By how much a process grows at most while it runs a verb, after it has run another one."""
    command = [sys.executable, "-c", MEASURED, " ".join(warm_up), " ".join(measured)]
    out = subprocess.run(command, cwd=ROOT, env=dict(environment()), check=True, capture_output=True, text=True).stdout
    return int(out.rsplit("grown by ", 1)[1])


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "fp8"])
def test_memory_stays_under_two_shards(large: Path, tiny: Path, tmp_path: Path, dtype: str) -> None:
    """The model takes 125 MB and a stack of experts 34 MB; two shards are 32 MB."""

    def export(source: Path, target: Path) -> list[str]:
        settings = [f"dtype={dtype}", f"max_shard_bytes={SHARD_BYTES}", "tokenizer=none"]
        return ["export", f"checkpoint={source}", f"to={target}", *settings]

    small, folder = tmp_path / "small", tmp_path / "hf"
    assert grown_bytes(export(tiny, small), export(large, folder)) < 2 * SHARD_BYTES
    warm_up = ["import", f"from={small}", f"to={tmp_path / 'warm'}"]
    assert grown_bytes(warm_up, ["import", f"from={folder}", f"to={tmp_path / 'back'}"]) < 2 * SHARD_BYTES


# --- killed ---

NUM_KILLS = 1


def names(folder: Path) -> dict[str, int]:
    """Every file and its size; the manifest has other numbers each time, of as many digits or not."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return sizes | {step_folders.MANIFEST: 0}


@pytest.mark.parametrize("verb", ["export", pytest.param("import", marks=pytest.mark.slow)])
def test_killed_midway_leaves_nothing_that_looks_whole(large: Path, tmp_path: Path, verb: str) -> None:
    draw = random.Random(int(os.environ["HALOCLINE_SEED"]))
    target = tmp_path / "target"
    if verb == "export":
        command = [verb, f"checkpoint={large}", f"to={target}", f"max_shard_bytes={SHARD_BYTES}", "tokenizer=none"]
    else:
        assert main(["export", f"checkpoint={large}", f"to={tmp_path / 'hf'}", "tokenizer=none"]) == 0
        command = [verb, f"from={tmp_path / 'hf'}", f"to={target}"]
    partial = aside(target)
    early = []  # what was whole when it was killed
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", *command],
            cwd=ROOT,
            env=dict(environment()),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not partial.exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():  # it was faster
            early.append(names(target))
            shutil.rmtree(target)
        elif (partial / step_folders.MANIFEST).exists():  # almost
            early.append(names(partial))
        assert [path.name for path in tmp_path.iterdir() if path.name not in ("hf", partial.name)] == []
    assert main(command) == 0
    assert not partial.exists()
    assert all(each == names(target) for each in early)
    if verb == "export":
        with TensorFolder(target) as folder:
            assert "lm_head.weight" in folder.specs
    else:
        step_folders.check_complete(target)


def test_two_at_once_are_refused(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    with new_folder(tmp_path / "hf"):
        assert main(["export", f"checkpoint={tiny}", f"to={tmp_path / 'hf'}", "tokenizer=none"]) == 2
    assert "is being written by another process" in capfd.readouterr().err


def test_a_failed_export_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """A disk that keeps other bytes than it was given is found before anything looks whole."""

    def write(path: Path, specs: list[Spec], ranges: Any) -> FileRecord:
        meant = write_shard(path, specs, ranges)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return meant

    monkeypatch.setattr("launch.export.write_shard", write)
    assert main(["export", f"checkpoint={tiny}", f"to={tmp_path / 'hf'}", "tokenizer=none"]) == 2
    said = capfd.readouterr().err
    assert f"{tmp_path / 'hf'} was not written: " in said and "reads back as" in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# --- fp8 ---


def test_fp8_is_what_others_read(exported: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` multiplies values and scales out to the same weights, bit for bit."""
    from transformers import DeepseekV3ForCausalLM, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    # It insists on a GPU and on another library, neither of which it needs to multiply scales out.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    quantised = FineGrainedFP8Config(dequantize=True)
    theirs = DeepseekV3ForCausalLM.from_pretrained(exported, quantization_config=quantised, dtype=torch.float32)
    assert main(["import", f"from={exported}", f"to={tmp_path / 'back'}"]) == 0
    state = theirs.state_dict()
    known, num_compared = shapes(TINY), 0
    with RangeReader(tmp_path / "back") as reader:
        for name, shape in known.items():
            if f"model.{name}" in state and "gate_up_proj.weight" not in name:
                ours = reader.read(name if "bias" in name else f"master.{name}", 0, math.prod(shape)).view(shape)
                assert torch.equal(state[f"model.{name}"].float(), ours), name
                num_compared += 1
    assert num_compared > 20


def test_fp8_quantises_what_training_multiplies_in_fp8() -> None:
    training = group(PrecisionConfig, "precision", "fp8")
    for disk in disk_tensors(TINY):
        module = disk.entry.ours.removesuffix(".weight").split(".")[-1]
        prefix = "experts." if ".experts." in disk.entry.ours else ""
        assert disk.is_linear == training.is_fp8(f"{prefix}{module}"), disk.name


# --- what export refuses ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["dtype=fp16"], "dtype=fp16 is not one of bf16, fp32, fp8"),
        (["weights=average"], "weights=average is not one of model, ema"),
        (["weights=ema"], "weights=ema: {checkpoint} holds no moving average, as optimizer.ema_decay was 0"),
        (["max_shard_bytes=0"], "max_shard_bytes=0 must be a positive number"),
        (["max_shard_byte=5"], "max_shard_byte is not a key of export; did you mean max_shard_bytes?"),
        (["fp8"], "fp8 cannot be read as key=value"),
        (["dtype=fp8", "dtype=bf16"], "dtype is given twice"),
        (["tokenizer=auto"], "no tokenizer at {checkpoint}/tokenizer.json: name one with tokenizer=FILE"),
        (["tokenizer=/nowhere/tokenizer.json"], "no tokenizer at /nowhere/tokenizer.json"),
    ],
)
def test_export_refuses(tiny: Path, tmp_path: Path, capfd: Any, settings: list[str], words: str) -> None:
    rest = [] if any("tokenizer" in setting for setting in settings) else ["tokenizer=none"]
    assert main(["export", f"checkpoint={tiny}", f"to={tmp_path / 'hf'}", *settings, *rest]) == 2
    said = capfd.readouterr().err
    assert words.format(checkpoint=tiny) in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_places(tiny: Path, tmp_path: Path, capfd: Any) -> None:
    def said(*settings: str) -> str:
        assert main(["export", *settings]) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    assert "to=... is missing" in said(f"checkpoint={tiny}")
    assert "holds no checkpoint: name a run's folder" in said(f"checkpoint={tmp_path}", f"to={tmp_path / 'hf'}")
    assert "exists already" in said(f"checkpoint={tiny}", f"to={tmp_path}", "tokenizer=none")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    content = bytearray((damaged / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "__0_0.distcp").write_bytes(content)
    assert "__0_0.distcp is damaged" in said(f"checkpoint={damaged}", f"to={tmp_path / 'hf'}", "tokenizer=none")
    assert not (tmp_path / "hf").exists()


# --- what import refuses ---


def without_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def with_unknown(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.norm.weight": torch.zeros(3)}))


def with_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}))


def with_other_copy(folder: Path) -> None:
    name = f"model.layers.{TINY.num_hidden_layers}.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name] + 1}))


def with_nan(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))


def without_scale(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight_scale_inv"))


def with_quantised_norm(folder: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    scale = {f"{name}_scale_inv": torch.ones(1)}
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn), **scale}))


def cut_file(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def without_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def with_wrong_index(folder: Path) -> None:
    body = json.loads((folder / INDEX).read_text())
    body["weight_map"]["model.layers.9.x"] = next(iter(body["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(body))


def with_outside_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}}))


def with_no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()


def configured(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        body = json.loads((folder / "config.json").read_text())
        body.update(keys)
        (folder / "config.json").write_text(json.dumps({key: value for key, value in body.items() if value != "gone"}))

    return change


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The tensors of a folder, changed, as one file."""
    with TensorFolder(folder) as found:
        tensors = {name: found.read(name) for name in found.specs}
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_shard(folder / "model.safetensors", specs, tensors.values())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tensor, "lacks 1 tensors of the model: model.norm.weight"),
        (with_unknown, "has 1 tensors that the model does not have: model.layers.9.norm.weight"),
        (with_shape, "model.layers.3.eh_proj.weight has shape [2, 2], the model needs [24, 48]"),
        (with_other_copy, "embed_tokens.weight differs from model.embed_tokens.weight"),
        (with_nan, "model.norm.weight holds infinities or NaN"),
        (without_scale, "lacks 1 tensors of the model: model.layers.0.self_attn.o_proj.weight_scale_inv"),
        (with_quantised_norm, "model.layers.0.input_layernorm.weight is quantised, which only projections are"),
        (cut_file, "model-00001-of-00001.safetensors cannot be read: "),
        (without_file, "model-00001-of-00001.safetensors cannot be read: "),
        (with_wrong_index, "lacks model.layers.9.x, which model.safetensors.index.json promises in it"),
        (with_outside_index, "which is not a file of its folder"),
        (with_no_weights, "holds neither model.safetensors.index.json nor model.safetensors"),
        (configured(hidden_size="gone"), "config.json: hidden_size missing"),
        (configured(hidden_size="wide"), "model.hidden_size: Value 'wide'"),
        (configured(model_type="gpt2"), "config.json: model_type=gpt2 is not one of deepseek_v3"),
        (configured(attention_bias=True), "attention_bias=true cannot be imported: it must be false or null"),
        (configured(qk_rope_head_dim=5), "model.qk_rope_head_dim=5 must be even"),
        (configured(quantization_config={"quant_method": "awq"}), "quant_method must be fp8"),
    ],
)
def test_import_refuses(exported: Path, tmp_path: Path, capfd: Any, spoil: Any, words: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    spoil(folder)
    assert main(["import", f"from={folder}", f"to={tmp_path / 'back'}"]) == 2
    said = capfd.readouterr().err
    assert words in said and len(said.splitlines()) == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_single_file_without_copies_is_the_same(exported: Path, tmp_path: Path) -> None:
    """A model as other tools write it: one file, no copies of what prediction depths share."""
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    copies = [
        f"model.layers.{TINY.num_hidden_layers + k}.{name}"
        for k in (0, 1)
        for name in ("embed_tokens", "shared_head.head")
    ]
    rewrite(folder, lambda tensors: [tensors.pop(f"{name}.weight") for name in copies])
    for number, source in enumerate([exported, folder]):
        assert main(["import", f"from={source}", f"to={tmp_path / str(number)}"]) == 0
    assert (tmp_path / "0" / "__0_0.distcp").read_bytes() == (tmp_path / "1" / "__0_0.distcp").read_bytes()
    assert ModelConfig(**yaml.safe_load((tmp_path / "0" / "model.yaml").read_text())) == TINY
