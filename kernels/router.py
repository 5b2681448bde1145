"""The router: a token's experts, their weights and the balance losses, in three launches, and the gradient in one.

What is computed is told in `train.model.router` and `train.model.balance_loss`. Equal scores go to the lowest number.
A sequence's losses are those of its sums, which blocks of tokens add up in order.

Legend: B sequences of S tokens, E experts in G groups, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.door import jit, tl
from kernels.operation import Launch, operation, power_of_two
from kernels.sums import sum_rows

# Scores of a program's tile, and tiles of a block of tokens.
_TILE, _TILES = 2048, 4


@dataclass(frozen=True)
class Rule:
    """How experts are chosen.

    Attributes:
        num_groups, num_kept: experts come in groups, of which a token chooses from its strongest ones.
        num_selected: K.
        best_two: whether a group is as strong as its two best experts together, not as its best one.
        softmax: whether affinities are a softmax over the experts, not a sigmoid each.
        normalised: whether a token's weights are divided by their sum.
        scaling: factor of all weights.
        counts_best: whether balance losses count a token's best experts, not those that it is sent to.
    """

    num_groups: int
    num_kept: int
    num_selected: int
    best_two: bool
    softmax: bool
    normalised: bool
    scaling: float
    counts_best: bool


@jit
def _columns(num_experts, num_groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The expert of each column, groups padded to SIZE columns, and whether there is one."""
    columns = tl.arange(0, GROUPS * SIZE)
    size = num_experts // num_groups
    group, place = columns // SIZE, columns % SIZE
    return group * size + place, (group < num_groups) & (place < size)


@jit
def _largest(values, columns):
    """Where the largest value of each row is, of equal ones the first; True there alone."""
    return columns[None, :] == tl.argmax(values, 1, tie_break_left=True)[:, None]


@jit
def _within_groups(
    choice, num_groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    KEPT: tl.constexpr, BEST_TWO: tl.constexpr,
):  # fmt: skip
    """Choices with all but the KEPT strongest groups of each row masked."""
    groups = tl.arange(0, GROUPS)
    grouped = tl.reshape(choice, (ROWS * GROUPS, SIZE))
    strength = tl.max(grouped, 1)
    if BEST_TWO and SIZE > 1:
        others = tl.where(_largest(grouped, tl.arange(0, SIZE)), float("-inf"), grouped)
        strength += tl.max(others, 1)
    strength = tl.reshape(strength, (ROWS, GROUPS))
    strength = tl.where((groups < num_groups)[None, :], strength, float("-inf"))
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in range(KEPT):
        best = _largest(strength, groups)
        kept |= best.to(tl.int32)
        strength = tl.where(best, float("-inf"), strength)
    mask = tl.broadcast_to(tl.reshape(kept, (ROWS, GROUPS, 1)), (ROWS, GROUPS, SIZE))
    return tl.where(tl.reshape(mask, (ROWS, GROUPS * SIZE)) > 0, choice, float("-inf"))


