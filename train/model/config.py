"""Shape of a model, under the keys of Hugging Face's config.json of DeepSeek's models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from train.model.attention.kinds import ATTENTIONS, AttentionSizes, absent_keys
from train.model.attention.yarn import check_yarn
from train.model.rules import require, setting, shown

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
    `num_nextn_predict_layers` is the depth D of multi-token prediction. `n_shared_experts` is 0 or None where all
    experts are routed.

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
    def attention_sizes(self) -> AttentionSizes:
        """The attention of every layer, as its kind describes it."""
        kind = ATTENTIONS[self.attention]
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

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
    def shared_intermediate_size(self) -> int:
        """Width of an MoE layer's shared experts together, which are one MLP; 0 where there are none."""
        return (self.n_shared_experts or 0) * given(self.moe_intermediate_size)

    def check(self) -> None:
        """Raise ValueError for the first rule broken, naming field, value and rule."""
        for field in _POSITIVE:
            require(getattr(self, field) > 0, f"{self._show(field)} must be positive")
        require(self.n_routed_experts >= 0, f"{self._show('n_routed_experts')} must not be negative")
        require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"{self._show('first_k_dense_replace')} must lie in 0..{self._show('num_hidden_layers')}",
        )
        require(self.num_nextn_predict_layers >= 0, f"{self._show('num_nextn_predict_layers')} must not be negative")
        self._check_attention()
        if self.n_routed_experts:
            self._check_routing()
        else:
            self._check_dense()
        check_yarn(self.rope_scaling, self.rope_theta)

    def _check_attention(self) -> None:
        require(self.attention in ATTENTIONS, f"{self._show('attention')} is not one of {', '.join(ATTENTIONS)}")
        kind = ATTENTIONS[self.attention]
        self._need_not(absent_keys(kind), f"{self._show('attention')} does not have it")
        self._need(kind.needed_keys(), self._show("attention"))
        self.attention_sizes.check()

    def _check_dense(self) -> None:
        """A model without experts has nothing of what describes them."""
        none = self._show("n_routed_experts")
        require(
            self.first_k_dense_replace == self.num_hidden_layers,
            f"{self._show('first_k_dense_replace')} leaves layers to the experts, of which there are none with {none}: "
            f"it must be {self._show('num_hidden_layers')}",
        )
        self._need_not(EXPERT_SIZES, f"{none} has no experts")
        for field in EXPERT_CHOICES:
            default = type(self).__dataclass_fields__[field].default
            require(
                getattr(self, field) == default,
                f"{self._show(field)} must stay {shown(default)}: {none} has no experts to which it applies",
            )

    def _need(self, keys: Iterable[str], reason: str) -> None:
        for field in keys:
            value = getattr(self, field)
            require(value is not None and value > 0, f"{self._show(field)} must be positive: {reason} needs it")

    def _need_not(self, keys: Iterable[str], reason: str) -> None:
        for field in keys:
            require(getattr(self, field) is None, f"{self._show(field)} must be null: {reason}")

    def _check_routing(self) -> None:
        self._need([key for key in EXPERT_SIZES if key != "n_shared_experts"], self._show("n_routed_experts"))
        require((self.n_shared_experts or 0) >= 0, f"{self._show('n_shared_experts')} must not be negative")
        experts, groups = self.n_routed_experts, given(self.n_group)
        kept, selected = given(self.topk_group), given(self.num_experts_per_tok)
        for field, known in (("scoring_func", SCORING_FUNCS), ("topk_method", TOPK_METHODS)):
            require(getattr(self, field) in known, f"{self._show(field)} is none of {', '.join(known)}")
        require(experts % groups == 0, f"{self._show('n_group')} does not divide {self._show('n_routed_experts')}")
        require(
            experts // groups >= 2 or not self.has_router_bias,
            f"{self._show('n_group')} leaves {experts // groups} of {self._show('n_routed_experts')} a group: "
            "a group is scored by its two best experts",
        )
        require(kept <= groups, f"{self._show('topk_group')} exceeds {self._show('n_group')}")
        require(
            self.topk_method != "greedy" or kept == groups,
            f"{self._show('topk_group')} differs from {self._show('n_group')}, but model.topk_method=greedy limits no "
            "groups",
        )
        reachable = kept * (experts // groups)
        require(
            selected <= reachable,
            f"{self._show('num_experts_per_tok')} exceeds the {reachable} experts of {self._show('topk_group')} groups",
        )

    def _show(self, key: str) -> str:
        return setting(self, key)


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
# What describes experts: sizes, None in a model without any; choices, which keep their defaults there. A model with
# routed experts has all of the sizes but for shared experts, of which there may be none (0 or None).
EXPERT_SIZES = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
EXPERT_CHOICES = ("routed_scaling_factor", "norm_topk_prob", "scoring_func", "topk_method")


def given(size: int | None) -> int:
    """A size that the checks have found to be there."""
    assert size is not None
    return size
