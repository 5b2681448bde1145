"""Shape of a model, under the keys of Hugging Face's config.json of DeepSeek's models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_YARN_REQUIRED = ("factor", "original_max_position_embeddings")
_YARN_OPTIONAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model of DeepSeek's. `check` refuses what cannot be built. What a model does not have is None.

    `attention` is "mla" (latent attention: the sizes from `kv_lora_rank` to `v_head_dim`, and `q_lora_rank`, None to
    project queries without a latent) or "gqa" (grouped-query attention: `num_key_value_heads` and `head_dim`). With
    `n_routed_experts=0` all layers are dense, those of multi-token prediction too, and `first_k_dense_replace` is
    `num_hidden_layers`. `rope_scaling` is None, or YaRN's keys: `type` (or `rope_type`) = "yarn", `factor`,
    `original_max_position_embeddings`, and optionally `beta_fast` (32), `beta_slow` (1), `mscale`, `mscale_all_dim`.
    `num_nextn_predict_layers` is the depth D of multi-token prediction.

    `scoring_func` is sigmoid or softmax. `topk_method`: noaux_tc selects by score + bias, a group counting as much as
    its two best experts; group_limited_greedy by score, a group counting as much as its best; greedy by score among
    all experts, groups being devices only.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int | None
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int | None
    qk_nope_head_dim: int | None
    qk_rope_head_dim: int | None
    v_head_dim: int | None
    n_routed_experts: int
    n_shared_experts: int | None
    num_experts_per_tok: int | None
    n_group: int | None
    topk_group: int | None
    first_k_dense_replace: int
    num_nextn_predict_layers: int
    q_lora_rank: int | None
    max_position_embeddings: int
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    initializer_range: float = 0.006
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention: str = "mla"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated: all of them in grouped-query attention."""
        return given(self.head_dim if self.attention == "gqa" else self.qk_rope_head_dim)

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys; in latent attention the part without position, then the rotated part."""
        return self.rope_dim if self.attention == "gqa" else given(self.qk_nope_head_dim) + self.rope_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a head's values."""
        return given(self.head_dim if self.attention == "gqa" else self.v_head_dim)

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def num_routers(self) -> int:
        """Routers in order of their global layer index: the main model's, then one per prediction depth."""
        return self.num_moe_layers + self.num_nextn_predict_layers if self.n_routed_experts else 0

    @property
    def has_router_bias(self) -> bool:
        """Whether routers have a selection bias, which balancing moves."""
        return self.topk_method == "noaux_tc"

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(qk head), times YaRN's temperature (0.1 mscale_all_dim ln(factor) + 1)² where one is set.

        Where all of a head is rotated, the temperature is in the rotation (`rope`), as in every Llama.
        """
        if self.attention == "gqa":
            return self.qk_head_dim**-0.5
        scaling = self.rope_scaling or {}
        temperature = yarn_mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim") or 0.0)
        return self.qk_head_dim**-0.5 * temperature**2

    def check(self) -> None:
        """Raise ValueError for the first rule broken, naming field, value and rule."""
        for field in _POSITIVE:
            _require(getattr(self, field) > 0, f"{self._show(field)} must be positive")
        _require(self.n_routed_experts >= 0, f"{self._show('n_routed_experts')} must not be negative")
        _require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"{self._show('first_k_dense_replace')} must lie in 0..{self._show('num_hidden_layers')}",
        )
        _require(self.num_nextn_predict_layers >= 0, f"{self._show('num_nextn_predict_layers')} must not be negative")
        self._check_attention()
        if self.n_routed_experts:
            self._check_routing()
        else:
            self._check_dense()
        self._check_yarn()

    def _check_attention(self) -> None:
        kind = self._show("attention")
        _require(self.attention in ATTENTION_SIZES, f"{kind} is not one of {', '.join(ATTENTION_SIZES)}")
        for owner, fields in ATTENTION_SIZES.items():
            if owner == self.attention:
                self._need(fields, kind)
            else:
                others = fields if self.attention == "mla" else (*fields, "q_lora_rank")
                self._need_not(others, f"{kind} does not have it")
        _require(
            self.q_lora_rank is None or self.q_lora_rank > 0, f"{self._show('q_lora_rank')} must be positive or null"
        )
        rotated = "head_dim" if self.attention == "gqa" else "qk_rope_head_dim"
        _require(self.rope_dim % 2 == 0, f"{self._show(rotated)} must be even: RoPE rotates pairs")
        _require(
            self.num_key_value_heads is None or self.num_attention_heads % self.num_key_value_heads == 0,
            f"{self._show('num_key_value_heads')} does not divide {self._show('num_attention_heads')}",
        )

    def _check_dense(self) -> None:
        """A model without experts has nothing of what describes them."""
        none = self._show("n_routed_experts")
        _require(
            self.first_k_dense_replace == self.num_hidden_layers,
            f"{self._show('first_k_dense_replace')} leaves layers to the experts, of which there are none with {none}: "
            f"it must be {self._show('num_hidden_layers')}",
        )
        self._need_not(EXPERT_SIZES, f"{none} has no experts")
        for field in EXPERT_CHOICES:
            default = type(self).__dataclass_fields__[field].default
            _require(
                getattr(self, field) == default,
                f"{self._show(field)} must stay {_shown(default)}: {none} has no experts to which it applies",
            )

    def _need(self, fields: tuple[str, ...], reason: str) -> None:
        for field in fields:
            value = getattr(self, field)
            _require(value is not None and value > 0, f"{self._show(field)} must be positive: {reason} needs it")

    def _need_not(self, fields: tuple[str, ...], reason: str) -> None:
        for field in fields:
            _require(getattr(self, field) is None, f"{self._show(field)} must be null: {reason}")

    def _check_routing(self) -> None:
        self._need(EXPERT_SIZES, self._show("n_routed_experts"))
        experts, groups = self.n_routed_experts, given(self.n_group)
        kept, selected = given(self.topk_group), given(self.num_experts_per_tok)
        for field, known in (("scoring_func", SCORING_FUNCS), ("topk_method", TOPK_METHODS)):
            _require(getattr(self, field) in known, f"{self._show(field)} is none of {', '.join(known)}")
        _require(experts % groups == 0, f"{self._show('n_group')} does not divide {self._show('n_routed_experts')}")
        _require(
            experts // groups >= 2 or not self.has_router_bias,
            f"{self._show('n_group')} leaves {experts // groups} of {self._show('n_routed_experts')} a group: "
            "a group is scored by its two best experts",
        )
        _require(kept <= groups, f"{self._show('topk_group')} exceeds {self._show('n_group')}")
        _require(
            self.topk_method != "greedy" or kept == groups,
            f"{self._show('topk_group')} differs from {self._show('n_group')}, but model.topk_method=greedy limits no "
            "groups",
        )
        reachable = kept * (experts // groups)
        _require(
            selected <= reachable,
            f"{self._show('num_experts_per_tok')} exceeds the {reachable} experts of {self._show('topk_group')} groups",
        )

    def _check_yarn(self) -> None:
        if self.rope_scaling is None:
            return
        scaling = dict(self.rope_scaling)
        kinds = {scaling.pop(key) for key in ("type", "rope_type") if key in scaling}
        _require(kinds == {"yarn"}, f"model.rope_scaling.type={sorted(map(str, kinds))} must be yarn")
        unknown = sorted(set(scaling) - set(_YARN_REQUIRED) - set(_YARN_OPTIONAL))
        _require(not unknown, f"model.rope_scaling has unknown keys {unknown}")
        for key in _YARN_REQUIRED:
            _require(key in scaling, f"model.rope_scaling.{key} is missing: yarn needs it")
        for key, value in scaling.items():
            _require(_is_number(value) and value > 0, f"model.rope_scaling.{key}={value} must be a positive number")
        _require(scaling["factor"] >= 1, f"model.rope_scaling.factor={scaling['factor']} must be at least 1")
        fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
        _require(fast >= slow, f"model.rope_scaling.beta_fast={fast} must not be below beta_slow={slow}")
        _require(self.rope_theta != 1, f"{self._show('rope_theta')} must differ from 1 under yarn")

    def _show(self, field: str) -> str:
        return f"model.{field}={_shown(getattr(self, field))}"


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "routed_scaling_factor",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
)
# Kinds of attention, and the sizes that each has and no other. (Latent attention may also have a `q_lora_rank`.)
ATTENTION_SIZES = {
    "mla": ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "gqa": ("num_key_value_heads", "head_dim"),
}
# What describes experts: sizes, None without any; choices, which then keep their defaults.
EXPERT_SIZES = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
EXPERT_CHOICES = ("routed_scaling_factor", "norm_topk_prob", "scoring_func", "topk_method")


def given(size: int | None) -> int:
    """A size that the checks have found to be there."""
    assert size is not None
    return size


def _shown(value: Any) -> str:
    """As in a config file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention magnitude, sqrt(t) = 0.1 mscale ln(factor) + 1 (technical report, section 4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)
