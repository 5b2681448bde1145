"""A first value depends on the seed, the global name and the global shape; on nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from parallel.shards import Piece
from tests.reference import LocalDispatch
from tests.train.model_cases import TINY
from train.assemble import init_masters
from train.model.config import ModelConfig
from train.model.init import init_weights
from train.model.parts import Parts
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine


class _Slice(LocalDispatch):
    def __init__(self, first: int, num: int) -> None:
        super().__init__(num)
        self.first_expert = first


def make(
    config: ModelConfig = TINY,
    experts: tuple[int, int] = (0, 8),
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
    parts: Parts | None = None,
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, _Slice(*experts), everywhere(TorchEngine()), parts=parts)
    init_weights(model, seed, dtype, "cpu")
    return model


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_any_layout_of_experts_holds_the_same_model(num_ranks: int) -> None:
    whole, num = make(), 8 // num_ranks
    ranks = [make(experts=(rank * num, num)) for rank in range(num_ranks)]
    for name, parameter in whole.named_parameters():
        parts = [rank.get_parameter(name) for rank in ranks]
        if whole.is_expert(name):
            assert torch.equal(torch.cat(parts), parameter)
            assert all(rank.global_shape(name) == parameter.shape for rank in ranks)
        else:
            assert all(torch.equal(part, parameter) for part in parts)


def test_any_split_into_parts_holds_the_same_model() -> None:
    whole = make()
    stages = [
        make(parts=Parts(embedding=True, layers=(0, 1), head=False, mtp=False)),
        make(parts=Parts(embedding=False, layers=(2,), head=True, mtp=True)),
    ]
    assert {name for stage in stages for name in stage.state_dict()} == set(whole.state_dict())
    for stage in stages:
        for name, tensor in stage.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[name])
    assert [list(stage.routers()) for stage in stages] == [[0], [1, 2, 3]]


def test_precisions_hold_the_same_values() -> None:
    whole = make().state_dict()
    for dtype in (torch.float64, torch.bfloat16):
        for name, tensor in make(dtype=dtype).state_dict().items():
            is_bias = name.endswith("correction_bias")
            assert tensor.dtype == (torch.float32 if is_bias and dtype == torch.bfloat16 else dtype)
            assert torch.equal(tensor, whole[name].to(tensor.dtype))


def test_values_differ_by_seed_name_expert_and_shape() -> None:
    model = make()
    first = model.get_parameter("layers.1.mlp.experts.down_proj")
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, model.get_parameter("layers.2.mlp.experts.down_proj"))
    assert not torch.equal(first, make(seed=4).get_parameter("layers.1.mlp.experts.down_proj"))
    wide = make(replace(TINY, n_routed_experts=16), experts=(0, 16))
    assert not torch.equal(first[0], wide.get_parameter("layers.1.mlp.experts.down_proj")[0])


def test_the_distribution() -> None:
    model = make(replace(TINY, hidden_size=400, vocab_size=500))
    weight = model.get_parameter("embed_tokens.weight").detach()
    assert weight.std().item() == pytest.approx(TINY.initializer_range, rel=0.02)
    assert abs(weight.mean().item()) < 0.01 * TINY.initializer_range
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    assert norms and all(bool((parameter == 1).all()) for parameter in norms)
    assert all(not buffer.any() for buffer in model.buffers())


def test_masters_begin_as_drawn_whatever_ranges_a_rank_owns() -> None:
    whole, model = make(), make(dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(int(os.environ["HALOCLINE_SEED"]))
    wanted, state = {}, {}
    for name, parameter in whole.named_parameters():
        flat = parameter.detach().flatten()
        ranges = list(pairwise(torch.randint(len(flat) + 1, (4,), generator=generator).sort().values.tolist()))
        wanted[name] = [flat[first:last] for first, last in ranges]
        state[f"master.{name}"] = [Piece(first, torch.zeros(last - first)) for first, last in ranges]
    init_masters(model, 3, state)
    for name, parts in wanted.items():
        pieces = [piece.tensor for piece in state[f"master.{name}"]]
        assert all(torch.equal(piece, part) for piece, part in zip(pieces, parts, strict=True)), name


def test_masters_that_are_the_weights_are_left_alone() -> None:
    model = make()
    own = {f"master.{name}": [Piece(0, torch.zeros(p.numel()))] for name, p in model.named_parameters()}
    init_masters(model, 3, own)
    assert not any(bool(pieces[0].tensor.any()) for pieces in own.values())
