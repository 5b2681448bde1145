"""The kinds of attention that a model may have: their sizes, rules, counts, and names on disk. Needs no torch.

Whoever composes a config, counts a model, lays it out on disk or estimates a cache asks here; the modules that compute
attention are built from the same objects (`build`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from train.model.attention.yarn import yarn_mscale
from train.model.rules import require, setting


@dataclass(frozen=True)
class AttentionSizes(ABC):
    """Sizes of the attention of one layer, under the keys of `model`, and what follows from them.

    A kind adds the keys that models of other kinds leave None: without a default those that it needs, with None as
    default those that it can do without.
    """

    name: ClassVar[str]
    """The kind, as `model.attention` has it."""

    hidden_size: int
    num_attention_heads: int
    rope_scaling: Mapping[str, Any] | None

    @classmethod
    def own_keys(cls) -> tuple[str, ...]:
        """The keys of `model` that this kind has and not every other."""
        shared = {field.name for field in fields(AttentionSizes)}
        return tuple(field.name for field in fields(cls) if field.name not in shared)

    @classmethod
    def needed_keys(cls) -> tuple[str, ...]:
        """The keys of this kind that cannot be None: positive sizes."""
        return tuple(field.name for field in fields(cls) if field.name in cls.own_keys() and field.default is MISSING)

    @abstractmethod
    def check(self) -> None:
        """ValueError for the first rule broken, where all needed sizes are given and positive."""

    @property
    @abstractmethod
    def rope_dim(self) -> int:
        """Elements of a head that are rotated by their position."""

    @property
    @abstractmethod
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys."""

    @property
    @abstractmethod
    def value_head_dim(self) -> int:
        """Width of a head's values."""

    @property
    def softmax_scale(self) -> float:
        """Factor of the scores: 1 / sqrt(width of a query)."""
        return self.qk_head_dim**-0.5

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters of one layer's attention, norms inside of it included."""

    def core_flops(self, num_keys: int) -> int:
        """Floating-point operations of one token's scores and weighted sum over `num_keys` tokens, forward, one layer.

        The projections are not in it; they are those of `num_parameters`.
        """
        return 2 * self.num_attention_heads * (self.qk_head_dim + self.value_head_dim) * num_keys

    @property
    @abstractmethod
    def cache_width(self) -> int:
        """Numbers that one layer keeps of a token while text is generated."""

    @property
    def cache_widths_of_others(self) -> dict[str, int]:
        """What other attentions of as many and as wide heads would keep, by their names: what `cache_width` saves."""
        return {"MHA": self.num_attention_heads * self._cached_head}

    @property
    def _cached_head(self) -> int:
        """Numbers of one head's key and value."""
        return self.qk_head_dim + self.value_head_dim

    @property
    @abstractmethod
    def modules(self) -> tuple[str, ...]:
        """The submodules that have a `weight`, by their names, which on disk are the same."""

    @property
    def published(self) -> dict[str, Any]:
        """What Hugging Face's `config.json` has of this attention beside the keys of `model`."""
        return {}

    @classmethod
    @abstractmethod
    def from_published(cls, found: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of `model` that follow from what a `config.json` holds. ValueError for what cannot be built."""


@dataclass(frozen=True)
class LatentSizes(AttentionSizes):
    """Multi-head latent attention (DeepSeek-V3's report, Eq. 1-11): keys and values are made from one small latent.

    A head's queries and keys are a part without position, `qk_nope_head_dim`, then a rotated one, `qk_rope_head_dim`,
    which all heads' keys share. Queries pass through a latent of their own where there is a `q_lora_rank`.
    """

    name: ClassVar[str] = "mla"

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    def check(self) -> None:
        rank = setting(self, "q_lora_rank")
        require(self.q_lora_rank is None or self.q_lora_rank > 0, f"{rank} must be positive or null")
        require(self.rope_dim % 2 == 0, f"{setting(self, 'qk_rope_head_dim')} must be even: RoPE rotates pairs")

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(width of a query), times YaRN's temperature (0.1 mscale_all_dim ln(factor) + 1)² where it is set.

        Latent attention alone has the temperature here; where all of a head is rotated it is in the rotation (`rope`),
        as in every Llama.
        """
        scaling = self.rope_scaling or {}
        temperature = yarn_mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim") or 0.0)
        return super().softmax_scale * temperature**2

    @property
    def num_parameters(self) -> int:
        hidden, heads, rank = self.hidden_size, self.num_attention_heads, self.q_lora_rank
        queries = heads * self.qk_head_dim
        q = hidden * queries if rank is None else hidden * rank + rank + rank * queries
        latent = hidden * (self.kv_lora_rank + self.rope_dim) + self.kv_lora_rank
        kv = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + latent + kv + heads * self.v_head_dim * hidden

    @property
    def cache_width(self) -> int:
        """The latent and the rotated key that all heads share."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def cache_widths_of_others(self) -> dict[str, int]:
        num_groups = min(8, max(1, self.num_attention_heads // 2))
        return {**super().cache_widths_of_others, f"GQA of {num_groups}": num_groups * self._cached_head}

    @property
    def modules(self) -> tuple[str, ...]:
        queries = ("q_proj",) if self.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
        return ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", *queries)

    @property
    def published(self) -> dict[str, Any]:
        return {"num_key_value_heads": self.num_attention_heads, "q_lora_rank": self.q_lora_rank}

    @classmethod
    def from_published(cls, found: Mapping[str, Any]) -> dict[str, Any]:
        heads = found.get("num_attention_heads")
        of_keys = found.get("num_key_value_heads", heads)
        require(of_keys == heads, f"num_key_value_heads={of_keys} must be num_attention_heads={heads}")
        return {}


@dataclass(frozen=True)
class GroupedSizes(AttentionSizes):
    """Grouped-query attention (arXiv 2305.13245): several heads of queries share a head of keys and values.

    With as many heads of keys as of queries it is multi-head attention. All of a query or key head is rotated.
    """

    name: ClassVar[str] = "gqa"

    num_key_value_heads: int
    head_dim: int

    def check(self) -> None:
        require(self.rope_dim % 2 == 0, f"{setting(self, 'head_dim')} must be even: RoPE rotates pairs")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"{setting(self, 'num_key_value_heads')} does not divide {setting(self, 'num_attention_heads')}",
        )

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.head_dim

    @property
    def num_parameters(self) -> int:
        return 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim * self.hidden_size

    @property
    def cache_width(self) -> int:
        """Keys and values of every group."""
        return self.num_key_value_heads * self._cached_head

    @property
    def modules(self) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj", "o_proj")

    @classmethod
    def from_published(cls, found: Mapping[str, Any]) -> dict[str, Any]:
        """Files leave out `num_key_value_heads` in multi-head attention, and `head_dim` where heads share out the
        hidden size."""
        heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
        keys = {"num_key_value_heads": found.get("num_key_value_heads", heads)}
        if isinstance(heads, int) and heads and isinstance(hidden, int):
            keys["head_dim"] = found.get("head_dim", hidden // heads)
        return keys


ATTENTIONS: dict[str, type[AttentionSizes]] = {kind.name: kind for kind in (LatentSizes, GroupedSizes)}
"""The kinds by the names that `model.attention` has for them."""


def absent_keys(kind: type[AttentionSizes]) -> tuple[str, ...]:
    """The keys of `model` that only other kinds have; a model of this kind leaves them None."""
    return tuple(key for each in ATTENTIONS.values() for key in each.own_keys() if key not in kind.own_keys())
