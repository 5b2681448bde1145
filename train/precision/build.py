"""The engines of a run: of every module that multiplies, who does, by `precision` and by what the device can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from kernels.door import missing as missing_kernels
from train.precision import tiles
from train.precision.compiled_tiles import compiled_tiles
from train.precision.config import FP8_MODULES, MODULE_KEYS, Fp8, PrecisionConfig
from train.precision.eager_passes import EagerPasses
from train.precision.engine import Engine, RowCodec
from train.precision.kernel_passes import KernelPasses
from train.precision.kernel_tiles import KernelTiles
from train.precision.measure import faster_bf16_products
from train.precision.quantised import Passes
from train.precision.reference import Fp8Engine, QuantisedWeights, Rounding
from train.precision.torch_engine import TorchEngine, WideningEngine
from train.precision.transformer_engine import WIDTH, LibraryWeights, TransformerEngine, missing


def everywhere(engine: Engine) -> Mapping[str, Engine]:
    """One engine for every module of a model that multiplies."""
    return dict.fromkeys(MODULE_KEYS, engine)


def matrices(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module as in MODULE_KEYS, name, parameter) of every matrix of a model that an engine multiplies by."""
    for name, parameter in model.named_parameters():
        *parents, module = name.removesuffix(".weight").split(".")
        module = f"experts.{module}" if "experts" in parents else module
        if module in MODULE_KEYS:
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


def fp8_weights(config: PrecisionConfig, device: torch.device | str) -> QuantisedWeights | LibraryWeights:
    """What holds a run's quantised weights, says who rounds, and is told when weights have changed."""
    if config.name == "fp8" and choose_engine(config, device) == "transformer_engine":
        return LibraryWeights(passes(device), config.power_of_two_scales)
    return QuantisedWeights(config.power_of_two_scales, rounding(config, device))


def passes(device: torch.device | str) -> Passes:
    """What quantises around the library's products: kernels on a GPU, torch's operations elsewhere."""
    return KernelPasses() if torch.device(device).type == "cuda" else EagerPasses()


def rounding(config: PrecisionConfig, device: torch.device | str) -> Rounding:
    """Who rounds to E4M3, in the same bits: on a CPU code compiled for it, on a GPU kernels, and torch's operations
    where there is no compiler, or no Triton."""
    if config.name != "fp8":
        return tiles
    if torch.device(device).type == "cpu":
        return compiled_tiles() or tiles
    return KernelTiles() if missing_kernels(device) is None else tiles


def check_widths(model: nn.Module, config: PrecisionConfig) -> None:
    """ValueError for a model with a matrix that Transformer Engine cannot multiply by; its memory is not looked at."""
    for module, name, parameter in matrices(model):
        if config.is_fp8(module) and any(size % WIDTH for size in parameter.shape[-2:]):
            raise ValueError(
                f"precision.engine=transformer_engine multiplies by matrices whose widths are multiples of {WIDTH}, "
                f"not by {name} of shape {tuple(parameter.shape)}: use precision.engine=reference"
            )


def settle(config: PrecisionConfig, device: torch.device | str) -> PrecisionConfig:
    """The config with what `auto` means for bfloat16 products here; as it is where no CPU multiplies any."""
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu or config.name not in ("bf16", "fp8") or config.bf16_products != "auto":
        return config
    return replace(config, bf16_products=faster_bf16_products())


def high_engine(config: PrecisionConfig, device: torch.device | str) -> TorchEngine:
    """What multiplies in a run's own precision, or beside FP8."""
    if torch.device(device).type == "cpu" and config.name in ("bf16", "fp8"):
        widens = settle(config, device).bf16_products == "fp32"
        return WideningEngine() if widens else TorchEngine(device, generates_kernels=True)
    return TorchEngine(device, fuses_groups=config.name in ("bf16", "fp8"))


def build_engines(
    config: PrecisionConfig, device: torch.device | str, weights: QuantisedWeights | LibraryWeights
) -> Mapping[str, Engine]:
    """What multiplies for each module (the last part of its name; an expert's with "experts." before it).

    weights: those of `fp8_weights`, shared by all engines. Modules that multiply alike share an engine.
    """
    high = high_engine(config, device)
    if config.name != "fp8":
        return everywhere(high)
    made: dict[Fp8, Engine] = {
        fp8: TransformerEngine(fp8, weights)
        if isinstance(weights, LibraryWeights)
        else Fp8Engine(fp8, weights, config.power_of_two_scales)
        for fp8 in FP8_MODULES.values()
    }
    return {module: made[fp8] if config.is_fp8(module) else high for module, fp8 in FP8_MODULES.items()}


def row_codec(engines: Mapping[str, Engine], width: int) -> RowCodec | None:
    """What rows of `width` elements are on their way to the experts; None for themselves."""
    return engines["experts.gate_up_proj"].codec(width)
