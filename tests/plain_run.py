"""One plain process: the whole recipe read off the report, without micro-batches, ranks, buffers or fast paths.

What `python -m train` does under any topology is held against this: the model as functions of a dictionary of weights
under torch's autograd, torch's own clipping, AdamW tensor by tensor, the whole global batch at once, evaluation row by
row. Only three things come from the product, which other tests hold against their own twins: the initial values, the
rows of tokens, and the step's plan.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import LocalDispatch as ReferenceDispatch
from tests.reference import rms_norm, select
from train.config import RunConfig
from train.data.rows.blend import open_stream
from train.data.rows.shares import Shares
from train.model.config import ModelConfig
from train.model.init import init_weights
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine
from train.recipe.optimizer import OptimizerConfig
from train.recipe.recipe import StepPlan

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
# The latents' norms have this constant in the released code, whatever the model's own is.
LATENT_EPS = 1e-6


@dataclass
class Sums:
    """What a batch adds up to."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    device: Tensor
    comm: Tensor
    load: Tensor  # [num_routers, E]
    num_targets: int = 0  # predicted tokens


class PlainModel:
    """The family's models (DeepSeek-V3's report, section 2; V2's routing where the config asks for it) on a dictionary
    of weights; sequences one by one, experts one by one."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], biases: Tensor, border: int | None = None
    ) -> None:
        """border: the token that ends a document, where the documents of a row see nothing of each other."""
        self.config, self.weights, self.biases, self.border = config, weights, biases, border
        self.documents: list[int] = []  # of the row at work, one number per token
        #: Of every (sequence, router) so far, in order: the experts of each token, and how close its choice was.
        self.routes: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tokens: Tensor) -> Sums:
        """tokens [B, S + 1]."""
        zero = torch.zeros((), dtype=torch.float64)  # many sequences in one sum: no place for fp32
        load = torch.zeros(self.biases.shape, dtype=torch.int64)
        sums = Sums(*(zero.clone() for _ in range(5)), load)
        for row in tokens:
            self._sequence(row, sums)
        return sums

    def _sequence(self, row: Tensor, sums: Sums) -> None:
        w, config = self.weights, self.config
        self.documents = [0]
        for token in row[:-1].tolist():
            self.documents.append(self.documents[-1] + (token == self.border))
        sums.num_targets += sum(a == b for a, b in itertools.pairwise(self.documents))
        x = w["embed_tokens.weight"][row[:-1]]
        for i in range(config.num_hidden_layers):
            x = self._layer(f"layers.{i}.", i - config.first_k_dense_replace, x, sums)
        hidden = self._norm(x, "norm.weight")
        sums.main = sums.main + self._cross_entropy(hidden, row[1:], 0)
        for k in range(1, config.num_nextn_predict_layers + 1):
            name = f"mtp.{k - 1}."
            embedding = w["embed_tokens.weight"][row[k:-1]]
            state = self._norm(hidden[: len(row) - 1 - k], name + "hnorm.weight")
            joined = torch.cat([self._norm(embedding, name + "enorm.weight"), state], -1)
            x = joined @ w[name + "eh_proj.weight"].t()
            x = self._layer(name + "layer.", config.num_moe_layers + k - 1 if config.n_routed_experts else -1, x, sums)
            hidden = self._norm(x, name + "norm.weight")
            sums.mtp = sums.mtp + self._cross_entropy(hidden, row[k + 1 :], k)

    def _layer(self, name: str, router: int, x: Tensor, sums: Sums) -> Tensor:
        attend = self._grouped_attention if self.config.attention == "gqa" else self._latent_attention
        x = x + attend(name + "self_attn.", self._norm(x, name + "input_layernorm.weight"))
        normed = self._norm(x, name + "post_attention_layernorm.weight")
        if router < 0:
            return x + self._feed_forward(
                normed, self.weights[name + "mlp.gate_up_proj.weight"], self.weights[name + "mlp.down_proj.weight"]
            )
        return x + self._moe(name + "mlp.", router, normed, sums)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name], self.config.rms_norm_eps)

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, depth: int) -> Tensor:
        """The loss of every target that is in its position's own document."""
        kept = [i for i in range(len(labels)) if self.documents[i] == self.documents[i + depth + 1]]
        logits = hidden[kept] @ self.weights["lm_head.weight"].t()
        return F.cross_entropy(logits, labels[kept], reduction="sum")

    def _grouped_attention(self, name: str, x: Tensor) -> Tensor:
        """Grouped-query attention (arXiv 2305.13245), query head by query head, each with the keys of its group."""
        c, w = self.config, self.weights
        keys = (x @ w[name + "k_proj.weight"].t()).chunk(c.num_key_value_heads, -1)
        values = (x @ w[name + "v_proj.weight"].t()).chunk(c.num_key_value_heads, -1)
        queries = (x @ w[name + "q_proj.weight"].t()).chunk(c.num_attention_heads, -1)
        heads = []
        for head, q in enumerate(queries):
            group = head * c.num_key_value_heads // c.num_attention_heads
            scores = self._rotate_halves(q) @ self._rotate_halves(keys[group]).t() / math.sqrt(c.head_dim)
            scores = scores.masked_fill(self._hidden(len(x)), float("-inf"))
            heads.append(scores.softmax(-1) @ values[group])
        return torch.cat(heads, -1) @ w[name + "o_proj.weight"].t()

    def _rotate_halves(self, x: Tensor) -> Tensor:
        """`_rotate` for pairs that lie half a head apart: x [S, d]."""
        first, second = x.chunk(2, -1)
        even, odd = self._rotate(torch.stack([first, second], -1).flatten(1)).unflatten(1, (-1, 2)).unbind(-1)
        return torch.cat([even, odd], -1)

    def _latent_attention(self, name: str, x: Tensor) -> Tensor:
        """Multi-head latent attention, Eq. 1-11, head by head."""
        c, w = self.config, self.weights
        down = x @ w[name + "kv_a_proj_with_mqa.weight"].t()
        latent, shared_key = down.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = rms_norm(latent, w[name + "kv_a_layernorm.weight"], LATENT_EPS)
        keys_values = latent @ w[name + "kv_b_proj.weight"].t()
        if c.q_lora_rank is None:
            queries = x @ w[name + "q_proj.weight"].t()
        else:
            latent = x @ w[name + "q_a_proj.weight"].t()
            queries = rms_norm(latent, w[name + "q_a_layernorm.weight"], LATENT_EPS) @ w[name + "q_b_proj.weight"].t()
        shared_key = self._rotate(shared_key)
        heads = []
        for q, kv in zip(
            queries.chunk(c.num_attention_heads, -1), keys_values.chunk(c.num_attention_heads, -1), strict=True
        ):
            q = torch.cat([q[:, : c.qk_nope_head_dim], self._rotate(q[:, c.qk_nope_head_dim :])], -1)
            k = torch.cat([kv[:, : c.qk_nope_head_dim], shared_key], -1)
            scores = q @ k.t() * self._temperature() / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)
            scores = scores.masked_fill(self._hidden(len(x)), float("-inf"))
            heads.append(scores.softmax(-1) @ kv[:, c.qk_nope_head_dim :])
        return torch.cat(heads, -1) @ w[name + "o_proj.weight"].t()

    def _hidden(self, num_positions: int) -> Tensor:
        """Whether a position (row) may not see another (column): a later one, or one of another document."""
        number = torch.tensor(self.documents[:num_positions])
        later = torch.ones(num_positions, num_positions).triu(1).bool()
        return later | (number.unsqueeze(1) != number.unsqueeze(0))

    def _rotate(self, x: Tensor) -> Tensor:
        """Adjacent pairs of x [S, r] turned by position times frequency; angles are fp32 constants of the model."""
        wavelengths = self.config.rope_theta ** (torch.arange(0, x.shape[1], 2).float() / x.shape[1])
        frequencies = torch.stack([self._frequency(pair, length) for pair, length in enumerate(wavelengths)])
        places = [i - self.documents.index(self.documents[i]) for i in range(len(x))]
        angles = torch.outer(torch.tensor(places).float(), frequencies)
        magnitude = self._magnitude()
        cos, sin = (angles.cos() * magnitude).to(x), (angles.sin() * magnitude).to(x)
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

    def _frequency(self, pair: int, wavelength: Tensor) -> Tensor:
        """Radians per position of one pair. YaRN (arXiv 2309.00071, section 3.2): pairs that turn often within the
        original context keep their frequency, those that hardly turn are slowed by `factor`, a ramp lies between.
        """
        c, yarn = self.config, self.config.rope_scaling
        if yarn is None:
            return 1.0 / wavelength

        rotated = c.head_dim if c.attention == "gqa" else c.qk_rope_head_dim

        def pair_of(num_turns: float) -> float:
            """The pair, as a real number, whose wavelength fits so many times into the original context."""
            length = yarn["original_max_position_embeddings"] / (2 * math.pi * num_turns)
            return rotated / 2 * math.log(length) / math.log(c.rope_theta)

        first = max(math.floor(pair_of(yarn.get("beta_fast", 32))), 0)
        last = min(math.ceil(pair_of(yarn.get("beta_slow", 1))), rotated - 1)
        slowed = torch.tensor(float(pair - first)) / (last - first if last != first else 0.001)
        slowed = slowed.clamp(0, 1)
        return 1.0 / (yarn["factor"] * wavelength) * slowed + 1.0 / wavelength * (1 - slowed)

    def _magnitude(self) -> float:
        """Factor on rotated queries and keys, as released with DeepSeek-V3's weights."""
        yarn = self.config.rope_scaling
        if yarn is None or yarn["factor"] <= 1:
            return 1.0
        log = math.log(yarn["factor"])
        if yarn.get("mscale") and yarn.get("mscale_all_dim"):
            return (0.1 * yarn["mscale"] * log + 1) / (0.1 * yarn["mscale_all_dim"] * log + 1)
        return 0.1 * log + 1

    def _temperature(self) -> float:
        """Factor on the attention scores, as released with DeepSeek-V3's weights."""
        yarn = self.config.rope_scaling
        if yarn is None or yarn["factor"] <= 1 or not yarn.get("mscale_all_dim"):
            return 1.0
        return (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2

    @staticmethod
    def _feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up.t()).chunk(2, -1)
        return (F.silu(gate) * up) @ down.t()

    def _moe(self, name: str, router: int, x: Tensor, sums: Sums) -> Tensor:
        """Eq. 12-16 and the balance losses for one sequence x [S, d]."""
        c, w = self.config, self.weights
        logits = x @ w[name + "gate.weight"].t()
        scores = logits.softmax(-1) if c.scoring_func == "softmax" else logits.sigmoid()
        sizes = (c.n_group, c.topk_group, c.num_experts_per_tok)
        chosen = torch.tensor(select(scores.detach(), self.biases[router], *sizes, self._strongest()))
        self.routes.append((chosen, self._gaps(scores.detach() + self.biases[router])))
        sums.load[router] += chosen.flatten().bincount(minlength=c.n_routed_experts)
        weights = scores.gather(1, chosen)
        if c.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * c.routed_scaling_factor
        y = torch.zeros_like(x)
        if c.n_shared_experts:
            shared = name + "shared_experts."
            y = self._feed_forward(x, w[shared + "gate_up_proj.weight"], w[shared + "down_proj.weight"])
        gate_up, down = w[name + "experts.gate_up_proj"], w[name + "experts.down_proj"]
        for e in range(c.n_routed_experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, self._feed_forward(x[token], gate_up[e], down[e]) * weights[token, slot, None])
        self._balance(scores, chosen, sums)
        return y

    def _strongest(self) -> int:
        """The number of experts whose scores add up to a group's strength: V3, section 2.1.2; V2, section 2.2.2."""
        return 2 if self.config.topk_method == "noaux_tc" else 1

    def _balance(self, scores: Tensor, chosen: Tensor, sums: Sums) -> None:
        """V3, Eq. 17-20, which are V2's Eq. 23-25 but for what counts as selected; V2, Eq. 26-31. One sequence."""
        c = self.config
        counted = scores.topk(c.num_experts_per_tok, -1).indices if c.topk_method == "noaux_tc" else chosen
        f = counted.flatten().bincount(minlength=c.n_routed_experts).to(scores) * c.n_routed_experts / counted.numel()
        p = (scores / scores.sum(-1, keepdim=True)).mean(0)
        sums.balance = sums.balance + f @ p
        num_visits = self.config.topk_group * len(scores)
        for members in torch.arange(c.n_routed_experts).chunk(c.n_group):
            sent = torch.isin(chosen, members).any(-1).sum().item()
            sums.device = sums.device + f[members].mean() * p[members].sum()
            sums.comm = sums.comm + c.n_group * sent / num_visits * p[members].sum()

    def _gaps(self, choice: Tensor) -> Tensor:
        """How much each token's biased scores [T, E] may change before it visits other experts: [T]."""
        c = self.config
        grouped = choice.unflatten(-1, (c.n_group, -1))
        strength, order = grouped.topk(self._strongest(), -1).values.sum(-1).sort(-1, descending=True)
        gap = torch.full((len(choice),), float("inf"), dtype=choice.dtype)
        if c.topk_group < c.n_group:
            gap = strength[:, c.topk_group - 1] - strength[:, c.topk_group]
        kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, order[:, : c.topk_group], True)
        allowed = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1).sort(-1, descending=True).values
        if c.num_experts_per_tok == c.n_routed_experts:
            return gap
        return torch.minimum(gap, allowed[:, c.num_experts_per_tok - 1] - allowed[:, c.num_experts_per_tok])


