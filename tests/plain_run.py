"""One plain process: the whole recipe read off the report, without micro-batches, ranks, buffers or fast paths.

What `python -m train` does under any topology is held against this: the model as functions of a dictionary of weights
under torch's autograd, torch's own AdamW and clipping, the whole global batch at once. Only three things come from the
product, which other tests hold against their own twins: the initial values, the rows of tokens, and the step's plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import LocalDispatch as ReferenceDispatch
from tests.reference import rms_norm, select
from train.config import RunConfig
from train.data.rows import Rows
from train.data.tokens import Tokens
from train.model.config import ModelConfig
from train.model.init import init_weights
from train.model.transformer import Transformer
from train.precision.linear import TorchEngine

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


@dataclass
class Sums:
    """What a batch adds up to."""

    main: Tensor
    mtp: Tensor
    balance: Tensor
    load: Tensor  # [num_routers, E]


class PlainModel:
    """DeepSeek-V3 (report, section 2) on a dictionary of weights; sequences one by one, experts one by one."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], biases: Tensor) -> None:
        self.config, self.weights, self.biases = config, weights, biases
        #: Of every (sequence, router) so far, in order: the experts of each token, and how close its choice was.
        self.routes: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tokens: Tensor) -> Sums:
        """tokens [B, S + 1]."""
        zero = self.weights["norm.weight"].new_zeros(())
        load = torch.zeros(self.biases.shape, dtype=torch.int64)
        sums = Sums(zero, zero.clone(), zero.clone(), load)
        for row in tokens:
            self._sequence(row, sums)
        return sums

    def _sequence(self, row: Tensor, sums: Sums) -> None:
        w, config = self.weights, self.config
        x = w["embed_tokens.weight"][row[:-1]]
        for i in range(config.num_hidden_layers):
            x = self._layer(f"layers.{i}.", i - config.first_k_dense_replace, x, sums)
        hidden = self._norm(x, "norm.weight")
        sums.main = sums.main + self._cross_entropy(hidden, row[1:])
        for k in range(1, config.num_nextn_predict_layers + 1):
            name = f"mtp.{k - 1}."
            embedding = w["embed_tokens.weight"][row[k:-1]]
            state = self._norm(hidden[: len(row) - 1 - k], name + "hnorm.weight")
            joined = torch.cat([self._norm(embedding, name + "enorm.weight"), state], -1)
            x = joined @ w[name + "eh_proj.weight"].t()
            x = self._layer(name + "layer.", config.num_moe_layers + k - 1, x, sums)
            hidden = self._norm(x, name + "norm.weight")
            sums.mtp = sums.mtp + self._cross_entropy(hidden, row[k + 1 :])

    def _layer(self, name: str, router: int, x: Tensor, sums: Sums) -> Tensor:
        x = x + self._attention(name + "self_attn.", self._norm(x, name + "input_layernorm.weight"))
        normed = self._norm(x, name + "post_attention_layernorm.weight")
        if router < 0:
            return x + self._feed_forward(
                normed, self.weights[name + "mlp.gate_up_proj.weight"], self.weights[name + "mlp.down_proj.weight"]
            )
        return x + self._moe(name + "mlp.", router, normed, sums)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name], self.config.rms_norm_eps)

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ self.weights["lm_head.weight"].t(), labels, reduction="sum")

    def _attention(self, name: str, x: Tensor) -> Tensor:
        """Multi-head latent attention, Eq. 1-11, head by head."""
        c, w = self.config, self.weights
        down = x @ w[name + "kv_a_proj_with_mqa.weight"].t()
        latent, shared_key = down.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        keys_values = self._norm(latent, name + "kv_a_layernorm.weight") @ w[name + "kv_b_proj.weight"].t()
        if c.q_lora_rank is None:
            queries = x @ w[name + "q_proj.weight"].t()
        else:
            latent = self._norm(x @ w[name + "q_a_proj.weight"].t(), name + "q_a_layernorm.weight")
            queries = latent @ w[name + "q_b_proj.weight"].t()
        shared_key = self._rotate(shared_key)
        heads = []
        for q, kv in zip(
            queries.chunk(c.num_attention_heads, -1), keys_values.chunk(c.num_attention_heads, -1), strict=True
        ):
            q = torch.cat([q[:, : c.qk_nope_head_dim], self._rotate(q[:, c.qk_nope_head_dim :])], -1)
            k = torch.cat([kv[:, : c.qk_nope_head_dim], shared_key], -1)
            scores = q @ k.t() * c.softmax_scale
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ kv[:, c.qk_nope_head_dim :])
        return torch.cat(heads, -1) @ w[name + "o_proj.weight"].t()

    def _rotate(self, x: Tensor) -> Tensor:
        """Adjacent pairs of x [S, r] turned by position times frequency; angles are fp32 constants of the model."""
        frequencies = 1.0 / self.config.rope_theta ** (torch.arange(0, x.shape[1], 2).float() / x.shape[1])
        angles = torch.outer(torch.arange(x.shape[0]).float(), frequencies)
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

    @staticmethod
    def _feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (x @ gate_up.t()).chunk(2, -1)
        return (F.silu(gate) * up) @ down.t()

    def _moe(self, name: str, router: int, x: Tensor, sums: Sums) -> Tensor:
        """Eq. 12-16 and the sequence-wise balance loss, Eq. 17-20, for one sequence x [S, d]."""
        c, w = self.config, self.weights
        scores = (x @ w[name + "gate.weight"].t()).sigmoid()
        chosen = torch.tensor(
            select(scores.detach(), self.biases[router], c.n_group, c.topk_group, c.num_experts_per_tok)
        )
        self.routes.append((chosen, self._gaps(scores.detach() + self.biases[router])))
        sums.load[router] += chosen.flatten().bincount(minlength=c.n_routed_experts)
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * c.routed_scaling_factor
        shared = name + "shared_experts."
        y = self._feed_forward(x, w[shared + "gate_up_proj.weight"], w[shared + "down_proj.weight"])
        gate_up, down = w[name + "experts.gate_up_proj"], w[name + "experts.down_proj"]
        for e in range(c.n_routed_experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, self._feed_forward(x[token], gate_up[e], down[e]) * weights[token, slot, None])
        best = scores.topk(c.num_experts_per_tok, -1).indices
        hits = best.flatten().bincount(minlength=c.n_routed_experts).to(scores)
        share = hits * c.n_routed_experts / best.numel()
        sums.balance = sums.balance + (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
        return y

    def _gaps(self, choice: Tensor) -> Tensor:
        """How much each token's biased scores [T, E] may change before it visits other experts: [T]."""
        c = self.config
        grouped = choice.unflatten(-1, (c.n_group, -1))
        strength, order = grouped.topk(2, -1).values.sum(-1).sort(-1, descending=True)
        gap = torch.full((len(choice),), float("inf"), dtype=choice.dtype)
        if c.topk_group < c.n_group:
            gap = strength[:, c.topk_group - 1] - strength[:, c.topk_group]
        kept = torch.zeros_like(strength, dtype=torch.bool).scatter_(1, order[:, : c.topk_group], True)
        allowed = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1).sort(-1, descending=True).values
        return torch.minimum(gap, allowed[:, c.num_experts_per_tok - 1] - allowed[:, c.num_experts_per_tok])


