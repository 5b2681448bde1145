"""Random legal compositions: small models under random topologies, schedules and recipes, as settings of a run.

A composition is a function of (seed, index) and of the most ranks that it may take. `tests/fuzz.py` holds each against
one plain run.
"""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from parallel.pipeline.registry import INTERLEAVED, NAMES
from train.compose import compose
from train.config import RunConfig
from train.model.config import SCORING_FUNCS, TOPK_METHODS
from train.precision.config import KEYS

VOCAB_SIZE = 300  # of the prepared text
# Sequences times positions of a step: what the plain trainer does in a moment.
MAX_TOKENS = 640
# How often runs have so many ranks.
NUM_RANKS = {1: 1, 2: 6, 3: 1, 4: 9, 6: 1, 8: 2}


@dataclass(frozen=True)
class Composition:
    """Settings of a run, and how many ranks it takes."""

    world_size: int
    settings: tuple[str, ...]

    @property
    def command(self) -> str:
        """What repeats the run by hand."""
        quoted = [f"'{setting}'" if set(setting) & set("[]{}") else setting for setting in self.settings]
        return f"torchrun --standalone --nproc-per-node {self.world_size} -m train {' '.join(quoted)}"

    @property
    def alone(self) -> Composition:
        """This run in one process, with its micro-batches."""
        places = ("parallel.", "pipeline.", "zero.")
        kept = (setting for setting in self.settings if not setting.startswith(places))
        return Composition(1, (*kept, "zero.engine=native"))


@dataclass
class Generator:
    """Draws compositions, and counts which rules refused what was drawn."""

    refusals: collections.Counter[str] = field(default_factory=collections.Counter)

    def draw(self, seed: int, index: int, max_ranks: int = 8, fixed: Sequence[str] = ()) -> Composition:
        """The composition (seed, index); `fixed` settings are never drawn otherwise."""
        dice = random.Random(f"{seed}/{index}")
        while True:
            drawn = _settings(dice, max_ranks, dict(setting.split("=", 1) for setting in fixed))
            settings = tuple(f"{key}={_shown(value)}" for key, value in drawn.items())
            try:
                config = compose(settings)
            except ValueError as refusal:
                self.refusals[str(refusal)] += 1
                continue
            if _num_tokens(config) <= MAX_TOKENS:
                return Composition(config.parallel.world_size, settings)
            self.refusals["too many tokens for a test"] += 1

    def draw_fp8(self, seed: int, index: int, max_ranks: int = 8) -> Composition:
        """One in FP8, wide enough for tiles of every kind: one, several, and an edge; half of them with the report's
        table of what multiplies in FP8."""
        dice = random.Random(f"fp8 {seed}/{index}")
        fixed = [f"model.hidden_size={dice.choice([24, 128, 130, 200, 257])}", "precision=fp8"]
        if dice.random() < 0.5:
            fixed += [f"precision.modules.{key}={dice.choice(['fp8', 'bf16'])}" for key in KEYS]
        return self.draw(seed, index, max_ranks, fixed)

    def move(self, composition: Composition, seed: int, index: int, max_ranks: int = 8) -> Composition:
        """This run somewhere else: only what changes no number is drawn anew."""
        dice = random.Random(f"move {seed}/{index}")
        here = dict(setting.split("=", 1) for setting in composition.settings)
        kept = {key: value for key, value in here.items() if not key.startswith(("parallel.", "pipeline."))}
        model: dict[str, Any] = {"model.num_hidden_layers": int(here["model.num_hidden_layers"])}
        model |= {key: here[key] for key in ("model.attention", "model.n_routed_experts")}
        while True:
            place = _place(dice, max_ranks, {})
            place |= {**_layers(dice, model, place), "train.micro_batch_size": dice.choice([1, 1, 2, 3])}
            place |= {"pipeline.short_steps": "1f1b", **_recompute(dice, model)}
            settings = tuple(f"{key}={_shown(value)}" for key, value in {**kept, **place}.items())
            try:
                return Composition(compose(settings).parallel.world_size, settings)
            except ValueError as refusal:
                self.refusals[str(refusal)] += 1


def _num_tokens(config: RunConfig) -> int:
    return config.train.global_batch_size * config.train.seq_len


