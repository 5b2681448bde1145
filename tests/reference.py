"""Plain readings of the technical report's equations: loops and no cleverness, to hold the fast paths against."""

from __future__ import annotations

import torch
from torch import Tensor


class LocalDispatch:
    """All experts here; tokens are sorted by expert with a loop. The model's tests need no `parallel`."""

    first_expert = 0
    internode_bytes = 0

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts

    def dispatch(self, x, weights, indices):
        yield
        pairs = [
            (token, slot)
            for expert in range(self.num_local_experts)
            for token, slot in (indices == expert).nonzero().tolist()
        ]
        plan = LocalPlan(pairs, indices, self.num_local_experts)
        return x[plan.tokens], weights[plan.tokens, plan.slots], plan

    def combine(self, rows, plan):
        yield
        return rows.new_zeros(plan.num_tokens, rows.shape[1]).index_add_(0, plan.tokens, rows)

    def dispatch_backward(self, d_rows, d_row_weights, plan):
        yield
        d_weights = d_row_weights.new_zeros(plan.shape)
        d_weights[plan.tokens, plan.slots] = d_row_weights
        return d_rows.new_zeros(plan.num_tokens, d_rows.shape[1]).index_add_(0, plan.tokens, d_rows), d_weights

    def combine_backward(self, dy, plan):
        yield
        return dy[plan.tokens]


class LocalPlan:
    """Row r is `slots[r]` of token `tokens[r]`."""

    def __init__(self, pairs: list[tuple[int, int]], indices: Tensor, num_experts: int) -> None:
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        self.tokens, self.slots = table[:, 0], table[:, 1]
        self.shape, self.num_tokens = indices.shape, indices.shape[0]
        self.rows_per_expert = [int((indices == expert).sum()) for expert in range(num_experts)]


def balance_loss(scores: Tensor, num_selected: int) -> Tensor:
    """DeepSeek-V3, Eq. 17-20 for one sequence, without alpha: scores [T, E], the affinities s."""
    num_tokens, num_experts = scores.shape
    loss = scores.new_zeros(())
    for i in range(num_experts):
        hits = 0
        for t in range(num_tokens):
            better = int((scores[t] > scores[t, i]).sum())
            hits += better < num_selected
        f_i = num_experts / (num_selected * num_tokens) * hits
        p_i = sum(scores[t, i] / scores[t].sum() for t in range(num_tokens)) / num_tokens
        loss = loss + f_i * p_i
    return loss


def grouped_balance_losses(
    scores: Tensor, chosen: list[list[int]], counted: list[list[int]], num_groups: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V2, Eq. 23-31 for one sequence, without factors: scores [T, E] -> expert, device, communication.

    chosen: the experts each token is sent to; counted: those that "token t selects expert i" is read as. Affinities
    that do not sum to 1 are normalised, as DeepSeek-V3's Eq. 19 does.
    """
    num_tokens, num_experts = scores.shape
    size = num_experts // num_groups
    f = [
        num_experts / (len(counted[0]) * num_tokens) * sum(i in experts for experts in counted)
        for i in range(num_experts)
    ]
    p = [sum(scores[t, i] / scores[t].sum() for t in range(num_tokens)) / num_tokens for i in range(num_experts)]
    expert = device = comm = scores.new_zeros(())
    for i in range(num_experts):
        expert = expert + f[i] * p[i]
    for d in range(num_groups):
        members = range(d * size, (d + 1) * size)
        p_d = sum(p[j] for j in members)
        sent = sum(any(e in members for e in experts) for experts in chosen)
        device = device + sum(f[j] for j in members) / size * p_d
        comm = comm + num_groups / (num_kept * num_tokens) * sent * p_d
    return expert, device, comm


def select(
    scores: Tensor, bias: Tensor, num_groups: int, num_kept: int, num_selected: int, strongest: int = 2
) -> list[list[int]]:
    """Group-limited selection of each token: scores [T, E], bias [E] -> expert ids, best first, ties to the lower id.

    A group is as strong as its `strongest` best experts together: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
    """
    chosen = []
    for row in (scores + bias).tolist():
        size = len(row) // num_groups
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        strength = [sum(sorted(group, reverse=True)[:strongest]) for group in groups]
        kept = sorted(range(num_groups), key=lambda g: (-strength[g], g))[:num_kept]
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen.append(sorted(allowed, key=lambda e: (-row[e], e))[:num_selected])
    return chosen


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """-ln softmax(logits)[label]; logits [V]."""
    return torch.logsumexp(logits, 0) - logits[label]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def mtp_loss(model, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Σ_k Σ_i CE(P^k_{i+k+1}, t_{i+k+1}) of one sequence (Eq. 21-24), divided by nothing.

    hidden [S, d]: the main model's state after its final norm. tokens: [S + 1]. Each depth's transformer block is the
    model's own (held against `transformers` elsewhere); joining, shifting, heads and losses are read from the report.
    """
    from train.model.attention.rope import rotation_table
    from train.model.packing import OneText
    from train.model.tape import Inline, drive

    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    num_tokens, eps = hidden.shape[0], model.config.rms_norm_eps
    total = hidden.new_zeros(())
    for k, module in enumerate(model.mtp, start=1):
        joined = []
        for i in range(num_tokens - k):
            e = rms_norm(embedding[tokens[i + k]], module.enorm.weight, eps)
            h = rms_norm(hidden[i], module.hnorm.weight, eps)
            joined.append(module.eh_proj.weight @ torch.cat([e, h]))
        x = torch.stack(joined).unsqueeze(0)
        table = rotation_table(model.config, x.shape[1], x.device, x.dtype)
        x, _ = drive(module.layer.steps(x, OneText().places(table, None, x.dtype), Inline()))
        hidden = rms_norm(x[0], module.norm.weight, eps)
        for i in range(num_tokens - k):
            total = total + cross_entropy(head @ hidden[i], int(tokens[i + k + 1]))
    return total
