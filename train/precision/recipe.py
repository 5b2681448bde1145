"""Which arithmetic multiplies for which module: the one table, and the engines made from it.

Technical report, section 3.3.1: embedding, head, router, norms and the attention core keep their precision. The first
three and the norms ask no engine for anything; attention's core is torch's. The projection of multi-token prediction
and the head do ask, and stay high: the published weights have both in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from train.precision.codec import Fp8Rows
from train.precision.linear import Engine, Engines, Gemm, Nodes, TorchEngine
from train.precision.reference import Fp8, Fp8Engine, QuantisedWeights
from train.precision.transformer_engine import WIDTH, TransformerEngine, TransformerEngineMaps, missing

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

    def gemm(self, module: str) -> Gemm:
        """Raises TypeError for a module of an engine that has no plain products."""
        engine = self._engines[module]
        if not isinstance(engine, Nodes):
            raise TypeError(f"{module} differentiates by itself, and {engine.name} has no plain products")
        return cast(Gemm, engine)


def matrices(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module as in FP8_MODULES, name, parameter) of every matrix of a model that an engine multiplies by."""
    for name, parameter in model.named_parameters():
        *parents, module = name.removesuffix(".weight").split(".")
        module = f"experts.{module}" if "experts" in parents else module
        if module in FP8_MODULES:
            yield module, name, parameter


def choose_engine(engine: str, device: torch.device | str) -> str:
    """ "reference" or "transformer_engine", for one of them or "auto": the second where it can be.

    Raises ValueError where it is asked for and cannot be.
    """
    if engine == "reference":
        return engine
    reason = missing(device)
    if reason is not None and engine != "auto":
        raise ValueError(f"precision.engine={engine} cannot multiply here: {reason}")
    return "reference" if reason else "transformer_engine"


def fp8_weights(
    precision: str, engine: str, device: torch.device | str, power_of_two: bool = False
) -> QuantisedWeights | TransformerEngine:
    """What holds a run's quantised weights, for one of the engines that `choose_engine` takes."""
    if precision == "fp8" and choose_engine(engine, device) == "transformer_engine":
        return TransformerEngine(power_of_two)
    return QuantisedWeights(power_of_two)


def check_widths(model: nn.Module) -> None:
    """ValueError for a model with a matrix that Transformer Engine cannot multiply by; its memory is not looked at."""
    for module, name, parameter in matrices(model):
        if FP8_MODULES[module] is not None and any(size % WIDTH for size in parameter.shape[-2:]):
            raise ValueError(
                f"precision.engine=transformer_engine multiplies by matrices whose widths are multiples of {WIDTH}, "
                f"not by {name} of shape {tuple(parameter.shape)}: use precision.engine=reference"
            )


def build_engines(
    precision: str,
    device: torch.device | str,
    weights: QuantisedWeights | TransformerEngine,
    power_of_two: bool = False,
) -> Engines:
    """What multiplies in a run of this precision. `weights` is told by whoever changes weights, and says by whom."""
    torch_engine = TorchEngine(device)
    if precision != "fp8":
        return torch_engine
    made: dict[Fp8, Engine] = {
        recipe: TransformerEngineMaps(recipe, weights)
        if isinstance(weights, TransformerEngine)
        else Fp8Engine(recipe, weights, power_of_two)
        for recipe in FP8_MODULES.values()
        if recipe is not None
    }
    return Table({name: made[recipe] if recipe else torch_engine for name, recipe in FP8_MODULES.items()})


def row_codec(precision: str, width: int) -> Fp8Rows | None:
    """What rows of `width` elements are on their way to the experts; None for themselves."""
    return Fp8Rows(width) if precision == "fp8" else None