class PlainAdamW:
    """AdamW (arXiv 1711.05101, Algorithm 2), tensor by tensor; its moments are rounded to `dtype` after every step.

    frozen: names of those that stay as they are.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        config: OptimizerConfig,
        dtype: torch.dtype,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.config, self.dtype, self.step_count = config, dtype, 0
        self.params = {name: p for name, p in params.items() if name not in frozen}
        self.moments = {name: [torch.zeros_like(p, dtype=dtype) for _ in range(2)] for name, p in params.items()}

    def go_on_from(self, other: PlainAdamW) -> None:
        """Take the moments and the number of steps of another one."""
        self.step_count = other.step_count
        self.moments = {name: [each.to(self.dtype) for each in pair] for name, pair in other.moments.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        c = self.config
        self.step_count += 1
        for name, p in self.params.items():
            assert p.grad is not None
            moments = self.moments[name]
            first = moments[0].to(p) * c.beta1 + p.grad * (1 - c.beta1)
            second = moments[1].to(p) * c.beta2 + p.grad**2 * (1 - c.beta2)
            moments[:] = first.to(self.dtype), second.to(self.dtype)
            # Matrices decay, vectors do not.
            p.mul_(1 - lr * (c.weight_decay if p.ndim > 1 else 0.0))
            p.sub_(
                lr * first / (1 - c.beta1**self.step_count) / ((second / (1 - c.beta2**self.step_count)).sqrt() + c.eps)
            )


@dataclass
class PlainRun:
    """A plain run's rows, with the keys of metrics.jsonl, its last weights and what updates them."""

    rows: list[dict[str, float]]
    weights: dict[str, Tensor]
    biases: Tensor  # [num_routers, E]; [0, E] where routers have none
    routes: list[tuple[Tensor, Tensor]]
    loads: list[Tensor]  # of every step, [num_routers, E]
    optimizer: PlainAdamW


