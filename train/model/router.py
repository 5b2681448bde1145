"""The router: which experts a token visits and with which weights (technical report, section 2.1.2).

It is put together from small parts: how logits become affinities (`SCORINGS`), which groups a token may choose from
(`GroupLimit`), and whether a bias has a say in the choice (`BiasedRouter`).

Letters: T = B * S tokens, E routed experts, K experts per token, G groups. Everything here is float32 (float64 in a
float64 model), whatever the model's type and whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.torch_names import softmax_backward
from train.model.balance_loss import BalanceLosses, balance_losses
from train.model.config import ModelConfig, given
from train.model.layers import Backend
from train.precision.grads import Sink, main_grad, wide_dtype


class RouterStats(NamedTuple):
    """What a router reports of a micro-batch."""

    expert_balance: Tensor
    """`BalanceLosses.expert`: summed over the sequences; a scalar, like the next two."""
    device_balance: Tensor
    comm_balance: Tensor
    load: Tensor
    """Tokens that selected each expert, int64 [E]; zeros unless training with gradients."""

    def metrics(self) -> dict[str, Tensor]:
        """What a step reports of them; those of all MoE layers are summed."""
        return {
            "train/seq_balance_loss": self.expert_balance,
            "train/device_balance_loss": self.device_balance,
            "train/comm_balance_loss": self.comm_balance,
        }


class Routing(NamedTuple):
    weights: Tensor
    """[T, K], differentiable."""
    indices: Tensor
    """Global expert ids, int64 [T, K], no duplicates in a row."""
    stats: RouterStats


@dataclass(frozen=True)
class Scoring:
    """How a token's logits over the experts [T, E] become affinities."""

    forward: Callable[[Tensor], Tensor]
    """logits -> scores; may overwrite the logits."""
    backward: Callable[[Tensor, Tensor], Tensor]
    """d_scores, scores -> d_logits."""
    shares: Callable[[Tensor], Tensor]
    """scores [..., E] -> what of their sum each expert has, differentiable."""


SCORINGS = {
    # DeepSeek-V3, Eq. 15, and Eq. 19 for the shares.
    "sigmoid": Scoring(torch.sigmoid_, torch.ops.aten.sigmoid_backward, lambda s: s / s.sum(-1, keepdim=True)),
    # DeepSeekMoE, Eq. 11; DeepSeek-V2, Eq. 22. Sums to 1 already.
    "softmax": Scoring(partial(torch.softmax, dim=-1), softmax_backward, lambda s: s),
}


class _Affinity(torch.autograd.Function):
    """x [T, d], weight [E, d] -> the scores of x weightᵀ [T, E], in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scoring: Scoring, sink: Sink) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = wide_dtype(x.dtype)
            scores = scoring.forward(torch.mm(x.to(wide), weight.to(wide).t()))
        ctx.save_for_backward(x, scores)
        ctx.weight, ctx.scoring, ctx.sink = weight, scoring, sink
        return scores

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> Any:
        (x, scores), weight = ctx.saved_tensors, ctx.weight
        with torch.autocast(x.device.type, enabled=False):
            dx = _leave(x, ctx.scoring.backward(d_scores, scores), weight, ctx.sink)
        return dx, None, None, None


class _RoutedByKernels(torch.autograd.Function):
    """x [T, d], weight [E, d], bias [E] -> what `kernels.router.route` gives, and the gradient in one launch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, router: Router, num_sequences: int, counts_load: bool
    ) -> tuple[Tensor, ...]:
        kernels = router.kernels
        logits = kernels.widening_mm(x, weight.t())
        routed = kernels.routing.route(logits, bias, router.rule, num_sequences, counts_load)
        ctx.save_for_backward(x, routed.scores, routed.indices, routed.slopes)
        ctx.weight, ctx.router = weight, router
        ctx.mark_non_differentiable(routed.indices, routed.load)
        return routed.weights, routed.indices, *routed.losses, routed.load

    @staticmethod
    def backward(ctx: Any, d_weights: Tensor, _: Any, *d_losses: Tensor) -> Any:
        (x, *saved), weight, router = ctx.saved_tensors, ctx.weight, ctx.router
        with torch.autocast(x.device.type, enabled=False):
            d_logits = router.kernels.routing.route_backward(d_weights, d_losses[:3], *saved, router.rule)
            dx = _leave(x, d_logits, weight, router.sink)
        return dx, None, None, None, None, None


def _leave(x: Tensor, d_logits: Tensor, weight: Tensor, sink: Sink) -> Tensor:
    """The gradient of x [T, d]; that of the weight goes to the sink."""
    dx = torch.mm(d_logits, weight.to(d_logits.dtype)).to(x.dtype)
    x = x.detach()

    def wgrad() -> None:
        with torch.autocast(x.device.type, enabled=False):
            main_grad(weight).addmm_(d_logits.t(), x.to(d_logits.dtype))

    sink(wgrad)
    return dx