def _shown(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_shown, value)) + "]"
    return str(value)


def _settings(dice: random.Random, max_ranks: int, fixed: dict[str, str]) -> dict[str, Any]:
    """One throw: mostly legal, and where a rule between several sizes is not met the program refuses it."""
    place = _place(dice, max_ranks, fixed)
    model = _model(dice, place["parallel.ep"], fixed)
    return {
        **model,
        **place,
        **_recipe(dice, model, place, fixed),
        **_layers(dice, model, place),
        **_recompute(dice, model),
        **fixed,
    }


def _place(dice: random.Random, max_ranks: int, fixed: dict[str, str]) -> dict[str, Any]:
    """Mesh, dispatch and schedule."""
    schedule = fixed.get("pipeline.schedule") or dice.choice(NAMES)
    weights = {ranks: weight for ranks, weight in NUM_RANKS.items() if ranks <= max_ranks}
    meshes: list[dict[str, Any]] = []
    while not meshes:
        ranks = dice.choices(list(weights), list(weights.values()))[0]
        meshes = [mesh for mesh in _meshes(ranks, schedule) if _agrees(mesh, fixed)]
    place = dice.choice(meshes)
    dispatches = ["flat", "two_hop"] + ["local"] * (place["parallel.ep"] == 1)
    place |= {"parallel.dispatch": dice.choice(dispatches), "pipeline.schedule": schedule}
    place["pipeline.pairs"] = dice.choice([None, False] + [True] * (schedule not in ("zb_h1", "zbv")))
    if schedule == INTERLEAVED:
        place["pipeline.stages_per_rank"] = dice.choice([None, 2, 3])
    return place