def plain_run(config: RunConfig, parent: PlainRun | None = None, until: int | None = None) -> PlainRun:
    """Train `config` from its first step to its last, with the evaluations on the way.

    parent: a run whose weights, moments, biases and steps this one goes on from.
    until: the step after which it ends, where that is not its last.
    """
    weights, model = _initial(config)
    optimizer = PlainAdamW(weights, config.optimizer, _moments_dtype(config), config.frozen)
    schedule = config.recipe()
    train_rows = open_stream(config.data, "train", config.train.seq_len, config.train.seed, past=config.readings)
    rows, loads = [], []
    if parent is not None:
        rows, loads = [*parent.rows], [*parent.loads]
        for name, weight in weights.items():
            weight.data.copy_(parent.weights[name])
        optimizer.go_on_from(parent.optimizer)
        if len(parent.biases):
            model.biases.copy_(parent.biases)
    params = list(optimizer.params.values())
    for step in range(len(rows), until or schedule.num_steps):
        plan = schedule.at(step)
        sums = model(train_rows.rows(plan.first_sequence, plan.num_sequences))
        for p in weights.values():
            p.grad = torch.zeros_like(p)
        _loss(config, plan, sums).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, config.optimizer.clip_grad_norm or float("inf"))
        optimizer.step(plan.lr)
        mean = sums.load.double().mean(-1, keepdim=True)
        moves = plan.bias_update_rate * torch.sign(mean - sums.load).to(model.biases)
        model.biases += moves * _moving_routers(config).unsqueeze(-1)
        row = _row(config, plan, sums) | {"train/grad_norm": float(norm)}
        interval = config.evaluate.interval
        if step + 1 == schedule.num_steps or (interval and (step + 1) % interval == 0):
            row |= _evaluate(config, weights, model.biases)
        rows.append(row)
        loads.append(sums.load)
    biases = model.biases if config.model.topk_method == "noaux_tc" else model.biases[:0]
    trained = {name: p.detach() for name, p in weights.items()}
    return PlainRun(rows, trained, biases, model.routes, loads, optimizer)


