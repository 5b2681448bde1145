"""`model`: the shape of a model, under the keys of Hugging Face's config.json of DeepSeek's models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from train.model.attention.kinds import ATTENTIONS, AttentionSizes, absent_keys
from train.model.attention.yarn import check_yarn
from train.model.rules import require, setting, shown

SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`model`: sizes of a model of DeepSeek's, under the keys of Hugging Face's config.json.

    What a model does not have is None, and refused if it is set: the sizes of the other kind of attention, and in a
    dense model all that describes experts.

    Attributes:
        vocab_size: rows of embedding and head.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the dense layers' MLP.
        moe_intermediate_size: inner width of one expert.
        num_hidden_layers: layers of the main model.
        num_attention_heads: attention heads (of queries).
        kv_lora_rank: mla: latent of keys and values.
        qk_nope_head_dim: mla: part of a query or key head without position.
        qk_rope_head_dim: mla: rotated part of a query or key head; even.
        v_head_dim: mla: width of a value head.
        n_routed_experts: routed experts of one MoE layer; 0: all layers are dense, those of multi-token prediction too.
        n_shared_experts: shared experts, seen by every token; 0 or None: none.
        num_experts_per_tok: routed experts of a token.
        n_group: routing groups, which stand for devices; divides the experts, at least 2 experts each under `noaux_tc`.
        topk_group: groups a token may choose from; all of them under `greedy`.
        first_k_dense_replace: first layers that are dense; all of `model.num_hidden_layers` where there are no experts.
        num_nextn_predict_layers: depth of multi-token prediction; 0 is none.
        q_lora_rank: mla: latent of queries; None projects directly.
        max_position_embeddings: longest sequence.
        routed_scaling_factor: factor of the routing weights.
        norm_topk_prob: normalise the weights of a token's experts.
        initializer_range: standard deviation of initial matrices.
        rms_norm_eps: epsilon of the norms (the two latent norms always use 1e-6, as the released code does).
        rope_theta: base of the rotary frequencies.
        rope_scaling: YaRN: `type: yarn`, `factor`, `original_max_position_embeddings`; None: positions are not scaled.
            Optional are `beta_fast` (32), `beta_slow` (1), `mscale`, `mscale_all_dim` (only mla scales its scores by
            it, as the released codes do).
        attention: `mla` (multi-head latent attention) or `gqa` (grouped-query attention; with as many heads of keys as
            of queries it is multi-head attention).
        num_key_value_heads: gqa: heads of keys and values; divides the heads of queries.
        head_dim: gqa: width of every head, all of it rotated; even.
        scoring_func: affinities of a token: `sigmoid` or `softmax` of the router's logits.
        topk_method: how experts are chosen: `noaux_tc`, `group_limited_greedy` or `greedy`. The first goes by affinity
            + bias, a group counting as much as its two best experts; the second by affinity, a group counting as much
            as its best; the third by affinity among all, groups being devices only.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int | None = None
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    n_routed_experts: int = 0
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    first_k_dense_replace: int
    num_nextn_predict_layers: int = 0
    q_lora_rank: int | None = None
    max_position_embeddings: int = 4096
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    initializer_range: float = 0.02
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
