"""YaRN (arXiv 2309.00071), by which a model reads longer texts than it was first trained on: its settings, its factors.

Needs no torch; the rotation that it changes is in `rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from train.model.rules import require

_REQUIRED = ("factor", "original_max_position_embeddings")
_OPTIONAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def check_yarn(rope_scaling: Mapping[str, Any] | None, rope_theta: float) -> None:
    """Raise ValueError for `model.rope_scaling` that is neither None nor YaRN's keys, or does not fit the base."""
    if rope_scaling is None:
        return
    scaling = dict(rope_scaling)
    kinds = {scaling.pop(key) for key in ("type", "rope_type") if key in scaling}
    require(kinds == {"yarn"}, f"model.rope_scaling.type={sorted(map(str, kinds))} must be yarn")
    unknown = sorted(set(scaling) - set(_REQUIRED) - set(_OPTIONAL))
    require(not unknown, f"model.rope_scaling has unknown keys {unknown}")
    for key in _REQUIRED:
        require(key in scaling, f"model.rope_scaling.{key} is missing: yarn needs it")
    for key, value in scaling.items():
        require(_is_number(value) and value > 0, f"model.rope_scaling.{key}={value} must be a positive number")
    require(scaling["factor"] >= 1, f"model.rope_scaling.factor={scaling['factor']} must be at least 1")
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    require(fast >= slow, f"model.rope_scaling.beta_fast={fast} must not be below beta_slow={slow}")
    require(rope_theta != 1, f"model.rope_theta={rope_theta} must differ from 1 under yarn")


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention magnitude, sqrt(t) = 0.1 mscale ln(factor) + 1 (technical report, section 4.3)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
