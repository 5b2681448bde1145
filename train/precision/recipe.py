"""Which arithmetic multiplies for which module: the one table, and the engines made from it.

Technical report, section 3.3.1: embedding, head, router, norms and the attention core keep their precision. The first
three and the norms ask no engine for anything; attention's core is torch's. The projection of multi-token prediction
and the head do ask, and stay high: the published weights have both in bfloat16.
"""

from __future__ import annotations

import torch

from train.precision.codec import Fp8Rows
from train.precision.linear import Engine, Engines, TorchEngine
from train.precision.reference import Fp8, Fp8Engine, QuantisedWeights

# None: as the model's other arithmetic. Every module that multiplies through an engine is in it.
FP8_MODULES: dict[str, Fp8 | None] = {
    "q_proj": Fp8(),
    "q_a_proj": Fp8(),
    "q_b_proj": Fp8(),
    "kv_a_proj_with_mqa": Fp8(),
    "kv_b_proj": Fp8(),
    "k_proj": Fp8(),
    "v_proj": Fp8(),
    # Attention's backward needs its output too, more exactly than E4M3 has it (section 3.3.3).
    "o_proj": Fp8(round_input=True, keep="e5m6"),
    "gate_up_proj": Fp8(),
    "down_proj": Fp8(),
    # What dispatch brings, and what the backward of combine brings, travels in FP8 (section 3.3.3).
    "experts.gate_up_proj": Fp8(round_input=True),
    "experts.down_proj": Fp8(round_gradient=True),
    "eh_proj": None,
    "lm_head": None,
}


class Table:
    """Engines by module. Satisfies `linear.Engines`."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._engines = engines

    def of(self, module: str) -> Engine:
        """Raises KeyError for a module that the table does not have."""
        return self._engines[module]


def build_engines(
    precision: str, device: torch.device | str, weights: QuantisedWeights, power_of_two: bool = False
) -> Engines:
    """What multiplies in a run of this precision. `weights` is told by whoever changes weights."""
    torch_engine = TorchEngine(device)
    if precision != "fp8":
        return torch_engine
    made = {recipe: Fp8Engine(recipe, weights, power_of_two) for recipe in FP8_MODULES.values() if recipe is not None}
    return Table({name: made[recipe] if recipe else torch_engine for name, recipe in FP8_MODULES.items()})


def row_codec(precision: str, width: int) -> Fp8Rows | None:
    """What rows of `width` elements are on their way to the experts; None for themselves."""
    return Fp8Rows(width) if precision == "fp8" else None
