"""A foreign `config.json`: every key is understood, known to be without effect, or refused by its name."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from tests.test_export_family import TOLERANCE
from tests.train.model_cases import random_tokens
from train.hf import config as hf_config
from train.hf.keys import ALIASES, NEUTRAL, WITHOUT_EFFECT

# Values of each kind that a key of another model may have.
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
OTHER = (True, False, 0, 1, 7, 0.5, "gelu", [1], {"a": 1})


def body_of(family: str, seed: int = 0) -> dict[str, Any]:
    return dict(json.loads(hf_config.config_json(random_family(family, seed), "bf16", 5)))


def read(folder: Path, body: dict[str, Any]) -> hf_config.Published:
    (folder / "config.json").write_text(json.dumps(body))
    return hf_config.read_config(folder)


def classes() -> dict[str, Any]:
    from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig

    return {"deepseek_v3": DeepseekV3Config, "deepseek_v2": DeepseekV2Config, "llama": LlamaConfig}


def test_every_attribute_of_hugging_faces_classes_is_known(tmp_path: Path) -> None:
    """As such a class writes it, the file is read or refused for a value: no key of it is one that nobody knows."""
    for family, kind in classes().items():
        ours = body_of(family)
        theirs = {key: value for key, value in kind().to_dict().items() if key not in ours}
        assert theirs
        published = read(tmp_path, {**ours, **theirs, "rope_parameters": None})
        assert published.model == random_family(family, 0), family
        unknown = set(vars(kind())) - set(theirs) - set(ours)
        assert unknown <= {*WITHOUT_EFFECT, *NEUTRAL, *ALIASES, "_output_attentions", "_post_init_done"}, family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_nobody_knows_is_refused_by_its_name(tmp_path: Path, family: str) -> None:
    draw = random.Random(family)
    for key in ("embedding_multiplier", "attn_logit_softcapping", "layer_types", "qk_norm", "use_qk_norm", "x"):
        value = draw.choice((None, *OTHER))
        with pytest.raises(ValueError, match=f"{key}=.* is not a key that is known here"):
            read(tmp_path, {**body_of(family), key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_that_changes_the_model_is_refused_and_a_key_without_effect_is_not(tmp_path: Path, family: str) -> None:
    before = read(tmp_path, body_of(family))
    for key, values in NEUTRAL.items():
        for value in OTHER:
            if value not in values:
                with pytest.raises(ValueError, match=rf"{key}=.* cannot be imported: it must be"):
                    read(tmp_path, {**body_of(family), key: value})
    for key in WITHOUT_EFFECT:
        assert read(tmp_path, {**body_of(family), key: random.Random(key).choice(OTHER)}) == before, key


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "rope_theta": 6.0}, "is 5.0 and 6.0 in one"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type=.*linear.* must be yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.type=.*llama3.* must be yarn"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has factor, and no type"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "of the types linear and yarn at once"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotary_factor=0.5 cannot"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate=false cannot"),
        ({"rope_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor=2.0 cannot"),
        ({"rope_scaling": {**YARN, "odd": 1}}, "odd"),
        ({"rope_scaling": [1]}, "rope_scaling=.* must be a mapping"),
        ({"num_mtp_layers": 3, "num_nextn_predict_layers": 1}, "two values of one thing"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method must be fp8"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}, "must be dynamic"),
        ({"quantization_config": {"quant_method": "fp8", "zero_point": True}}, "zero_point is not known here"),
    ],
)  # fmt: skip
def test_what_would_be_read_as_something_else_is_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    body = {**body_of("deepseek_v3"), "rope_scaling": None}
    if "rope_parameters" in changed:
        body.pop("rope_theta")
    with pytest.raises(ValueError, match=why):
        read(tmp_path, {**body, **changed})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_a_model_that_rotates_halves_computes_what_transformers_does(tmp_path: Path, seed: int, dtype: str) -> None:
    """The oracle reads the same files, in which `rope_interleave` alone is another one."""
    config = replace(random_family("deepseek_v3", seed), num_nextn_predict_layers=0)
    if seed == 0:  # heads that begin and end within blocks of 128 rows
        config = replace(config, num_attention_heads=7, qk_nope_head_dim=50, qk_rope_head_dim=22, kv_lora_rank=130)
    checkpoint = checkpoint_of(config, tmp_path / "checkpoint", seed)
    folder = export(checkpoint, tmp_path / "hf", f"dtype={dtype}", "tokenizer=none")
    body = json.loads((folder / "config.json").read_text())
    for halves, key in ((False, {}), (True, {"rope_interleave": False}), (True, {"rope_interleave": None})):
        (folder / "config.json").write_text(json.dumps({**body, **key}))
        assert hf_config.read_config(folder).halves is halves
        back = import_from(folder, tmp_path / f"back {len(list(tmp_path.iterdir()))}")
        state = state_of(back, config)
        if dtype == "fp32":
            tokens = random_tokens(config, 2, 17, seed)
            ours = logits(config, state, tokens, torch.float64)
            expected = transformers_model(folder, torch.float64)(input_ids=tokens).logits.detach()
            assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max(), key
        elif not halves:
            plain = state
        else:  # quantised blocks are undone before rows are moved: the same numbers in another order
            for name, weight in state.items():
                same = torch.equal(weight, plain[name])
                assert same or torch.equal(weight.sort(0).values, plain[name].sort(0).values), name
                assert same == (not name.endswith(("q_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight")))
