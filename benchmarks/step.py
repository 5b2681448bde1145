"""Speed of a training step (forward, backward, AdamW) against other frameworks on the same model, in turns.

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python -m benchmarks.step [size=S rounds=7 sides=ours,... threads=1]

size     S (8.34 M parameters, 50 GFLOP a step), M (195.28 M, 402 GFLOP) or tiny (to see that it runs).
sides    ours, ours_compiled, ours_bf16, ours_fp8, ours_fp8_compiled, transformers, transformers_compiled, torchtitan,
         torchtitan_fp32_experts; a framework that is not installed is told and left out. At size M a side holds 3 GB.
clock    cpu (default with one thread): processor seconds, which neighbours hardly change. wall: with several threads.
malloc   system, or tuned: start again with allocator settings that keep large blocks, for all sides alike.
clip     largest gradient norm; 0: the others do not take the norm, ours does. Their own trainers clip to 1.
profile  a side to profile instead of comparing.

All sides hold the same number of parameters, read the same tokens, train in fp32 if their name does not say otherwise,
and use torch's fused AdamW. Ours is what
`python -m train` runs in one process: the same model, local dispatch, native sharded optimizer, gradients in
`main_grad`, global norm taken. The others train neither multi-token prediction, which is left out, nor the balance
loss, which ours still computes, with a factor of zero. "GEMM" is a product of two 2048 x 2048 fp32 matrices, timed in
the same turns: a side's share of its rate counts model FLOPs (6 per active weight and token, causal attention halved).
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import _peers
from benchmarks._sides import Neighbours, cpu, median_ms, speedup, take_turns, wall
from parallel.expert.dispatch import LocalDispatch
from parallel.torch_names import cpu_multiplies_bf16
from parallel.zero.optimizer import build
from parallel.zero.sets import ReplicaGroups
from train.assemble import DTYPES
from train.flops import parameter_counts, training_flops_per_token
from train.job import held
from train.model.config import ModelConfig
from train.model.init import init_weights
from train.model.kernels import Kernels, compiled_kernels
from train.model.loss import LossTerms
from train.model.transformer import Transformer
from train.precision.build import build_engines, fp8_weights
from train.precision.config import PrecisionConfig
from train.precision.grads import attach_main_grads
from train.recipe.optimizer import OptimizerConfig, rules
from train.settings import group

DEFAULTS = {
    "size": "S",
    "rounds": "7",
    "sides": "ours,ours_compiled,transformers,torchtitan,torchtitan_fp32_experts",
    "threads": "1",
    "clock": "",
    "malloc": "system",
    "clip": "0",
    "profile": "",
}
TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.1
GEMM = "GEMM 2048^3"

S = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=640,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    q_lora_rank=96,
    max_position_embeddings=256,
    initializer_range=0.02,
)
M = replace(
    S,
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1280,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=4,
    q_lora_rank=192,
)
TINY = replace(S, vocab_size=256, hidden_size=64, num_hidden_layers=2, max_position_embeddings=32)
SIZES = {"S": S, "M": M, "tiny": TINY}
BATCH = 8

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Side:
    """A framework ready to train: `step` takes one step on the next batch and returns its loss."""

    num_parameters: int
    step: Callable[[], Tensor]


class Batches:
    """An endless stream of token ids [B, S + 1], equal for every side: four batches, over and over."""

    def __init__(self, config: ModelConfig) -> None:
        shape = (4, BATCH, config.max_position_embeddings + 1)
        self._batches = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        self._number = -1

    def next(self) -> Tensor:
        self._number += 1
        return self._batches[self._number % 4]


def ours(config: ModelConfig, clip: float, precision: str = "fp32", compile: bool = False) -> Side:
    dispatch, precise = LocalDispatch(config.n_routed_experts), group(PrecisionConfig, "precision", precision)
    weights = fp8_weights(precise, "cpu")
    engines = build_engines(precise, "cpu", weights)
    with torch.device("meta"):
        model = Transformer(config, dispatch, engines, kernels=compiled_kernels() if compile else Kernels())
    init_weights(model, 0, DTYPES[precision], "cpu")
    rule = rules(OptimizerConfig(weight_decay=WEIGHT_DECAY))
    params = [(info, param, *rule(info.name, info.global_shape)) for info, param in held([model])]
    optimizer = build(
        "native",
        params,
        ReplicaGroups(),
        clip_grad_norm=clip,
        on_new_weights=weights.changed,
    )
    attach_main_grads(model)
    batches, terms = Batches(config), LossTerms(1 / (BATCH * config.max_position_embeddings), 0.0, 0.0)

    def step() -> Tensor:
        optimizer.zero_grad()
        out = model(batches.next(), terms)
        out.total.backward()
        optimizer.step(LEARNING_RATE)
        return out.total.detach()

    return Side(sum(param.numel() for param in model.parameters()), step)


def peer(config: ModelConfig, clip: float, make: Callable[[ModelConfig], _peers.Peer]) -> Side:
    torch.manual_seed(0)
    model, loss = make(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    batches = Batches(config)

    def step() -> Tensor:
        tokens = batches.next()
        value = loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        value.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return Side(sum(param.numel() for param in model.parameters()), step)


SIDES: dict[str, Callable[[ModelConfig, float], Side]] = {
    "ours": ours,
    "ours_compiled": lambda config, clip: ours(config, clip, compile=True),
    "ours_bf16": lambda config, clip: ours(config, clip, "bf16"),
    "ours_fp8": lambda config, clip: ours(config, clip, "fp8"),
    "ours_fp8_compiled": lambda config, clip: ours(config, clip, "fp8", compile=True),
    **{
        make.__name__: (lambda make: lambda config, clip: peer(config, clip, make))(make)
        for make in (
            _peers.transformers,
            _peers.transformers_compiled,
            _peers.torchtitan,
            _peers.torchtitan_fp32_experts,
        )
    },
}


def prepare(name: str, config: ModelConfig, clip: float) -> Side | None:
    """A side that has proven to hold the same model and to learn; None, and a line that says why, if it cannot run."""
    began = time.perf_counter()
    try:
        side = SIDES[name](config, clip)
        first, _ = float(side.step()), side.step()
    except ImportError as error:
        print(f"{name}: not installed ({error})", flush=True)
        return None
    except Exception as error:
        # Another framework may break in any way on this machine; ours may not.
        if name.startswith("ours"):
            raise
        print(f"{name}: does not run here: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
        return None
    want, guess = parameter_counts(config).total, math.log(config.vocab_size)
    if side.num_parameters != want:
        raise SystemExit(f"{name} holds {side.num_parameters} parameters, not {want}: another model")
    # Logits of unit variance, the widest of the initialisations here, start half a nat above ln V.
    if not abs(first - guess) < 1:
        raise SystemExit(f"{name} starts at loss {first}, not near ln V = {guess:.3f}")
    print(
        f"{name}: {want} parameters, first loss {first:.3f}, two steps after {time.perf_counter() - began:.1f} s",
        flush=True,
    )
    return side


def gemm() -> Callable[[], Tensor]:
    a, b, out = (torch.randn(2048, 2048) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def report(seconds: dict[str, list[float]], config: ModelConfig) -> None:
    num_tokens = BATCH * config.max_position_embeddings
    flops = training_flops_per_token(config, config.max_position_embeddings) * num_tokens
    gemm_rate = 2 * 2048**3 / statistics.median(seconds[GEMM])
    base = next(iter(seconds))
    print(f"{'':26s}{'ms':>8s}{'tokens/s':>10s}{'GEMM share':>12s}   {base} is faster by [quartiles]")
    for name, taken in seconds.items():
        if name == GEMM:
            print(f"{GEMM:26s}{median_ms(taken):8.1f}{'':>10s}{gemm_rate / 1e9:6.0f} GFLOP/s")
            continue
        rate = 1 / statistics.median(taken)
        ratio = "" if name == base else speedup(seconds, base, name)
        print(f"{name:26s}{median_ms(taken):8.1f}{num_tokens * rate:10.0f}{flops * rate / gemm_rate:12.1%}   {ratio}")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(settings: dict[str, str], config: ModelConfig) -> None:
    print("settings: " + " ".join(f"{key}={value}" for key, value in settings.items()))
    by_avx512, by_amx = cpu_multiplies_bf16()
    print(
        f"machine: {cpu_model()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, bf16 products in "
        f"hardware: {by_avx512}, AMX: {by_amx}; "
        f"torch {torch.__version__}"
    )
    shown = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LD_PRELOAD", *TUNED)
    print("environment: " + (" ".join(f"{key}={os.environ[key]}" for key in shown if key in os.environ) or "default"))
    flops = training_flops_per_token(config, config.max_position_embeddings)
    num_tokens = BATCH * config.max_position_embeddings
    print(f"step: {num_tokens} tokens, {flops * num_tokens / 1e9:.1f} GFLOP", flush=True)


def profile(step: Callable[[], Tensor]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(3):
            step()
    for grouping in (False, True):
        table = profiler.key_averages(group_by_input_shape=grouping)
        print(table.table(sort_by="self_cpu_time_total", row_limit=36, max_name_column_width=44))


def read(arguments: list[str]) -> dict[str, str]:
    settings = DEFAULTS | dict(word.split("=", 1) for word in arguments if "=" in word)
    if unknown := [word for word in arguments if word.split("=")[0] not in DEFAULTS or "=" not in word]:
        raise SystemExit(f"unknown settings: {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    settings["clock"] = settings["clock"] or ("cpu" if settings["threads"] == "1" else "wall")
    choices = {"size": SIZES, "clock": ("cpu", "wall"), "malloc": ("system", "tuned"), "profile": ("", *SIDES)}
    for key, allowed in choices.items():
        if settings[key] not in allowed:
            raise SystemExit(f"{key}={settings[key]} is not one of {', '.join(allowed)}")
    for name in settings["sides"].split(","):
        if name not in SIDES:
            raise SystemExit(f"sides={name} is not one of {', '.join(SIDES)}")
    return settings


def main(arguments: list[str]) -> None:
    settings = read(arguments)
    if settings["malloc"] == "tuned" and any(os.environ.get(key) != value for key, value in TUNED.items()):
        # The allocator reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.step", *arguments], os.environ | TUNED)
    config = SIZES[settings["size"]]
    torch.set_num_threads(int(settings["threads"]))
    describe(settings, config)
    names = [settings["profile"]] if settings["profile"] else settings["sides"].split(",")
    sides = {name: side for name in names if (side := prepare(name, config, float(settings["clip"]))) is not None}
    if settings["profile"]:
        for side in sides.values():
            profile(side.step)
        return
    turns = {name: side.step for name, side in sides.items()} | {GEMM: gemm()}
    clock = cpu if settings["clock"] == "cpu" else wall
    with Neighbours() as neighbours:
        seconds = take_turns(turns, int(settings["rounds"]), clock=clock)
    report(seconds, config)
    print(f"{neighbours}; {settings['rounds']} rounds in turns, {settings['clock']} clock")


if __name__ == "__main__":
    main(sys.argv[1:])
