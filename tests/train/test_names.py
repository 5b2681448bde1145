"""The table of names: a bijection on elements, the same in both directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.train.model_cases import TINY, V3, build, random_routing
from train import names


@pytest.mark.parametrize("seed", range(12))
def test_every_element_has_exactly_one_place_on_disk(seed: int) -> None:
    config = random_routing(seed, num_nextn_predict_layers=seed % 3)
    state = build(config, torch.float32).state_dict()
    # Number all elements of our state: on disk every number must appear once.
    start, numbered = 0, {}
    for name, tensor in state.items():
        numbered[name] = torch.arange(start, start + tensor.numel()).view(tensor.shape)
        start += tensor.numel()
    disk = [entry.slice_of(numbered[entry.ours]) for entry in names.table(config)]
    assert torch.equal(torch.cat([tensor.flatten() for tensor in disk]).sort()[0], torch.arange(start))
    theirs = [entry.theirs for entry in names.table(config)]
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize("seed", range(12))
def test_there_and_back(seed: int) -> None:
    config = random_routing(seed, num_nextn_predict_layers=seed % 3)
    state = build(config, torch.float32).state_dict()
    back = names.from_hf(names.to_hf(state, config), config)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_names_of_the_released_checkpoint() -> None:
    """The index of the published weights lists these for the prediction layer, beside one set per expert."""
    theirs = {entry.theirs for entry in names.table(V3)} | {entry.theirs for entry in names.copies(V3)}
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
    scaled = [name for name in theirs if "_proj" in name and "eh_proj" not in name]
    assert len(theirs) + len(scaled) == 91_991


def test_damaged_checkpoints_are_refused() -> None:
    disk = names.to_hf(build(TINY, torch.float32).state_dict(), TINY)

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in disk.items() if key != name}

    with pytest.raises(ValueError, match=r"lacks 1 tensors, first \['model.norm.weight'\]"):
        names.from_hf(without("model.norm.weight"), TINY)
    with pytest.raises(ValueError, match="has unknown 1 tensors"):
        names.from_hf({**disk, "model.layers.9.norm.weight": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match="has shape"):
        names.from_hf({**disk, "model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(2, 2)}, TINY)
    copy = f"model.layers.{TINY.num_hidden_layers}.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"differs from embed_tokens\.weight"):
        names.from_hf({**disk, copy: disk[copy] + 1}, TINY)
    assert set(names.from_hf(without(copy), TINY)) == set(names.from_hf(disk, TINY))
    assert names.to_hf({**build(TINY).state_dict()}, replace(TINY, num_nextn_predict_layers=0))
