"""From the name in the config to a dispatch."""

from __future__ import annotations

from parallel.expert.dispatch import Dispatch, LocalDispatch
from parallel.expert.flat import FlatDispatch
from parallel.expert.two_hop import TwoHopDispatch
from parallel.process import Groups


def build(num_experts: int, groups: Groups) -> Dispatch:
    """The dispatch that `parallel.dispatch` names, over this rank's groups.

    Raises ValueError when ep does not divide the number of experts.
    """
    name = groups.mesh.config.dispatch
    if name == "local":
        return LocalDispatch(num_experts, groups.host)
    return {"flat": FlatDispatch, "two_hop": TwoHopDispatch}[name](num_experts, groups)