def _moving_routers(config: RunConfig) -> Tensor:
    """1 for every router whose weights are trained, else 0."""
    model = config.model
    layers = [
        f"layers.{index}" for index in range(model.num_hidden_layers - model.num_moe_layers, model.num_hidden_layers)
    ]
    depths = [f"mtp.{k}.layer" for k in range(model.num_nextn_predict_layers)]
    names = [f"{each}.mlp.gate.weight" for each in [*layers, *depths]][: model.num_routers]
    return torch.tensor([float(name not in config.frozen) for name in names])


def _loss(config: RunConfig, plan: StepPlan, sums: Sums) -> Tensor:
    """The loss of a step: main, prediction depths (Eq. 25), balance (Eq. 17; V2, Eq. 23, 26, 29)."""
    num_tokens, depth = max(1, sums.num_targets), max(1, config.model.num_nextn_predict_layers)
    loss = sums.main / num_tokens + plan.mtp_loss_weight / depth * sums.mtp / num_tokens
    moe = config.moe
    balance = (moe.seq_aux_coeff * sums.balance, moe.device_aux_coeff * sums.device, moe.comm_aux_coeff * sums.comm)
    return loss + sum(balance) / plan.num_sequences


def _row(config: RunConfig, plan: StepPlan, sums: Sums) -> dict[str, float]:
    num_tokens, depth = max(1, sums.num_targets), config.model.num_nextn_predict_layers
    row = {"step": plan.step + 1, "train/loss": sums.main.item() / num_tokens, "train/lr": plan.lr}
    if depth:
        row["train/mtp_loss"] = sums.mtp.item() / depth / num_tokens
    if config.model.num_routers:
        mean = sums.load.double().mean(-1)
        row["train/seq_balance_loss"] = sums.balance.item() / plan.num_sequences
        if config.moe.device_aux_coeff:
            row["train/device_balance_loss"] = sums.device.item() / plan.num_sequences
        if config.moe.comm_aux_coeff:
            row["train/comm_balance_loss"] = sums.comm.item() / plan.num_sequences
        row["moe/max_vio"] = float((sums.load.amax(-1) / mean - 1).max())
        row["moe/min_load"] = float((sums.load.amin(-1) / mean).min())
    return row