def _meshes(num_ranks: int, schedule: str) -> list[dict[str, Any]]:
    """Every mesh of so many ranks, those with a pipeline several times: there is most to go wrong."""

    def divisors(number: int) -> list[int]:
        return [each for each in range(1, number + 1) if number % each == 0]

    found = []
    for pp in divisors(num_ranks):
        if pp > 4 or (schedule == "dualpipe" and pp % 2 and pp > 1):
            continue
        for ep in divisors(num_ranks // pp):
            for nodes in divisors(num_ranks):
                per_node = num_ranks // nodes
                if per_node % ep == 0 or ep % per_node == 0:
                    sizes = {"pp": pp, "dp": num_ranks // pp, "ep": ep, "nodes": nodes}
                    found += [{f"parallel.{axis}": size for axis, size in sizes.items()}] * (1 if pp == 1 else 4)
    return found


def _agrees(mesh: dict[str, Any], fixed: dict[str, str]) -> bool:
    return all(str(size) == fixed.get(key, str(size)) for key, size in mesh.items())


def _model(dice: random.Random, ep: int, fixed: dict[str, str]) -> dict[str, Any]:
    num_layers = dice.randint(1, 5)
    return {
        "model.vocab_size": dice.choice([VOCAB_SIZE, VOCAB_SIZE + 7, 384]),
        "model.hidden_size": dice.randint(4, 40),
        "model.intermediate_size": dice.randint(5, 48),
        "model.num_hidden_layers": num_layers,
        **_attention(dice, fixed.get("model.attention") or dice.choice(["mla", "mla", "gqa"])),
        **_experts(dice, ep, num_layers, fixed),
        "model.num_nextn_predict_layers": dice.choice([0, 1, 1, 2, 3]),
        "model.rms_norm_eps": dice.choice([1e-6, 1e-5]),
        "model.initializer_range": dice.choice([0.02, 0.1]),
        "model.rope_theta": dice.choice([10000.0, 500.0]),
        "model.rope_scaling": _yarn(dice) if dice.random() < 0.25 else None,
    }


def _routing(dice: random.Random, num_groups: int, kept: int) -> dict[str, Any]:
    """How a token's experts are scored and chosen; half of the time as the config has it by itself."""
    if dice.random() < 0.5:
        return {}
    method = dice.choice(TOPK_METHODS)
    return {
        "model.scoring_func": dice.choice(SCORING_FUNCS),
        "model.topk_method": method,
        "model.topk_group": num_groups if method == "greedy" else kept,
    }


def _balance(dice: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """Biases where there are some, and balance losses; of devices where there are several."""
    biased = model.get("model.topk_method", "noaux_tc") == "noaux_tc"
    coeffs = {"moe.seq_aux_coeff": dice.choice([0.0001, 0.01])}
    if (model["model.n_group"] or 1) > 1 and dice.random() < 0.5:
        coeffs |= {"moe.device_aux_coeff": dice.choice([0.0, 0.05]), "moe.comm_aux_coeff": dice.choice([0.0, 0.02])}
    # Moving biases change routes; moved at every step, they also show each step's loads.
    return {"moe.bias_update_rate": dice.choice([0.001, 0.05]) if biased else 0.0, **coeffs}


def _attention(dice: random.Random, kind: str) -> dict[str, Any]:
    """Heads, and all sizes of both kinds: those of the other are null."""
    shared = dice.randint(1, 4)
    grouped = {"model.num_key_value_heads": shared, "model.head_dim": dice.choice([2, 4, 6, 10])}
    latent = {
        # The norm of a latent of one or two elements has next to no gradient, and AdamW would lift what is rounding.
        "model.q_lora_rank": dice.choice([None, dice.randint(3, 16)]),
        "model.kv_lora_rank": dice.randint(3, 12),
        "model.qk_nope_head_dim": dice.randint(1, 10),
        "model.qk_rope_head_dim": dice.choice([2, 4, 6, 8]),
        "model.v_head_dim": dice.randint(1, 20),
    }
    heads, others = (shared * dice.choice([1, 2, 3]), latent) if kind == "gqa" else (shared, grouped)
    return {"model.attention": kind, "model.num_attention_heads": heads, **grouped, **latent, **dict.fromkeys(others)}


def _experts(dice: random.Random, ep: int, num_layers: int, fixed: dict[str, str]) -> dict[str, Any]:
    """Which layers have experts, and what these are; in some models there are none at all."""
    num_dense = min(num_layers, dice.choice([0, 0, 1, 1, 1, 2, 5]))
    totals = list(range(2, 17))
    if "model.n_routed_experts" in fixed:
        totals, ep = [int(fixed["model.n_routed_experts"])], 0  # shares that are not equal the program refuses
    if totals == [0] or (ep == 1 and dice.random() < 0.25):
        sizes = ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
        none = {f"model.{size}": None for size in sizes}
        return {"model.n_routed_experts": 0, "model.first_k_dense_replace": num_layers, **none}
    num_groups = dice.choice([count for count in (1, 2, 4) if any(_is_legal(total, count, ep) for total in totals)])
    num_experts = dice.choice([total for total in totals if _is_legal(total, num_groups, ep)])
    kept = dice.randint(1, num_groups)
    return {
        "model.first_k_dense_replace": num_dense,
        "model.moe_intermediate_size": dice.randint(3, 20),
        "model.n_group": num_groups,
        "model.n_routed_experts": num_experts,
        "model.topk_group": kept,
        **_routing(dice, num_groups, kept),
        "model.num_experts_per_tok": dice.randint(1, min(6, kept * (num_experts // num_groups))),
        "model.n_shared_experts": dice.choice([1, 1, 2, 0, None]),
        "model.routed_scaling_factor": dice.choice([1.0, 2.5]),
        "model.norm_topk_prob": dice.random() < 0.8,
    }


def _is_legal(num_experts: int, num_groups: int, ep: int) -> bool:
    """Whether so many experts fall into groups of 2 to 8, and into equal shares of `ep` ranks (0: of any)."""
    is_shared = not ep or num_experts % ep == 0
    return num_experts % num_groups == 0 and 2 <= num_experts // num_groups <= 8 and is_shared


def _yarn(dice: random.Random) -> dict[str, Any]:
    context = dice.choice([8, 64])
    scaling = {"type": "yarn", "factor": dice.choice([1.5, 4, 40]), "original_max_position_embeddings": context}
    if dice.random() < 0.5:
        scaling |= {"beta_fast": dice.choice([4, 32]), "beta_slow": dice.choice([0.5, 1])}
    if dice.random() < 0.5:
        scaling |= {"mscale": dice.choice([1.0, 0.7]), "mscale_all_dim": dice.choice([1.0, 0.5])}
    return scaling


def _layers(dice: random.Random, model: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """Layers dealt out by hand, so that stages are uneven and some empty; half of the time balanced instead."""
    pp, schedule = place["parallel.pp"], place["pipeline.schedule"]
    per_rank = {"zbv": 2, "dualpipev": 2, INTERLEAVED: place.get("pipeline.stages_per_rank") or 2}.get(schedule, 1)
    counts = [0] * (1 if pp == 1 else pp * per_rank)
    if dice.random() < 0.5:
        return {}
    for _ in range(model["model.num_hidden_layers"]):
        counts[dice.randrange(len(counts))] += 1
    return {"pipeline.layers": counts}


def _recompute(dice: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """What the backward pass computes again."""
    has_experts = str(model["model.n_routed_experts"]) != "0"
    fine = {
        "recompute.norm": dice.random() < 0.3,
        "recompute.mla_up_proj": dice.random() < 0.3 and model["model.attention"] == "mla",
    }
    nodes = [node for node in ("attention", "experts", "dense") if dice.random() < 0.3]
    return {
        **fine,
        "recompute.nodes": nodes,
        "recompute.experts_up_proj": dice.random() < 0.3 and has_experts and "experts" not in nodes,
    }


def _recipe(dice: random.Random, model: dict[str, Any], place: dict[str, Any], fixed: dict[str, str]) -> dict[str, Any]:
    depth = model["model.num_nextn_predict_layers"]
    seq_len = max(depth + 1, dice.choice([dice.randint(1, 8), dice.randint(9, 40)]))
    precision = fixed.get("precision", dice.choice(["fp64", "fp64", "fp64", "fp32"]))
    engines = {"fp64": ["native"], "fp32": ["deepspeed"]}.get(precision, ["native", "deepspeed"])
    return {
        "precision": precision,
        "zero.engine": dice.choice(engines),
        "train.seed": dice.randrange(1000),
        "data.document_mask": dice.random() < 0.35,
        "train.seq_len": seq_len,
        "train.max_steps": 5 if precision == "fp64" else 1,
        **_batch(dice, place, seq_len),
        "optimizer.clip_grad_norm": dice.choice([0, 1.0, 0.05]),
        "optimizer.weight_decay": dice.choice([0.0, 0.1]),
        "optimizer.beta2": dice.choice([0.95, 0.999]),
        "optimizer.moments_dtype": "bf16" if dice.random() < 0.2 else "fp32",
        "lr_scheduler.lr": dice.choice([1e-3, 1e-2]),
        "lr_scheduler.warmup_steps": dice.randint(0, 4),
        **_balance(dice, model),
        "mtp.loss_weight": dice.choice([0.3, 1.0]),
        "evaluate.interval": dice.choice([0, 2, 3]),
        "evaluate.num_sequences": dice.randint(1, 7),
    }


def _batch(dice: random.Random, place: dict[str, Any], seq_len: int) -> dict[str, Any]:
    """Micro-batches that the schedule takes; sometimes a batch that grows on the way."""
    pp, schedule = place["parallel.pp"], place["pipeline.schedule"]
    rules = {"dualpipe": (2 * pp, 2), "dualpipev": (2 * pp, 1), INTERLEAVED: (pp, pp)} if pp > 1 else {}
    least, quantum = rules.get(schedule, (1, 1))
    micro_batch_size = dice.choice([1, 1, 2, 3])
    count = least + quantum * dice.randint(0, 3)
    per_round = micro_batch_size * place["parallel.dp"]
    batch: dict[str, Any] = {"train.micro_batch_size": micro_batch_size, "train.global_batch_size": count * per_round}
    short = schedule == "dualpipe" and pp > 1 and dice.random() < 0.3
    if short:
        least, quantum = 1, 1
        batch["pipeline.short_steps"] = "1f1b"
    if count > least and (short or dice.random() < 0.3):
        # An odd number of micro-batches in the middle of the ramp is for schedules that take it: the program says.
        start = dice.randrange(least, count, quantum)
        batch["train.batch_ramp.start"] = start * per_round
        batch["train.batch_ramp.quantum"] = dice.choice([quantum, count - start]) * per_round
        batch["train.batch_ramp.tokens"] = dice.randint(1, 3 * count * per_round * seq_len)
    return batch
