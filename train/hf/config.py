"""`config.json` and its neighbours as Hugging Face's layout has them, from our sizes and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from train.hf.keys import NEUTRAL, check_keys, in_our_names, rope_of
from train.model.attention.kinds import AttentionSizes, GroupedSizes, LatentSizes, absent_keys
from train.model.config import EXPERT_CHOICES, EXPERT_SIZES, ModelConfig
from train.settings import section

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
# The published FP8 checkpoints: E4M3, blocks of 128 x 128, activations quantised as they come.
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class Layout:
    """A `model_type`: the class that loads it, the models that it can hold, and what its files may leave out.

    Attributes:
        has_experts: whether it always (or never) has some; None: either.
        allowed: the values that a key may have there. The first one is meant where a file leaves the key out.
        defaults: what else a file may leave out.
        neutral: keys that its readers know beside, and the values under which they change nothing.
        choices: keys of its readers that `Published` answers.
        free_head_dim: whether a head may be wider or narrower than its share of the hidden size.
    """

    model_type: str
    architecture: str
    attention: type[AttentionSizes]
    has_experts: bool | None
    allowed: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any]
    free_head_dim: bool = True
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    choices: tuple[str, ...] = ()

    def holds(self, model: ModelConfig) -> bool:
        """Whether a reader of this layout computes what the model does."""
        sizes, attention = asdict(model), model.attention_sizes
        experts = model.n_routed_experts > 0
        return (
            type(attention) is self.attention
            and self.has_experts in (None, experts)
            and (self.free_head_dim or model.num_attention_heads * attention.value_head_dim == model.hidden_size)
            and all(sizes[key] in values for key, values in self.allowed.items() if key in sizes and experts)
        )


_EVERYWHERE = {key: NEUTRAL[key] for key in ("attention_bias", "hidden_act", "tie_word_embeddings")}
_EXPERTS = {**_EVERYWHERE, "moe_layer_freq": (1,)}
_COMMON = {"num_nextn_predict_layers": 0, "initializer_range": 0.02, "rope_theta": 10000.0, "rope_scaling": None}
LAYOUTS = (
    Layout(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        LatentSizes,
        None,
        {**_EXPERTS, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        {**_COMMON, "q_lora_rank": None},
        choices=("rope_interleave",),
    ),
    Layout(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LatentSizes,
        True,
        {
            **_EXPERTS,
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            # Its readers leave out either the normalising or the factor behind it.
            "norm_topk_prob": (False,),
        },
        {**_COMMON, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        neutral={"mlp_bias": (False, None), "rope_interleave": (True,)},
    ),
    Layout(
        "deepseek",
        "DeepseekForCausalLM",
        GroupedSizes,
        True,
        {**_EXPERTS, "scoring_func": ("softmax",), "topk_method": ("greedy",), "routed_scaling_factor": (1.0,)},
        {**_COMMON, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        free_head_dim=False,
    ),
    Layout("llama", "LlamaForCausalLM", GroupedSizes, False, {**_EVERYWHERE, "mlp_bias": (False, None)}, _COMMON),
)
# What readers of the layouts expect beside, and which changes nothing here.
_BESIDE = {"attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True}
_DENSE_KEYS = ("n_routed_experts", "first_k_dense_replace", *EXPERT_SIZES, *EXPERT_CHOICES)


def config_json(model: ModelConfig, dtype: str, end_of_document: int | None) -> str:
    """The text of `config.json`. dtype: bf16, fp32 or fp8; end_of_document: the token, None without a tokenizer.

    Raises ValueError for a model that no layout can hold.
    """
    layout = layout_of(model)
    sizes = {key: value for key, value in asdict(model).items() if value is not None and key != "attention"}
    if layout.has_experts is False:
        sizes = {key: value for key, value in sizes.items() if key not in _DENSE_KEYS}
    body = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        **{key: values[0] for key, values in layout.allowed.items()},
        **_BESIDE,
        "rope_scaling": None,
        # Also where there are none: readers have a default of their own. `transformers` multiplies by it: 0, not null.
        **({"n_shared_experts": 0} if model.n_routed_experts else {}),
        **model.attention_sizes.published,
        **sizes,
        "bos_token_id": None,
        "eos_token_id": end_of_document,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
    }
    if dtype == "fp8":
        body["quantization_config"] = FP8
    return json.dumps(dict(sorted(body.items())), indent=2) + "\n"


def generation_config_json(end_of_document: int | None) -> str:
    """The text of `generation_config.json`: what ends a text; sampling is left to the reader."""
    body = {"_from_model_config": True, "bos_token_id": None, "eos_token_id": end_of_document}
    return json.dumps(body, indent=2) + "\n"


def layout_of(model: ModelConfig) -> Layout:
    """The layout that holds a model. ValueError where none does."""
    found = next((layout for layout in LAYOUTS if layout.holds(model)), None)
    if found is None:
        keys = (
            "attention",
            "n_routed_experts",
            "scoring_func",
            "topk_method",
            "norm_topk_prob",
            "routed_scaling_factor",
        )
        shown = ", ".join(f"model.{key}={getattr(model, key)}" for key in keys)
        known = ", ".join(layout.model_type for layout in LAYOUTS)
        raise ValueError(f"no reader of {known} computes what this model does: {shown}")
    return found


@dataclass(frozen=True)
class Published:
    """A model as a folder holds it.

    Attributes:
        halves: latent attention rotates element j of a head's rotated part with element j + d / 2, not neighbours with
            each other as here (`rope_interleave: false`): the rows that make them lie in another order.
    """

    model: ModelConfig
    halves: bool = False


def read_config(folder: Path) -> Published:
    """The model that a folder's `config.json` describes.

    Raises ValueError, naming the key, for a model of another kind, a missing key, what cannot be built here, and a key
    that is not known to be without effect (`train/hf/keys.py`).
    """
    path = folder / CONFIG
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {folder} is no model in Hugging Face's layout") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        return _published(body)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _published(body: Any) -> Published:
    if not isinstance(body, dict):
        raise ValueError("this is no mapping of keys")
    layout = next((each for each in LAYOUTS if each.model_type == body.get("model_type")), None)
    if layout is None:
        known = ", ".join(each.model_type for each in LAYOUTS)
        raise ValueError(f"model_type={body.get('model_type')} is not one of {known}")
    body = in_our_names(body)
    names = {field.name for field in fields(ModelConfig)} - {"attention"}
    understood = {*names, *layout.choices, "model_type", "rope_parameters", "quantization_config"}
    check_keys(body, understood, {**NEUTRAL, **layout.allowed, **layout.neutral})
    _check_quantisation(body.get("quantization_config"))
    # `transformers` takes null for false.
    halves = "rope_interleave" in layout.choices and not body.get("rope_interleave", True)
    return Published(_model(layout, body, names), halves)


def _model(layout: Layout, body: Mapping[str, Any], names: Collection[str]) -> ModelConfig:
    meant = {key: values[0] for key, values in layout.allowed.items() if key in names}
    given = {key: value for key, value in {**body, **rope_of(body)}.items() if key in names and value is not None}
    sizes = {**layout.defaults, **meant, **given}
    if body.get("n_shared_experts", 0) is None:  # as the code published with DeepSeek's models says that there are none
        sizes["n_shared_experts"] = None
    sizes |= _attention(layout.attention, sizes)
    if layout.has_experts is False or not sizes.get("n_routed_experts"):
        sizes |= {"n_routed_experts": 0, "first_k_dense_replace": sizes.get("num_hidden_layers")}
        sizes |= dict.fromkeys(EXPERT_SIZES)
        sizes = {key: value for key, value in sizes.items() if key not in EXPERT_CHOICES}
    # None stands for a size that a model lacks. A file has to say so: its readers take defaults of their own.
    needed = {field.name for field in fields(ModelConfig) if field.default is MISSING} | set(EXPERT_SIZES)
    if missing := sorted(needed - set(sizes)):
        raise ValueError(f"{', '.join(missing)} missing: the model's sizes are not known")
    model = section(ModelConfig, sizes, "model")
    model.check()
    return model


def _attention(kind: type[AttentionSizes], found: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the layout's attention that follow from others, and None for those that other kinds have."""
    return {"attention": kind.name, **dict.fromkeys(absent_keys(kind)), **kind.from_published(found)}


# What else a file may say of its quantisation, and the values under which it says nothing new: which tensors are
# quantised, and by which scales, is read from the tensors. None: any.
_QUANTISATION: Mapping[str, tuple[Any, ...] | None] = {
    "activation_scheme": ("dynamic",),
    "scale_fmt": (None, "ue8m0"),
    "modules_to_not_convert": None,
    "dequantize": None,
}


def _check_quantisation(found: Any) -> None:
    if found is None:
        return
    wanted = {key: FP8[key] for key in ("quant_method", "fmt", "weight_block_size")}
    for key, value in wanted.items():
        if not isinstance(found, dict) or found.get(key, value) != value:
            raise ValueError(f"quantization_config={found} cannot be imported: {key} must be {value}")
    for key in found.keys() - wanted.keys():
        values = _QUANTISATION.get(key, ())
        if values is not None and found[key] not in values:
            must = f"must be {' or '.join(map(str, values))}" if values else "is not known here"
            raise ValueError(f"quantization_config={found} cannot be imported: {key} {must}")
