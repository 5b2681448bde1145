"""What recompute saves and costs: bytes kept per micro-batch and layer, and the time of forward and backward.

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python -m benchmarks.recompute [model=small seq_len=256 rounds=7 ...]

model    a file of configs/model: small, tiny, ...
seq_len  tokens of the one sequence that a micro-batch is.
dtype    fp32, bf16 or fp64.
rounds   of the timing, every choice once in each, in turns; process CPU clock, one thread.

Bytes are exact: every storage that torch makes is followed until it is freed. "After F" is what one micro-batch holds
between its forward and its backward through one MoE layer in pieces, as a pipeline runs it; "after B" what then still
waits for W. Time is of F, B and W of the whole model, as `python -m train` runs it in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._sides import Neighbours, cpu, median_ms, speedup, take_turns
from benchmarks._storages import Storages
from parallel.collectives import drive
from parallel.expert.dispatch import LocalDispatch
from parallel.pipeline.segments import Segments
from train.model.config import ModelConfig
from train.model.init import init_weights
from train.model.loss import LossTerms
from train.model.parts import Parts
from train.model.recompute import Recompute
from train.model.recompute_config import NODES, RecomputeConfig
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.grads import attach_main_grads
from train.precision.torch_engine import TorchEngine
from train.settings import CONFIGS, group
from train.stage import Stage, WeightGradients

DEFAULTS = {"model": "small", "seq_len": "256", "dtype": "fp32", "rounds": "7"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
CHOICES = {
    "none": RecomputeConfig(),
    "norm": RecomputeConfig(norm=True),
    "mla_up_proj": RecomputeConfig(mla_up_proj=True),
    "norm, mla_up_proj": RecomputeConfig(norm=True, mla_up_proj=True),
    "experts_up_proj": RecomputeConfig(experts_up_proj=True),
    "attention": RecomputeConfig(nodes=["attention"]),
    "experts": RecomputeConfig(nodes=["experts"]),
    "all nodes": RecomputeConfig(nodes=list(NODES)),
}


def stage(config: ModelConfig, choice: RecomputeConfig, dtype: torch.dtype, parts: Parts) -> Stage:
    """A slice of the model, ready to work, with initial weights."""
    sink = WeightGradients()
    with torch.device("meta"):
        dispatch = LocalDispatch(config.n_routed_experts)
        model = Transformer(
            config, dispatch, everywhere(TorchEngine()), sink=sink, parts=parts, recompute=Recompute(choice)
        )
    init_weights(model, 0, dtype, "cpu")
    attach_main_grads(model)
    return Stage(model, sink, Segments)


def layer_bytes(config: ModelConfig, choice: RecomputeConfig, dtype: torch.dtype, seq_len: int) -> tuple[int, int]:
    """(after F, after B) of one MoE layer and one sequence; the gradient that B hands on is not counted."""
    layer = Parts(embedding=False, layers=(config.first_k_dense_replace,), head=False, mtp=False)
    side = stage(config, choice, dtype, layer)
    side.begin(lambda _: torch.empty(0), LossTerms(1.0, 0.0, 1.0))
    with Storages() as storages:
        drive(side.forward(0, torch.randn(1, seq_len, config.hidden_size, dtype=dtype)))
        side.findings.clear()
        after_f = storages.num_bytes()
        drive(side.backward(0, torch.randn(1, seq_len, config.hidden_size, dtype=dtype)))
        after_b = storages.num_bytes()
        side.weight_gradients(0)
        stays = storages.num_bytes()  # a counter of the dispatch, not of the micro-batch
    return after_f - stays, after_b - stays


def whole_model(config: ModelConfig, choice: RecomputeConfig, dtype: torch.dtype, seq_len: int) -> Callable[[], Any]:
    """F, B and W of one micro-batch through the whole model."""
    tokens = torch.randint(config.vocab_size, (1, seq_len + 1), generator=torch.Generator().manual_seed(1))
    side = stage(config, choice, dtype, Parts.all(config))

    def rows(micro_batch: int) -> Tensor:
        return tokens

    def run() -> None:
        side.begin(rows, LossTerms(1 / seq_len, 0.3 / seq_len, 1e-4))
        drive(side.forward(0, None))
        drive(side.backward(0, None))
        side.weight_gradients(0)

    return run


def read(arguments: list[str]) -> dict[str, str]:
    settings = DEFAULTS | dict(word.split("=", 1) for word in arguments if "=" in word)
    if unknown := [word for word in arguments if word.split("=")[0] not in DEFAULTS or "=" not in word]:
        raise SystemExit(f"unknown settings: {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    models = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    for key, allowed in {"model": models, "dtype": list(DTYPES)}.items():
        if settings[key] not in allowed:
            raise SystemExit(f"{key}={settings[key]} is not one of {', '.join(allowed)}")
    return settings


def main(arguments: list[str]) -> None:
    settings = read(arguments)
    torch.set_num_threads(1)
    dtype, seq_len = DTYPES[settings["dtype"]], int(settings["seq_len"])
    config = group(ModelConfig, "model", settings["model"])
    print("settings: " + " ".join(f"{key}={value}" for key, value in settings.items()))
    kept = {name: layer_bytes(config, choice, dtype, seq_len) for name, choice in CHOICES.items()}
    sides = {name: whole_model(config, choice, dtype, seq_len) for name, choice in CHOICES.items()}
    with Neighbours() as neighbours:
        seconds = take_turns(sides, int(settings["rounds"]), clock=cpu)
    print(neighbours)
    print(f"{'recompute':20s}{'after F':>12s}{'':>7s}{'after B':>12s}{'ms':>9s}   time of none [quartiles]")
    for name, (after_f, after_b) in kept.items():
        share, ratio = after_f / kept["none"][0], speedup(seconds, "none", name)
        print(f"{name:20s}{after_f:12d}{share:7.1%}{after_b:12d}{median_ms(seconds[name]):9.1f}   {ratio}")


if __name__ == "__main__":
    main(sys.argv[1:])
