"""`config.json` and its neighbours as Hugging Face's layout has them, from our sizes and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from train import compose
from train.model.config import ModelConfig

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# The published FP8 checkpoints: E4M3, blocks of 128 x 128, activations quantised as they come.
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class Layout:
    """A `model_type`: the class that loads it, and the keys that say there what is always so here."""

    model_type: str
    architecture: str
    fixed: Mapping[str, Any]


_EVERYWHERE = {
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_EXPERTS = {**_EVERYWHERE, "moe_layer_freq": 1}
LAYOUTS = (
    Layout("deepseek_v3", "DeepseekV3ForCausalLM", {**_EXPERTS, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
)
# What readers of the layout expect beside, and which changes nothing here.
_BESIDE = {"attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True}


def config_json(model: ModelConfig, dtype: str, end_of_document: int | None) -> str:
    """The text of `config.json`. dtype: bf16, fp32 or fp8; end_of_document: the token, None without a tokenizer."""
    layout = _layout_of(model)
    body = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        **layout.fixed,
        **_BESIDE,
        **asdict(model),
        "num_key_value_heads": model.num_attention_heads,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
    }
    if dtype == "fp8":
        body["quantization_config"] = FP8
    return json.dumps(dict(sorted(body.items())), indent=2) + "\n"


def generation_config_json(end_of_document: int | None) -> str:
    """The text of `generation_config.json`: what ends a text; sampling is left to the reader."""
    return json.dumps({"_from_model_config": True, "bos_token_id": None, "eos_token_id": end_of_document}, indent=2)


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's `config.json` describes.

    Raises ValueError, naming the key, for a model of another kind, a missing key, or what cannot be built here.
    """
    path = folder / CONFIG
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {folder} is no model in Hugging Face's layout") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        return _model(body)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _layout_of(model: ModelConfig) -> Layout:
    return LAYOUTS[0]


def _model(body: Any) -> ModelConfig:
    if not isinstance(body, dict):
        raise ValueError("this is no mapping of keys")
    layout = next((each for each in LAYOUTS if each.model_type == body.get("model_type")), None)
    if layout is None:
        known = ", ".join(each.model_type for each in LAYOUTS)
        raise ValueError(f"model_type={body.get('model_type')} is not one of {known}")
    for key, value in layout.fixed.items():
        if body.get(key, value) != value:
            raise ValueError(f"{key}={body[key]} cannot be imported: it must be {value}")
    _check_quantisation(body.get("quantization_config"))
    body = {**body, **_rope(body)}
    kept = {field.name: body[field.name] for field in fields(ModelConfig) if field.name in body}
    needed = {field.name for field in fields(ModelConfig) if field.default is MISSING}
    if missing := sorted(needed - set(kept)):
        raise ValueError(f"{', '.join(missing)} missing: the model's sizes are not known")
    heads = body.get("num_key_value_heads")
    if heads not in (None, body["num_attention_heads"]):
        raise ValueError(f"num_key_value_heads={heads} must be num_attention_heads={body['num_attention_heads']}")
    model = compose.section(ModelConfig, kept, "model")
    model.check()
    return model


def _rope(body: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which newer files have together as `rope_parameters`."""
    found = dict(body.get("rope_parameters") or {})
    if not found:
        return {}
    theta = found.pop("rope_theta", None)
    kind = found.get("rope_type", found.get("type", "default"))
    scaling = None if kind == "default" else {key: value for key, value in found.items() if value is not None}
    return {"rope_scaling": scaling, **({} if theta is None else {"rope_theta": theta})}


def _check_quantisation(found: Any) -> None:
    if found is None:
        return
    wanted = {key: FP8[key] for key in ("quant_method", "fmt", "weight_block_size")}
    for key, value in wanted.items():
        if not isinstance(found, dict) or found.get(key, value) != value:
            raise ValueError(f"quantization_config={found} cannot be imported: {key} must be {value}")
