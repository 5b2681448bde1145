"""Which optimizer updates which parameter, and what the sharded optimizer has to know of it.

An optimizer lives in a file of its own beside this one. Adding one takes that file, its settings, and a line in
OPTIMIZERS: the shards (`parallel/zero`), the checkpoints and the loop read what it declares (`InnerOptimizer` there).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

# Name -> the module whose `rules(config)` tells how each parameter is updated. It is imported when it is chosen, so
# that settings can be read without torch.
OPTIMIZERS = {"adamw": "train.recipe.adamw"}


class Rule(NamedTuple):
    """How one parameter is updated."""

    inner: Any  # satisfies `parallel.zero.inner.InnerOptimizer`, which this floor may not import
    weight_decay: float


RuleOf = Callable[[str, tuple[int, ...]], Rule]


@dataclass(frozen=True)
class OptimizerConfig:
    """`optimizer`: what makes a step of a gradient. The learning rate comes from the recipe at each step.

    Attributes:
        name: which optimizer updates the weights: `adamw`.
        beta1: AdamW: decay of the mean of gradients.
        beta2: AdamW: decay of the mean of their squares.
        eps: AdamW: what is added to the root of the mean square.
        weight_decay: decay of matrices, stacked experts, embedding and head; vectors do not decay.
        clip_grad_norm: largest L2 norm of the whole model's gradient; 0 is no clipping.
        moments_dtype: in which both means are kept: `fp32` (fp64 in an fp64 run) or `bf16`.
        ema_decay: decay per step of a moving average of the weights in CPU memory, saved as `ema.*`; 0: none.
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0
    moments_dtype: str = "fp32"
    ema_decay: float = 0.0

    def check(self) -> None:
        """Raises ValueError for an unknown optimizer or a value out of range."""
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optimizer.name={self.name} is not one of {', '.join(OPTIMIZERS)}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} is not in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optimizer.eps={self.eps} is not above 0")
        for name in ("weight_decay", "clip_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} is not 0 or above")
        if self.moments_dtype not in ("fp32", "bf16"):
            raise ValueError(f"optimizer.moments_dtype={self.moments_dtype} is not one of fp32, bf16")

    def recipe(self) -> dict[str, Any]:
        """What makes the numbers of a run. The name is left out where it is AdamW: checkpoints that are older than the
        key go on."""
        settings = asdict(self)
        if self.name == "adamw":
            del settings["name"]
        return settings


def decays(shape: tuple[int, ...]) -> bool:
    """Whether a parameter decays: matrices do (embedding, head, router and stacked experts too), vectors do not."""
    return len(shape) >= 2


def rules(config: OptimizerConfig) -> RuleOf:
    """(name, global shape) of a parameter to how it is updated; equal rules share one inner optimizer."""
    made: RuleOf = importlib.import_module(OPTIMIZERS[config.name]).rules(config)
    return made
