"""Checkpoints without a run, and what is exported from them, for tests."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.__main__ import main
from launch.imports import start_state
from tests.runs import read_checkpoint
from tests.train.model_cases import (
    build,
    no_shared_experts_are_matrices_without_elements,
    random_config,
    random_dense_config,
    with_grouped_attention,
)
from train.checkpoint import step_folders
from train.checkpoint.writer import write_ranges
from train.files import CRC32, write_durably
from train.hf.layout import shapes
from train.model.config import ModelConfig
from train.model.loss import LossTerms
from train.model.tape import Inline, drive


def checkpoint_of(config: ModelConfig, folder: Path, seed: int = 0) -> Path:
    """A complete checkpoint of random weights, each tensor in one piece."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    known = {name if "bias" in name else f"master.{name}": torch.Size(shape) for name, shape in shapes(config).items()}
    sizes = {name: shape.numel() for name, shape in known.items()}

    def values(name: str) -> Tensor:
        drawn = torch.randn(sizes[name], generator=generator)
        return 1 + 0.2 * drawn if "norm." in name else (0.3 if "bias" in name else 0.08) * drawn

    records = write_ranges(folder, sizes, ((name, 0, values(name)) for name in sizes))
    state = start_state(config)
    for name, text in (("state.json", state.to_json()), ("config.yaml", state.config)):
        records[name] = write_durably(folder / name, text.encode(), CRC32)
    step_folders.write_manifest(folder, records)
    return folder


def export(source: Path, target: Path, *settings: str) -> Path:
    """`python -m launch export`; the folder that it wrote."""
    assert main(["export", f"checkpoint={source}", f"to={target}", *settings]) == 0
    return target


def import_from(source: Path, target: Path) -> Path:
    """`python -m launch import`; the checkpoint that it wrote."""
    assert main(["import", f"from={source}", f"to={target}"]) == 0
    return target


def state_of(checkpoint: Path, config: ModelConfig, kind: str = "master.") -> dict[str, Tensor]:
    """The weights and biases of a checkpoint in their shapes."""
    flat = read_checkpoint(checkpoint)
    return {
        name: flat[name if name.endswith("correction_bias") else f"{kind}{name}"].view(shape)
        for name, shape in shapes(config).items()
    }


def logits(config: ModelConfig, state: dict[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Ours, of a checkpoint's weights: tokens [B, S] -> [B, S, vocabulary]."""
    model = build(config, dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    with torch.no_grad():
        x = model.embed_tokens(tokens)
        terms = LossTerms(0, 0, 0)
        x = drive(model.run_layers(x, terms, Inline(), model.empty_findings(x.device)))
        return model.lm_head(model.norm(x))


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """What `transformers` loads from an exported folder."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with no_shared_experts_are_matrices_without_elements():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager).eval()


FAMILIES = ("deepseek_v3", "deepseek_v2", "deepseek", "llama")


def random_family(layout: str, seed: int) -> ModelConfig:
    """A random small model that this layout of Hugging Face's holds, with its routing and attention."""
    draw = random.Random(f"{layout} {seed}")
    num_depths = draw.choice([0, 1, 2])
    if layout == "llama":
        return random_dense_config(seed, num_nextn_predict_layers=num_depths)
    config = random_config(seed, num_nextn_predict_layers=num_depths)
    config = replace(config, n_shared_experts=config.n_shared_experts or 0)  # as config.json has it
    if layout == "deepseek_v3":
        return config
    # A share of the hidden size for every head, as readers want it.
    config = replace(config, scoring_func="softmax", norm_topk_prob=False)
    config = replace(config, hidden_size=config.num_attention_heads * 2 * draw.randint(3, 9))
    if layout == "deepseek_v2":
        method = draw.choice(["greedy", "group_limited_greedy"])
        return replace(
            config, topk_method=method, topk_group=config.n_group if method == "greedy" else config.topk_group
        )
    config = replace(config, topk_method="greedy", topk_group=config.n_group, routed_scaling_factor=1.0)
    config = replace(config, rope_scaling=None, norm_topk_prob=draw.random() < 0.5)
    heads = config.num_attention_heads
    shared = draw.choice([count for count in range(1, heads + 1) if heads % count == 0])
    return with_grouped_attention(config, shared, config.hidden_size // heads)
