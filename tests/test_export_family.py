"""Random models of every family: exported, they compute the same elsewhere; imported, they are the same again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from tests.exports import (
    FAMILIES,
    checkpoint_of,
    export,
    import_from,
    logits,
    random_family,
    state_of,
    transformers_model,
)
from tests.train.disk_names import part
from tests.train.model_cases import random_tokens
from train.hf import config as hf_config
from train.hf import names
from train.hf.layout import DiskTensor, disk_tensors, shapes
from train.hf.tensor_files import TensorFolder
from train.model.config import ModelConfig

# The oracle's norms, router and rotary tables are float32 in every model, which bounds what float64 can show.
TOLERANCE = 1e-5


def published_reading(folder: Path, tokens: Tensor) -> Tensor:
    """DeepSeekMoE (arXiv 2401.06066, Eq. 9-11) from the files alone, in float64: tokens [S] -> logits [S, vocabulary].

    Nothing of it is ours: names and sizes are those of the files. Positions rotate as in Llama.
    """
    body = json.loads((folder / "config.json").read_text())
    with TensorFolder(folder) as files:
        w = {name.removeprefix("model."): files.read(name).double() for name in files.specs}
    heads, kv_heads, width = body["num_attention_heads"], body["num_key_value_heads"], body["head_dim"]
    positions = torch.arange(len(tokens)).double()[:, None]
    angles = positions / body["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    past = torch.full((len(tokens), len(tokens)), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + body["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (x @ w[f"{name}.{each}_proj.weight"].T for each in "qkv")
        out = []
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            shared = head // (heads // kv_heads)
            theirs = slice(shared * width, (shared + 1) * width)
            scores = rotated(q[:, mine]) @ rotated(k[:, theirs]).T / math.sqrt(width) + past
            out.append(scores.softmax(-1) @ v[:, theirs])
        return torch.cat(out, -1) @ w[f"{name}.o_proj.weight"].T

    def mlp(x: Tensor, name: str) -> Tensor:
        gate, up = x @ w[f"{name}.gate_proj.weight"].T, x @ w[f"{name}.up_proj.weight"].T
        return (gate * gate.sigmoid() * up) @ w[f"{name}.down_proj.weight"].T

    def experts(x: Tensor, name: str) -> Tensor:
        out = mlp(x, f"{name}.shared_experts") if body["n_shared_experts"] else torch.zeros_like(x)
        for row, scores in enumerate((x @ w[f"{name}.gate.weight"].T).softmax(-1)):
            best, which = scores.topk(body["num_experts_per_tok"])
            if body["norm_topk_prob"]:
                best = best / best.sum()
            for weight, expert in zip(best, which.tolist(), strict=True):
                out[row] += weight * mlp(x[row], f"{name}.experts.{expert}")
        return out

    x = w["embed_tokens.weight"][tokens]
    for index in range(body["num_hidden_layers"]):
        name = f"layers.{index}"
        x = x + attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        feed = mlp if index < body["first_k_dense_replace"] else experts
        x = x + feed(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
    return norm(x, "norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_elsewhere(tmp_path: Path, family: str, seed: int) -> None:
    config = random_family(family, seed)
    checkpoint = checkpoint_of(config, tmp_path / "checkpoint", seed)
    folder = export(checkpoint, tmp_path / "hf", "dtype=fp32", "tokenizer=none", "max_shard_bytes=30000")
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    tokens = random_tokens(config, 2, 17, seed)
    ours = logits(config, state_of(checkpoint, config), tokens, torch.float64)
    if family == "deepseek":
        expected = torch.stack([published_reading(folder, each) for each in tokens])
    else:
        expected = transformers_model(folder, torch.float64)(input_ids=tokens).logits.detach()
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max(), config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), "fp8"])
def test_there_and_back(tmp_path: Path, family: str, dtype: str) -> None:
    config = random_family(family, seed=11)
    checkpoint = checkpoint_of(config, tmp_path / "checkpoint")
    back = import_from(export(checkpoint, tmp_path / "hf", f"dtype={dtype}", "tokenizer=none"), tmp_path / "back")
    before, after = state_of(checkpoint, config), state_of(back, config)
    for name, weight in before.items():
        expected = weight if dtype == "fp32" or "bias" in name else weight.bfloat16().float()
        if dtype != "fp8" or torch.equal(after[name], expected):
            assert torch.equal(after[name], expected), name
        else:
            # Three bits of mantissa: within a sixteenth of itself, or of the least normal number of its block.
            assert bool(((after[name] - weight).abs() <= (weight.abs() + weight.abs().max() * 2**-14) / 16).all()), name
    assert ModelConfig(**yaml.safe_load((back / "model.yaml").read_text())) == config


# --- the table ---


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_a_bijection_on_elements(family: str, seed: int) -> None:
    """Every element of ours lies in exactly one disk tensor, which is one contiguous range, and in one of its bands."""
    config = random_family(family, seed)
    known, tensors = shapes(config), disk_tensors(config)
    assert len({disk.name for disk in tensors}) == len(tensors)
    covered: dict[str, list[tuple[int, int]]] = {name: [] for name in known}
    for disk in tensors:
        numbered = torch.arange(math.prod(known[disk.entry.ours])).view(known[disk.entry.ours])
        held = part(disk.entry, numbered)
        assert tuple(held.shape) == disk.shape
        assert torch.equal(held.flatten(), torch.arange(disk.offset, disk.offset + disk.numel)), disk
        parts = [(offset, offset + numel) for _, offset, numel in disk.bands(max_numel=500)]
        assert parts[0][0] == disk.offset and parts[-1][1] == disk.offset + disk.numel
        covered[disk.entry.ours] += parts
    for name, parts in covered.items():
        ends = [0, *(end for _, end in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1], name
        assert ends[-1] == math.prod(known[name])


def test_bands_keep_blocks_whole() -> None:
    disk = DiskTensor(names.Entry("a", "a"), 7, (1000, 300))
    rows = [band for band, _, _ in disk.bands(max_numel=100_000)]
    assert [band.start for band in rows] == [0, 256, 512, 768] and rows[-1].stop == 1000


# --- config.json ---


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("family", FAMILIES)
def test_config_there_and_back(tmp_path: Path, family: str, seed: int) -> None:
    config = random_family(family, seed)
    assert hf_config.layout_of(config).model_type == family
    (tmp_path / "config.json").write_text(hf_config.config_json(config, "bf16", 5))
    assert hf_config.read_config(tmp_path).model == config


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """Newer files have other keys for the same: `rope_parameters`, a head's width that follows from others."""
    from transformers import AutoConfig

    for family in ("deepseek_v3", "deepseek_v2", "llama"):
        for seed in range(3):
            config = random_family(family, seed)
            (tmp_path / "config.json").write_text(hf_config.config_json(config, "bf16", 5))
            AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
            assert hf_config.read_config(tmp_path / "saved").model == config


