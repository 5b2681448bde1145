"""What the sharded optimizer asks of the optimizer inside of it, whichever it is."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class InnerOptimizer(Protocol):
    """Updates masters by their gradients, as an optimizer of torch's over flat 1-D masters, and says what it keeps.

    Attributes:
        name: unique among the inner optimizers of a run.
        state_names: keys of a master's state whose tensors have one number for each of its elements. They are sharded
            as the master is, and kept in checkpoints as "STATE.PARAMETER".
        whole_matrices: whether an update needs every element of a matrix (`ParamInfo.matrix`). Then no shard cuts
            through one, and each of `make`'s groups has under "matrices", for each of its masters, a list of
            (start in the master, rows, columns).
    """

    @property
    def name(self) -> str: ...

    @property
    def state_names(self) -> tuple[str, ...]: ...

    @property
    def whole_matrices(self) -> bool: ...

    def make(self, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimizer over `param_groups`: dicts of "params", "weight_decay" and "kernels", the kind of device, cpu or
        cuda, that updates them. "lr" is set before each step."""
        ...

    def set_num_updates(self, state: dict[str, Any], num_updates: int) -> None:
        """Tell a master's state how many updates were made, as after reading a checkpoint."""
        ...

    def cost(self, rows: int, columns: int) -> float:
        """What updating one matrix costs, in any unit: whole matrices are dealt to owners in equal sums of it."""
        ...