@dataclass
class PlainRun:
    """A plain run's rows, with the keys of metrics.jsonl, and its last weights."""

    rows: list[dict[str, float]]
    weights: dict[str, Tensor]
    biases: Tensor
    routes: list[tuple[Tensor, Tensor]]


def plain_run(config: RunConfig) -> PlainRun:
    """Train `config` from its first step to its last."""
    weights, model = _initial(config)
    params = list(weights.values())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        foreach=False,
    )
    schedule, seq_len = config.schedule(), config.train.seq_len
    train_rows = Rows(Tokens.open(config.data.folder, "train"), seq_len, config.train.seed)
    rows = []
    for step in range(schedule.num_steps):
        plan = schedule.at(step)
        sums = model(train_rows.rows(plan.first_sequence, plan.num_sequences))
        num_tokens, depth = plan.num_sequences * seq_len, max(1, config.model.num_nextn_predict_layers)
        loss = sums.main / num_tokens + plan.mtp_loss_weight / depth * sums.mtp / num_tokens
        loss = loss + config.moe.seq_aux_coeff * sums.balance / plan.num_sequences
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, config.optimizer.clip_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = plan.lr
        optimizer.step()
        mean = sums.load.double().mean(-1, keepdim=True)
        model.biases += plan.bias_update_rate * torch.sign(mean - sums.load).to(model.biases)
        rows.append(
            {
                "step": step + 1,
                "train/loss": sums.main.item() / num_tokens,
                "train/mtp_loss": sums.mtp.item() / depth / num_tokens,
                "train/seq_balance_loss": sums.balance.item() / plan.num_sequences,
                "train/grad_norm": float(norm),
                "train/lr": plan.lr,
                "moe/max_vio": float((sums.load.amax(-1) / mean[:, 0] - 1).max()),
                "moe/min_load": float((sums.load.amin(-1) / mean[:, 0]).min()),
            }
        )
    return PlainRun(rows, {name: p.detach() for name, p in weights.items()}, model.biases, model.routes)


def _initial(config: RunConfig) -> tuple[dict[str, Tensor], PlainModel]:
    dtype = DTYPES[config.precision.name]
    with torch.device("meta"):
        model = Transformer(config.model, ReferenceDispatch(config.model.n_routed_experts), TorchEngine())
    init_weights(model, config.model, config.train.seed, dtype, "cpu")
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    biases = torch.zeros(config.model.num_routers, config.model.n_routed_experts, dtype=dtype)
    return weights, PlainModel(config.model, weights, biases)