@torch.no_grad()
def _evaluate(config: RunConfig, weights: dict[str, Tensor], biases: Tensor) -> dict[str, float]:
    """Mean cross-entropy of sequences evenly over the validation split, and of each source that has its own."""
    data, number = config.data, config.evaluate.num_sequences
    counts = dict.fromkeys((*data.sources, *data.evaluated), number)
    if data.blend:
        shares = Shares({each.name: each.weight for each in data.blend}, seed=0)
        counts |= {name: max(1, count) for name, count in shares.counts(number).items()}
    found: dict[str, float] = {}
    total, num_targets = 0.0, 0
    for name, source in {**data.sources, **data.evaluated}.items():
        rows = open_stream(source, "valid", config.train.seq_len, order="sequential")
        num_rows, count = rows.num_rows, min(counts[name], rows.num_rows)
        taken = torch.cat([rows.rows(num_rows * number // count, 1) for number in range(count)])
        sums = PlainModel(config.model, weights, biases, _border(config))(taken)
        if name in data.sources:
            total, num_targets = total + sums.main.item(), num_targets + sums.num_targets
        if data.blend or name in data.evaluated:
            found[f"valid/{name}/loss"] = sums.main.item() / max(1, sums.num_targets)
    return {"valid/loss": total / max(1, num_targets), **found}


def _moments_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.optimizer.moments_dtype == "bf16" else DTYPES[config.precision.name]


def _initial(config: RunConfig) -> tuple[dict[str, Tensor], PlainModel]:
    dtype = DTYPES[config.precision.name]
    with torch.device("meta"):
        model = Transformer(config.model, ReferenceDispatch(config.model.n_routed_experts), everywhere(TorchEngine()))
    init_weights(model, config.train.seed, dtype, "cpu")
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    biases = torch.zeros(config.model.num_routers, config.model.n_routed_experts, dtype=dtype)
    return weights, PlainModel(config.model, weights, biases, _border(config))


def _border(config: RunConfig) -> int | None:
    return open_stream(config.data, "train", 1).end_of_document if config.data.document_mask else None