def test_no_shared_experts_are_written_as_0_and_read_as_0_or_null(tmp_path: Path) -> None:
    """`transformers` multiplies by their number; the code published with DeepSeek's models has null for none."""
    config = replace(random_family("deepseek_v3", 0), n_shared_experts=None)
    body = json.loads(hf_config.config_json(config, "bf16", 5))
    assert body["n_shared_experts"] == 0
    for written in (0, None):
        (tmp_path / "config.json").write_text(json.dumps(body | {"n_shared_experts": written}))
        assert hf_config.read_config(tmp_path).model == replace(config, n_shared_experts=written)
    (tmp_path / "config.json").write_text(json.dumps({key: body[key] for key in body if key != "n_shared_experts"}))
    with pytest.raises(ValueError, match="n_shared_experts missing"):
        hf_config.read_config(tmp_path)


def test_what_transformers_saves_without_shared_experts_is_imported(tmp_path: Path) -> None:
    """Its files hold matrices without elements for them."""
    config = replace(random_family("deepseek_v3", 2), n_shared_experts=0, num_nextn_predict_layers=0)
    checkpoint = checkpoint_of(config, tmp_path / "checkpoint")
    folder = export(checkpoint, tmp_path / "hf", "dtype=fp32", "tokenizer=none")
    transformers_model(folder, torch.float32).save_pretrained(tmp_path / "saved")
    with TensorFolder(tmp_path / "saved") as files:
        assert any("shared_experts" in name for name in files.specs)
    before, after = (
        state_of(each, config) for each in (checkpoint, import_from(tmp_path / "saved", tmp_path / "back"))
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_models_that_no_layout_holds_are_refused() -> None:
    config = random_family("deepseek_v2", 1)
    for changed in (replace(config, norm_topk_prob=True), replace(config, scoring_func="sigmoid")):
        with pytest.raises(ValueError, match=r"no reader of .* computes what this model does: model\.attention=mla"):
            hf_config.config_json(changed, "bf16", None)
