"""Every shape that cannot be built is refused in a sentence that names field, value and rule."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from tests.train.model_cases import TINY, TINY_DENSE, V3, random_config, random_dense_config
from train.model.attention.build import MODULES
from train.model.attention.kinds import ATTENTIONS
from train.model.config import ModelConfig

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": 0}, "model.hidden_size=0 must be positive"),
        ({"n_shared_experts": -1}, "model.n_shared_experts=-1 must not be negative"),
        ({"q_lora_rank": 0}, "model.q_lora_rank=0 must be positive or null"),
        ({"qk_rope_head_dim": 5}, "model.qk_rope_head_dim=5 must be even"),
        ({"first_k_dense_replace": 4}, "model.first_k_dense_replace=4 must lie in 0..model.num_hidden_layers=3"),
        ({"num_nextn_predict_layers": -1}, "model.num_nextn_predict_layers=-1 must not be negative"),
        ({"n_group": 3}, "model.n_group=3 does not divide model.n_routed_experts=8"),
        ({"n_group": 8}, "model.n_group=8 leaves 1 of model.n_routed_experts=8 a group"),
        ({"topk_group": 5}, "model.topk_group=5 exceeds model.n_group=4"),
        ({"num_experts_per_tok": 5}, "model.num_experts_per_tok=5 exceeds the 4 experts of model.topk_group=2"),
        ({"n_routed_experts": -1}, "model.n_routed_experts=-1 must not be negative"),
        ({"kv_lora_rank": None}, "model.kv_lora_rank=null must be positive: model.attention=mla needs it"),
        ({"n_group": None}, "model.n_group=null must be positive: model.n_routed_experts=8 needs it"),
        ({"attention": "mha"}, "model.attention=mha is not one of mla, gqa"),
        ({"head_dim": 8}, "model.head_dim=8 must be null: model.attention=mla does not have it"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, r"model.rope_scaling.type=\['linear'\] must be yarn"),
        ({"rope_scaling": {}}, "must be yarn"),
        ({"rope_scaling": {**YARN, "beta": 1}}, r"model.rope_scaling has unknown keys \['beta'\]"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "model.rope_scaling.factor=4 must be a positive number"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "model.rope_scaling.factor=0.5 must be at least 1"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast=1 must not be below beta_slow=2"),
    ],
)
def test_refused(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, **change).check()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"num_key_value_heads": None},
            "model.num_key_value_heads=null must be positive: model.attention=gqa needs it",
        ),
        ({"num_key_value_heads": 2}, "model.num_key_value_heads=2 does not divide model.num_attention_heads=3"),
        ({"head_dim": 0}, "model.head_dim=0 must be positive"),
        ({"head_dim": 5}, "model.head_dim=5 must be even"),
        ({"v_head_dim": 8}, "model.v_head_dim=8 must be null: model.attention=gqa does not have it"),
        ({"q_lora_rank": 8}, "model.q_lora_rank=8 must be null: model.attention=gqa does not have it"),
        ({"first_k_dense_replace": 1}, "model.first_k_dense_replace=1 leaves layers to the experts"),
        ({"topk_group": 1}, "model.topk_group=1 must be null: model.n_routed_experts=0 has no experts"),
        ({"n_shared_experts": 0}, "model.n_shared_experts=0 must be null: model.n_routed_experts=0 has no experts"),
        ({"norm_topk_prob": False}, "model.norm_topk_prob=false must stay true: model.n_routed_experts=0 has no"),
        ({"routed_scaling_factor": 1.0}, "model.routed_scaling_factor=1.0 must stay 2.5"),
    ],
)
def test_refused_of_a_dense_model(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        replace(TINY_DENSE, **change).check()


def test_legal_shapes_pass() -> None:
    without_shared = (replace(TINY, n_shared_experts=0), replace(TINY, n_shared_experts=None))
    for config in (TINY, V3, replace(V3, rope_scaling=YARN), TINY_DENSE, *without_shared):
        config.check()
    for seed in range(200):
        random_config(seed).check()
        random_dense_config(seed).check()


def test_every_kind_of_attention_has_a_module_and_its_keys_in_the_config() -> None:
    """A key that a kind has alone is None in models of the others, so it must have None as a value."""
    assert set(MODULES) == set(ATTENTIONS.values())
    hints = get_type_hints(ModelConfig)
    for name, kind in ATTENTIONS.items():
        assert kind.name == name and set(kind.needed_keys()) <= set(kind.own_keys())
        assert all(type(None) in get_args(hints[key]) for key in kind.own_keys())


def test_the_softmax_scale_of_the_extended_model() -> None:
    """sqrt(t) = 1.3689 at a factor of 40 (technical report, section 4.3)."""
    assert V3.attention_sizes.softmax_scale == pytest.approx(192**-0.5)
    extended = replace(V3, rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert extended.attention_sizes.softmax_scale == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)
