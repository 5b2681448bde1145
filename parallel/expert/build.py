"""From the name in the config to a dispatch."""

from __future__ import annotations

from parallel.expert.copier import Copier
from parallel.expert.dispatch import Codec, Dispatch, LocalDispatch
from parallel.expert.flat import FlatDispatch
from parallel.expert.two_hop import TwoHopDispatch
from parallel.process import Groups


def build(num_experts: int, groups: Groups, codec: Codec | None = None, fused: bool = False) -> Dispatch:
    """The dispatch that `parallel.dispatch` names, over this rank's groups; `codec` is what rows are on their way out;
    `fused` says that kernels plan and make their copies, not torch's operations.

    Raises ValueError when ep does not divide the number of experts.
    """
    copier = _fused_copier() if fused else None
    name = groups.mesh.config.dispatch
    if name == "local":
        return LocalDispatch(num_experts, groups.host, codec, copier)
    return {"flat": FlatDispatch, "two_hop": TwoHopDispatch}[name](num_experts, groups, codec, copier)


def _fused_copier() -> Copier:
    # Triton takes time to load, and what computes on a CPU does without.
    from parallel.expert.fused_copier import FusedCopier

    return FusedCopier()
