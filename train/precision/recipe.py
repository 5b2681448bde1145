"""Which arithmetic multiplies for which module: what `precision` says, how each module does it in FP8, and the engines.

Technical report, section 3.3.1: embedding, head, router, norms and the attention core keep their precision. The first
and the last three ask no engine for anything; attention's core is torch's. The projection of multi-token prediction and
the head do ask, and stay high unless told otherwise: the published weights have both in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from train.precision.codec import Fp8Rows
from train.precision.linear import Engine, Engines, Gemm, Nodes, TorchEngine
from train.precision.reference import Fp8, Fp8Engine, QuantisedWeights
from train.precision.transformer_engine import WIDTH, TransformerEngine, TransformerEngineMaps, missing

PRECISIONS = ("fp64", "fp32", "bf16", "fp8")
FP8_ENGINES = ("auto", "reference", "transformer_engine")
# How modules multiply where they do so in FP8, by the key of `precision.modules` that chooses it: modules of one key
# share an input, an autograd node or rows that travel. Every module that multiplies through an engine is in it.
RECIPES: dict[str, dict[str, Fp8]] = {
    "attention": dict.fromkeys(
        ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj"), Fp8()
    ),
    # Attention's backward needs its output too, more exactly than E4M3 has it (section 3.3.3).
    "o_proj": {"o_proj": Fp8(round_input=True, keep="e5m6")},
    "mlp": {"gate_up_proj": Fp8(), "down_proj": Fp8()},
    # What dispatch brings, and what the backward of combine brings, travels in FP8 (section 3.3.3).
    "experts": {"experts.gate_up_proj": Fp8(round_input=True), "experts.down_proj": Fp8(round_gradient=True)},
    "eh_proj": {"eh_proj": Fp8()},
    "lm_head": {"lm_head": Fp8()},
}
# The key that chooses for a module.
CHOICES = {module: key for key, recipes in RECIPES.items() for module in recipes}


@dataclass(frozen=True)
class PrecisionConfig:
    """`precision`: fp64 (for proofs) | fp32 | bf16 | fp8 (products in FP8, everything else as in bf16).

    Attributes:
        modules: of fp8, what each key of RECIPES multiplies in, "fp8" or "bf16"; of others, empty.
        power_of_two_scales: for every scale of fp8, not only where the report has them.
        engine: who multiplies in fp8: "reference" (any device), "transformer_engine" (a GPU of compute capability 9.0
            or more that has the library), or "auto": the second where it can, else the first.
    """

    name: str = "fp32"
    modules: dict[str, str] = field(default_factory=dict)
    power_of_two_scales: bool = False
    engine: str = "auto"

    def check(self) -> None:
        """ValueError for an unknown precision, module or engine, for a table that is not whole, or for any of fp8's
        settings where there is no fp8."""
        if self.name not in PRECISIONS:
            raise ValueError(f"precision={self.name} is not one of {', '.join(PRECISIONS)}")
        if self.engine not in FP8_ENGINES:
            raise ValueError(f"precision.engine={self.engine} is not one of {', '.join(FP8_ENGINES)}")
        if self.name == "fp8":
            self._check_modules()
        elif self.power_of_two_scales:
            raise ValueError(f"precision.power_of_two_scales=true needs precision=fp8, not {self.name}")
        elif self.engine != "auto":
            raise ValueError(f"precision.engine={self.engine} needs precision=fp8, not {self.name}")
        elif self.modules:
            raise ValueError(f"precision.modules.{next(iter(self.modules))} needs precision=fp8, not {self.name}")

    def _check_modules(self) -> None:
        for key, arithmetic in self.modules.items():
            if key not in RECIPES:
                raise ValueError(f"precision.modules.{key} is not one of {', '.join(RECIPES)}")
            if arithmetic not in ("fp8", "bf16"):
                raise ValueError(f"precision.modules.{key}={arithmetic} is not one of fp8, bf16")
        for key in RECIPES:
            if key not in self.modules:
                raise ValueError(f"precision.modules.{key} is missing: it must be fp8 or bf16")

    def is_fp8(self, module: str) -> bool:
        """Whether a module multiplies in FP8, by the name that CHOICES has; what is not there does not."""
        return self.modules.get(CHOICES.get(module, "")) == "fp8"

    def recipe(self) -> dict[str, object]:
        """What of it makes the numbers of a run; the engine is like the device: a run may go on with another."""
        fp8 = {"modules": self.modules, "power_of_two_scales": self.power_of_two_scales} if self.name == "fp8" else {}
        return {"precision": self.name, **fp8}


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
    """(module as in CHOICES, name, parameter) of every matrix of a model that an engine multiplies by."""
    for name, parameter in model.named_parameters():
        *parents, module = name.removesuffix(".weight").split(".")
        module = f"experts.{module}" if "experts" in parents else module
        if module in CHOICES:
            yield module, name, parameter


def choose_engine(config: PrecisionConfig, device: torch.device | str) -> str:
    """Who multiplies in fp8: "reference" or "transformer_engine", which is taken for "auto" where it can be.

    Raises ValueError where it is asked for and cannot be.
    """
    if config.engine == "reference":
        return config.engine
    reason = missing(device)
    if reason is None and config.is_fp8("lm_head"):
        reason = "the head makes its gradients itself, so precision.modules.lm_head=fp8 needs engine=reference"
    if reason is not None and config.engine != "auto":
        raise ValueError(f"precision.engine={config.engine} cannot multiply here: {reason}")
    return "reference" if reason else "transformer_engine"


def fp8_weights(config: PrecisionConfig, device: torch.device | str) -> QuantisedWeights | TransformerEngine:
    """What holds a run's quantised weights."""
    if config.name == "fp8" and choose_engine(config, device) == "transformer_engine":
        return TransformerEngine(config.power_of_two_scales)
    return QuantisedWeights(config.power_of_two_scales)


def check_widths(model: nn.Module, config: PrecisionConfig) -> None:
    """ValueError for a model with a matrix that Transformer Engine cannot multiply by; its memory is not looked at."""
    for module, name, parameter in matrices(model):
        if config.is_fp8(module) and any(size % WIDTH for size in parameter.shape[-2:]):
            raise ValueError(
                f"precision.engine=transformer_engine multiplies by matrices whose widths are multiples of {WIDTH}, "
                f"not by {name} of shape {tuple(parameter.shape)}: use precision.engine=reference"
            )


def build_engines(
    config: PrecisionConfig, device: torch.device | str, weights: QuantisedWeights | TransformerEngine
) -> Engines:
    """What multiplies in a run of this precision. `weights` is told by whoever changes weights, and says by whom."""
    torch_engine = TorchEngine(device)
    if config.name != "fp8":
        return torch_engine
    made: dict[Fp8, Engine] = {
        recipe: TransformerEngineMaps(recipe, weights)
        if isinstance(weights, TransformerEngine)
        else Fp8Engine(recipe, weights, config.power_of_two_scales)
        for recipes in RECIPES.values()
        for recipe in recipes.values()
    }
    return Table(
        {
            module: made[recipe] if config.modules[key] == "fp8" else torch_engine
            for key, recipes in RECIPES.items()
            for module, recipe in recipes.items()
        }
    )


def row_codec(config: PrecisionConfig, width: int) -> Fp8Rows | None:
    """What rows of `width` elements are on their way to the experts; None for themselves."""
    return Fp8Rows(width) if config.modules.get("experts") == "fp8" else None
