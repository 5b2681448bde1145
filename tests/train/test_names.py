"""The table of names: a bijection on elements, the same in both directions.

(As places and bands, for every layout of Hugging Face's: tests/test_export_family.py.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.train.disk_names import from_hf, part, to_hf
from tests.train.model_cases import (
    TINY_DENSE,
    V3,
    build,
    llama,
    random_dense_config,
    random_routing,
    with_grouped_attention,
)
from train.hf import names
from train.hf.layout import disk_tensors
from train.model.config import ModelConfig


def cases() -> list[ModelConfig]:
    """With experts, without, and with experts behind grouped-query attention."""
    latent = [random_routing(seed, num_nextn_predict_layers=seed % 3) for seed in range(12)]
    dense = [random_dense_config(seed, num_nextn_predict_layers=seed % 3) for seed in range(6)]
    return [*latent, *dense, with_grouped_attention(latent[1], num_key_value_heads=1, head_dim=4)]


@pytest.mark.parametrize("config", cases())
def test_every_element_has_exactly_one_place_on_disk(config: ModelConfig) -> None:
    state = build(config, torch.float32).state_dict()
    # Number all elements of our state: on disk every number must appear once.
    start, numbered = 0, {}
    for name, tensor in state.items():
        numbered[name] = torch.arange(start, start + tensor.numel()).view(tensor.shape)
        start += tensor.numel()
    tensors = disk_tensors(config)
    parts = [part(disk.entry, numbered[disk.entry.ours]) for disk in tensors]
    assert [tuple(part.shape) for part in parts] == [disk.shape for disk in tensors]
    assert torch.equal(torch.cat([part.flatten() for part in parts]).sort()[0], torch.arange(start))
    assert len({disk.name for disk in tensors}) == len(tensors) == len(list(names.table(config)))


@pytest.mark.parametrize("config", cases())
def test_there_and_back(config: ModelConfig) -> None:
    state = build(config, torch.float32).state_dict()
    back = from_hf(to_hf(state, config), config)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_names_of_the_released_checkpoint() -> None:
    """The index of the published weights lists these for the prediction layer, beside one set per expert."""
    tensors = [*disk_tensors(V3), *disk_tensors(V3, copies=True)]
    theirs = {disk.name for disk in tensors}
    last = {name.removeprefix("model.layers.61.") for name in theirs if name.startswith("model.layers.61.")}
    own = {name for name in last if not name.startswith(("mlp.", "self_attn."))}
    assert own == {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
        "embed_tokens.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert sum(name.startswith("mlp.experts.") for name in last) == 3 * 256
    # 91,991 tensors on disk, of which the float8 ones come with a second tensor of scales.
    assert len(theirs) == len(tensors)
    assert len(theirs) + sum(disk.is_linear for disk in tensors) == 91_991


def test_a_dense_model_has_the_names_and_shapes_of_llama() -> None:
    state = build(TINY_DENSE, torch.float32).state_dict()
    theirs = llama(replace(TINY_DENSE, num_nextn_predict_layers=0), state, torch.float32).state_dict()
    disk = to_hf(state, replace(TINY_DENSE, num_nextn_predict_layers=0))
    assert {name: tensor.shape for name, tensor in disk.items()} == {n: t.shape for n, t in theirs.items()}