@jit
def _affinities(logits, exists, SOFTMAX: tl.constexpr):
    """The scores of logits [ROWS, n], and what of their sum each expert has."""
    if SOFTMAX:
        logits = tl.where(exists[None, :], logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
        share = scores
    else:
        scores = tl.where(exists[None, :], tl.sigmoid(logits), 0.0)
        share = scores / tl.sum(scores, 1)[:, None]
    return scores, share


@jit
def _select(
    choice, scores, expert, columns, Indices, Weights, rows, there,
    ROWS: tl.constexpr, SELECTED: tl.constexpr, K: tl.constexpr, SCALING: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """Write the K best experts of each row and their weights; 1 where an expert is one of them [ROWS, n]."""
    selected = tl.arange(0, SELECTED)
    weights = tl.zeros((ROWS, SELECTED), scores.dtype)
    chosen = tl.zeros_like(choice).to(tl.int32)
    for each in range(K):
        best = _largest(choice, columns)
        choice = tl.where(best, float("-inf"), choice)
        chosen |= best.to(tl.int32)
        index = tl.sum(tl.where(best, expert[None, :], 0), 1)
        tl.store(Indices + rows * K + each, index.to(tl.int64), mask=there)
        weight = tl.sum(tl.where(best, scores, 0.0), 1)
        weights = tl.where((selected == each)[None, :], weight[:, None], weights)
    if NORMALISED:
        weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
    places = Weights + rows[:, None] * K + selected[None, :]
    tl.store(places, weights * SCALING, mask=there[:, None] & (selected < K)[None, :])
    return tl.where(there[:, None], chosen, 0)


@jit
def _best(choice, columns, there, K: tl.constexpr):
    """1 where an expert is one of the K best of its row [ROWS, n]."""
    chosen = tl.zeros_like(choice).to(tl.int32)
    for _ in range(K):
        best = _largest(choice, columns)
        choice = tl.where(best, float("-inf"), choice)
        chosen |= best.to(tl.int32)
    return tl.where(there[:, None], chosen, 0)


@jit
def _route(
    Logits, Bias, Scores, Indices, Weights, Sums, num_tokens, num_experts, num_groups,
    ROWS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SELECTED: tl.constexpr,
    KEPT: tl.constexpr, K: tl.constexpr, SCALING: tl.constexpr, LIMITED: tl.constexpr, BEST_TWO: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALISED: tl.constexpr, COUNTS_BEST: tl.constexpr,
):  # fmt: skip
    kind = Logits.dtype.element_ty
    sequence = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, GROUPS * SIZE)
    expert, exists = _columns(num_experts, num_groups, GROUPS, SIZE)
    shares = tl.zeros((GROUPS * SIZE,), kind)
    hits = tl.zeros((GROUPS * SIZE,), kind)
    load = tl.zeros((GROUPS * SIZE,), kind)
    sent = tl.zeros((GROUPS,), kind)
    bias = tl.zeros((GROUPS * SIZE,), kind)
    if Bias is not None:
        bias = tl.load(Bias + expert, mask=exists, other=0.0).to(kind)
    for tile in range(TILES):
        tokens = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = tokens < num_tokens
        rows = sequence * num_tokens + tokens
        inside = there[:, None] & exists[None, :]
        logits = tl.load(Logits + rows[:, None] * num_experts + expert[None, :], mask=inside, other=0.0)
        scores, share = _affinities(logits, exists, SOFTMAX)
        tl.store(Scores + rows[:, None] * num_experts + expert[None, :], scores, mask=inside)
        shares += tl.sum(tl.where(inside, share, 0.0), 0)
        # What is no number counts as largest, as torch has it: a token must have different experts all the same.
        known = tl.where(scores == scores, scores, float("inf"))
        choice = tl.where(exists[None, :], known + bias[None, :], float("-inf"))
        if LIMITED:
            choice = _within_groups(choice, num_groups, ROWS, GROUPS, SIZE, KEPT, BEST_TWO)
        chosen = _select(
            choice, scores, expert, columns, Indices, Weights, rows, there, ROWS, SELECTED, K, SCALING, NORMALISED
        )
        load += tl.sum(chosen, 0).to(kind)
        reached = tl.max(tl.reshape(chosen, (ROWS * GROUPS, SIZE)), 1)
        sent += tl.sum(tl.reshape(reached, (ROWS, GROUPS)), 0).to(kind)
        if COUNTS_BEST:
            choice = tl.where(exists[None, :], known, float("-inf"))
            chosen = _best(choice, columns, there, K)
        hits += tl.sum(chosen, 0).to(kind)
    block = sequence * tl.num_programs(0) + tl.program_id(0)
    out = Sums + block * (3 * num_experts + num_groups)
    tl.store(out + expert, shares, mask=exists)
    tl.store(out + num_experts + expert, hits, mask=exists)
    tl.store(out + 2 * num_experts + expert, load, mask=exists)
    groups = tl.arange(0, GROUPS)
    tl.store(out + 3 * num_experts + groups, sent, mask=groups < num_groups)


@jit
def _balance(
    Sums, ExpertLoss, DeviceLoss, CommLoss, Load, Slopes, num_sequences, num_tokens, num_experts, num_groups,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr, COUNTS_LOAD: tl.constexpr,
):  # fmt: skip
    kind = Sums.dtype.element_ty
    expert, exists = _columns(num_experts, num_groups, GROUPS, SIZE)
    groups = tl.arange(0, GROUPS)
    size = num_experts // num_groups
    load = tl.zeros((GROUPS * SIZE,), kind)
    by_expert = tl.zeros((1,), kind)
    by_device = tl.zeros((1,), kind)
    by_comm = tl.zeros((1,), kind)
    for sequence in range(num_sequences):
        sums = Sums + sequence * (3 * num_experts + num_groups)
        probability = tl.load(sums + expert, mask=exists, other=0.0) / num_tokens
        hits = tl.load(sums + num_experts + expert, mask=exists, other=0.0)
        load += tl.load(sums + 2 * num_experts + expert, mask=exists, other=0.0)
        sent = tl.load(sums + 3 * num_experts + groups, mask=groups < num_groups, other=0.0)
        frequency = hits * num_experts / (K * num_tokens)
        of_group = tl.sum(tl.reshape(probability, (GROUPS, SIZE)), 1)
        device = tl.sum(tl.reshape(frequency, (GROUPS, SIZE)), 1) / size
        comm = sent * num_groups / (KEPT * num_tokens)
        by_expert += tl.sum(frequency * probability, 0)
        by_device += tl.sum(device * of_group, 0)
        by_comm += tl.sum(comm * of_group, 0)
        out = Slopes + sequence * (num_experts + 2 * num_groups)
        tl.store(out + expert, frequency, mask=exists)
        tl.store(out + num_experts + groups, device, mask=groups < num_groups)
        tl.store(out + num_experts + num_groups + groups, comm, mask=groups < num_groups)
    one = tl.arange(0, 1)
    tl.store(ExpertLoss + one, by_expert)
    tl.store(DeviceLoss + one, by_device)
    tl.store(CommLoss + one, by_comm)
    tl.store(Load + expert, load.to(tl.int64) if COUNTS_LOAD else tl.zeros_like(load).to(tl.int64), mask=exists)


@jit
def _slope(
    DWeights, DExpert, DDevice, DComm, Scores, Indices, Slopes, DLogits, num_tokens, num_experts, num_groups,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, SCALING: tl.constexpr,
    SOFTMAX: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    expert, exists = _columns(num_experts, num_groups, GROUPS, SIZE)
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = tokens < num_tokens
    rows = sequence * num_tokens + tokens
    inside = there[:, None] & exists[None, :]
    scores = tl.load(Scores + rows[:, None] * num_experts + expert[None, :], mask=inside, other=0.0)
    total = tl.full((ROWS,), 1e-20, scores.dtype)
    product = tl.zeros((ROWS,), scores.dtype)
    d_scores = tl.zeros((ROWS, GROUPS * SIZE), scores.dtype)
    chosen = tl.zeros((ROWS, GROUPS * SIZE), tl.int32)
    for each in range(K):
        index = tl.load(Indices + rows * K + each, mask=there, other=-1)
        slope = tl.load(DWeights + rows * K + each, mask=there, other=0.0).to(scores.dtype)
        here = expert[None, :] == index[:, None]
        score = tl.sum(tl.where(here, scores, 0.0), 1)
        total += score
        product += slope * score
        d_scores = tl.where(here, slope[:, None], d_scores)
        chosen |= here.to(tl.int32)
    if NORMALISED:
        d_scores = tl.where(chosen > 0, (d_scores - (product / total)[:, None]) / total[:, None], 0.0)
    d_scores = d_scores * SCALING
    group = tl.arange(0, GROUPS * SIZE) // SIZE
    slopes = Slopes + sequence * (num_experts + 2 * num_groups)
    d_share = tl.load(DExpert) * tl.load(slopes + expert, mask=exists, other=0.0)
    slopes += num_experts + group
    d_share += tl.load(DDevice) * tl.load(slopes, mask=exists, other=0.0)
    d_share += tl.load(DComm) * tl.load(slopes + num_groups, mask=exists, other=0.0)
    d_share = (d_share / num_tokens)[None, :]
    if SOFTMAX:
        d_scores += d_share
        d_logits = scores * (d_scores - tl.sum(d_scores * scores, 1)[:, None])
    else:
        whole = tl.where(there, tl.sum(scores, 1), 1.0)[:, None]
        d_scores += (d_share - tl.sum(d_share * scores, 1)[:, None] / whole) / whole
        d_logits = d_scores * scores * (1.0 - scores)
    tl.store(DLogits + rows[:, None] * num_experts + expert[None, :], d_logits, mask=inside)


def _tile(num_experts: int, num_groups: int) -> dict[str, int]:
    groups, size = power_of_two(num_groups), power_of_two(num_experts // num_groups)
    return {"ROWS": max(1, _TILE // (groups * size)), "GROUPS": groups, "SIZE": size}


@operation(
    "route(Tensor logits, Tensor? bias, int num_sequences, int num_groups, int num_kept, int num_selected,"
    " bool best_two, bool softmax, bool normalised, float scaling, bool counts_best)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _plan_route(
    logits: Tensor, bias: Tensor | None, num_sequences: int, num_groups: int, num_kept: int, num_selected: int,
    best_two: bool, softmax: bool, normalised: bool, scaling: float, counts_best: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Launch]:  # fmt: skip
    num_rows, num_experts = logits.shape
    num_tokens = num_rows // max(1, num_sequences)
    tile = _tile(num_experts, num_groups)
    num_blocks = -(-num_tokens // (tile["ROWS"] * _TILES))
    scores = logits.new_empty(logits.shape)
    indices = logits.new_empty(num_rows, num_selected, dtype=torch.int64)
    weights = logits.new_empty(num_rows, num_selected)
    sums = logits.new_empty(num_sequences, num_blocks, 3 * num_experts + num_groups)
    constants = {
        **tile, "TILES": _TILES, "SELECTED": power_of_two(num_selected), "KEPT": num_kept, "K": num_selected,
        "SCALING": scaling, "LIMITED": num_kept < num_groups, "BEST_TWO": best_two, "SOFTMAX": softmax,
        "NORMALISED": normalised, "COUNTS_BEST": counts_best,
    }  # fmt: skip
    arguments = logits, bias, scores, indices, weights, sums, num_tokens, num_experts, num_groups
    return (scores, indices, weights, sums), Launch(_route, (num_blocks, num_sequences), arguments, constants)


@operation(
    "balance(Tensor sums, int num_tokens, int num_experts, int num_groups, int num_kept, int num_selected,"
    " bool counts_load) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _plan_balance(
    sums: Tensor, num_tokens: int, num_experts: int, num_groups: int, num_kept: int, num_selected: int,
    counts_load: bool,
) -> tuple[tuple[Tensor, ...], Launch]:  # fmt: skip
    num_sequences = sums.shape[0]
    losses = tuple(sums.new_empty(()) for _ in range(3))
    load = sums.new_empty(num_experts, dtype=torch.int64)
    slopes = sums.new_empty(num_sequences, num_experts + 2 * num_groups)
    tile = _tile(num_experts, num_groups)
    constants = {"GROUPS": tile["GROUPS"], "SIZE": tile["SIZE"], "KEPT": num_kept, "K": num_selected}
    arguments = sums, *losses, load, slopes, num_sequences, num_tokens, num_experts, num_groups
    return (*losses, load, slopes), Launch(_balance, (1,), arguments, {**constants, "COUNTS_LOAD": counts_load})


@operation(
    "route_backward(Tensor d_weights, Tensor d_expert, Tensor d_device, Tensor d_comm, Tensor scores, Tensor indices,"
    " Tensor slopes, int num_groups, bool softmax, bool normalised, float scaling) -> Tensor"
)
def _plan_backward(
    d_weights: Tensor, d_expert: Tensor, d_device: Tensor, d_comm: Tensor, scores: Tensor, indices: Tensor,
    slopes: Tensor, num_groups: int, softmax: bool, normalised: bool, scaling: float,
) -> tuple[Tensor, Launch]:  # fmt: skip
    (num_rows, num_experts), num_sequences = scores.shape, slopes.shape[0]
    num_tokens = num_rows // max(1, num_sequences)
    d_logits, tile = scores.new_empty(scores.shape), _tile(num_experts, num_groups)
    grid = -(-num_tokens // tile["ROWS"]), num_sequences
    constants = {
        **tile, "K": indices.shape[1], "SCALING": scaling, "SOFTMAX": softmax, "NORMALISED": normalised
    }  # fmt: skip
    tensors = d_weights, d_expert, d_device, d_comm, scores, indices, slopes, d_logits
    return d_logits, Launch(_slope, grid, (*tensors, num_tokens, num_experts, num_groups), constants)


@dataclass(frozen=True)
class Routed:
    """What `route` gives.

    Attributes:
        weights, indices: of the chosen experts, best first, [T, K], int64 the indices.
        losses: of experts, devices and communication, summed over the sequences; scalars.
        load: tokens of each expert, int64 [E]; zeros unless it was asked for.
        scores, slopes: for the gradient.
    """

    weights: Tensor
    indices: Tensor
    losses: tuple[Tensor, Tensor, Tensor]
    load: Tensor
    scores: Tensor
    slopes: Tensor


def route(logits: Tensor, bias: Tensor | None, rule: Rule, num_sequences: int, counts_load: bool) -> Routed:
    """logits [T, E], float32 or wider, of whole sequences one after the other; bias [E] of the choice, or None."""
    num_experts = logits.shape[1]
    scores, indices, weights, sums = _plan_route(
        logits, bias, num_sequences, rule.num_groups, rule.num_kept, rule.num_selected, rule.best_two, rule.softmax,
        rule.normalised, rule.scaling, rule.counts_best,
    )  # fmt: skip
    num_tokens = len(logits) // max(1, num_sequences)
    *losses, load, slopes = _plan_balance(
        sum_rows(sums, sums.dtype), num_tokens, num_experts, rule.num_groups, rule.num_kept, rule.num_selected,
        counts_load,
    )  # fmt: skip
    return Routed(weights, indices, (losses[0], losses[1], losses[2]), load, scores, slopes)


def route_backward(
    d_weights: Tensor,
    d_losses: tuple[Tensor, Tensor, Tensor],
    scores: Tensor,
    indices: Tensor,
    slopes: Tensor,
    rule: Rule,
) -> Tensor:
    """Gradients of the weights [T, K] and of the three losses -> of the logits [T, E]."""
    return _plan_backward(
        d_weights.contiguous(), *d_losses, scores, indices, slopes, rule.num_groups, rule.softmax, rule.normalised,
        rule.scaling,
    )  # fmt: skip