def largest(values: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the largest values along the last dim, in falling order.

    Equal values: the lowest index first, on every device, which topk does not promise. For the few experts of a token
    it is as fast as topk, too.
    """
    values = values.clone()
    picks = []
    for _ in range(count):
        pick = values.argmax(-1, keepdim=True)
        values.scatter_(-1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, -1)


def best_of(grouped: Tensor) -> Tensor:
    """A group counts as much as its best expert: [..., G, E / G] -> [..., G] (DeepSeek-V2, section 2.2.2)."""
    return grouped.amax(-1)


def best_two_of(grouped: Tensor) -> Tensor:
    """A group counts as much as its two best experts together (DeepSeek-V3, section 2.1.2: K / M of them)."""
    return grouped.gather(-1, largest(grouped, 2)).sum(-1)


@dataclass(frozen=True)
class GroupLimit:
    """Lets a token choose from its best `num_kept` groups only."""

    num_groups: int
    num_kept: int
    strength: Callable[[Tensor], Tensor]

    def __call__(self, choice: Tensor) -> Tensor:
        """choice [T, E], the excluded groups masked with -inf, not 0: a biased score may be negative."""
        grouped = choice.unflatten(-1, (self.num_groups, -1))
        strength = self.strength(grouped)
        kept = largest(strength, self.num_kept)
        excluded = torch.ones_like(strength, dtype=torch.bool).scatter_(-1, kept, False)
        return grouped.masked_fill(excluded.unsqueeze(-1), -torch.inf).flatten(-2)


def no_limit(choice: Tensor) -> Tensor:
    """Every group may be chosen from."""
    return choice


class Router(nn.Module):
    """Selection by score, weights by score; `limit` says between which experts."""

    #: Whether the losses count a token's best experts, not those that it is sent to.
    counts_best = False

    def __init__(self, config: ModelConfig, backend: Backend, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts, self.num_selected = config.n_routed_experts, given(config.num_experts_per_tok)
        self.num_groups, self.num_kept_groups = given(config.n_group), given(config.topk_group)
        self.normalised, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.scoring, self.limit, self.sink = SCORINGS[config.scoring_func], limit, backend.sink
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.kernels, self.routed = backend.kernels, self._by_parts
        if backend.kernels.routing is not None:
            self.routed, self.rule = (
                self._by_kernels,
                backend.kernels.routing.Rule(
                    num_groups=self.num_groups,
                    num_kept=self.num_kept_groups,
                    num_selected=self.num_selected,
                    best_two=self.counts_best,
                    softmax=config.scoring_func == "softmax",
                    normalised=self.normalised,
                    scaling=self.scaling,
                    counts_best=self.counts_best,
                ),
            )

    def forward(self, x: Tensor) -> Routing:
        """x [B, S, hidden], normed."""
        with torch.autocast(x.device.type, enabled=False):
            return self.routed(x)

    @property
    def bias(self) -> Tensor | None:
        """What is added to the scores for the choice, [E]."""
        return None

    def _by_kernels(self, x: Tensor) -> Routing:
        counts = self.training and torch.is_grad_enabled()
        rows = x.reshape(-1, x.shape[-1])
        weights, indices, *stats = _RoutedByKernels.apply(rows, self.weight, self.bias, self, len(x), counts)
        return Routing(weights, indices, RouterStats(*stats))

    def _by_parts(self, x: Tensor) -> Routing:
        scores = _Affinity.apply(x.reshape(-1, x.shape[-1]), self.weight, self.scoring, self.sink)
        indices = self.select(scores.detach())
        weights = scores.gather(1, indices)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        balance = self.balance(scores, indices, len(x))
        return Routing(weights * self.scaling, indices, RouterStats(*balance, self._load(indices)))

    def select(self, scores: Tensor) -> Tensor:
        """The K experts of each token, int64 [T, K], best first; scores [T, E]."""
        return largest(self.limit(scores), self.num_selected)

    def counted(self, scores: Tensor, indices: Tensor) -> Tensor:
        """The experts that balance losses count a token for: those it selects (DeepSeek-V2, Eq. 24)."""
        return indices

    def balance(self, scores: Tensor, indices: Tensor, num_sequences: int) -> BalanceLosses:
        """scores [T, E] and indices [T, K] of the tokens of whole sequences."""
        shape = (num_sequences, -1)
        return balance_losses(
            self.scoring.shares(scores).unflatten(0, shape),
            self.counted(scores.detach(), indices).unflatten(0, shape),
            indices.unflatten(0, shape),
            self.num_groups,
            self.num_kept_groups,
        )

    def _load(self, indices: Tensor) -> Tensor:
        load = torch.zeros(self.num_experts, dtype=torch.int64, device=indices.device)
        if self.training and torch.is_grad_enabled():
            chosen = indices.flatten()
            load.scatter_add_(0, chosen, torch.ones_like(chosen))
        return load


class BiasedRouter(Router):
    """Selection by score + bias; the bias has no part in weights and losses (DeepSeek-V3, section 2.1.2)."""

    counts_best = True
    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, backend: Backend, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__(config, backend, limit)
        #: Whether the bias stays, as the weights do.
        self.is_frozen = False
        self.register_buffer("e_score_correction_bias", torch.empty(self.num_experts))

    @property
    def bias(self) -> Tensor:
        """The bias that balances the load."""
        return self.e_score_correction_bias

    def select(self, scores: Tensor) -> Tensor:
        """The K experts of each token by their biased scores."""
        return super().select(scores + self.e_score_correction_bias)

    def counted(self, scores: Tensor, indices: Tensor) -> Tensor:
        """A token's K best experts, without bias and group limit (DeepSeek-V3, Eq. 18)."""
        return largest(scores, self.num_selected)


#: How experts are chosen: the router, and what makes a group strong.
TOPK_METHODS: dict[str, tuple[type[Router], Callable[[Tensor], Tensor]]] = {
    "noaux_tc": (BiasedRouter, best_two_of),
    "group_limited_greedy": (Router, best_of),
    "greedy": (Router, best_of),
}


def build_router(config: ModelConfig, backend: Backend) -> Router:
    """The router that the config's `scoring_func` and `topk_method` describe."""
    kind, strength = TOPK_METHODS[config.topk_method]
    num_groups, num_kept = given(config.n_group), given(config.topk_group)
    limit = GroupLimit(num_groups, num_kept, strength) if num_kept < num_groups else no_limit
    return kind(config, backend, limit)
