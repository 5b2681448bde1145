"""AdamW as an inner optimizer of the sharded one, and a variant that keeps its moments in bf16.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), Algorithm 2. DeepSeek-V3 technical
report (arXiv 2412.19437): section 4.2 for the hyper-parameters, section 3.3.3 for moments in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from train.recipe.optimizer import OptimizerConfig, Rule, RuleOf, decays

# Elements that are widened to the masters' dtype at a time: small enough for a CPU's cache, large for a GPU's kernels.
_CHUNK_CPU = 1 << 16
_CHUNK_GPU = 1 << 25


def rules(config: OptimizerConfig) -> RuleOf:
    """AdamW for every parameter; matrices decay, vectors do not."""
    inner = AdamW(config)
    return lambda name, shape: Rule(inner, config.weight_decay if decays(shape) else 0.0)


@dataclass(frozen=True)
class AdamW:
    """AdamW with the moments `exp_avg` and `exp_avg_sq`, element by element, so that a shard may cut anywhere."""

    config: OptimizerConfig
    name = "adamw"
    state_names = ("exp_avg", "exp_avg_sq")
    whole_matrices = False

    def make(self, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimizer over torch's `param_groups` (dicts of "params", "weight_decay" and "kernels"); the caller sets
        "lr"."""
        betas = (self.config.beta1, self.config.beta2)
        if self.config.moments_dtype == "bf16":
            return Bf16MomentsAdamW(param_groups, betas=betas, eps=self.config.eps)
        return torch.optim.AdamW(param_groups, lr=0.0, betas=betas, eps=self.config.eps, fused=True)

    def set_num_updates(self, state: dict[str, Any], num_updates: int) -> None:
        """Bias correction goes by the number of updates."""
        state["step"].fill_(num_updates)

    def cost(self, rows: int, columns: int) -> float:
        """As many operations as elements."""
        return float(rows * columns)


class Bf16MomentsAdamW(torch.optim.Optimizer):
    """AdamW with exp_avg and exp_avg_sq kept in bf16 (rounded to nearest); arithmetic in the parameters' dtype.

    The moments of a chunk are widened, go through torch's fused AdamW with the chunk's parameters and gradients, and
    are rounded back; the update uses them before they are rounded.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "kernels": "cpu"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a `.grad`. Parameters must be contiguous fp32 or fp64."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.bfloat16)
        size = _CHUNK_CPU if group["kernels"] == "cpu" else _CHUNK_GPU
        tensors = (param.detach(), grad, state["exp_avg"], state["exp_avg_sq"])
        chunks = zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
        for weight, slope, exp_avg, exp_avg_sq in chunks:
            wide_avg, wide_sq = exp_avg.to(weight.dtype), exp_avg_sq.to(weight.dtype)
            adamw(
                [weight],
                [slope],
                [wide_avg],
                [wide_sq],
                [],
                [state["step"].clone()],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            exp_avg.copy_(wide_avg)
            exp_avg_sq.copy_(wide_sq)
        state["step"] += 1
