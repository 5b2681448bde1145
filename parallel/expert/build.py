"""From the name in the config to a dispatch."""

from __future__ import annotations

from parallel.expert.dispatch import Codec, Dispatch, LocalDispatch
from parallel.expert.flat import FlatDispatch
from parallel.expert.two_hop import TwoHopDispatch
from parallel.process import Groups


def build(num_experts: int, groups: Groups, codec: Codec | None = None) -> Dispatch:
    """The dispatch that `parallel.dispatch` names, over this rank's groups; `codec` is what rows are on their way out.

    Raises ValueError when ep does not divide the number of experts.
    """
    name = groups.mesh.config.dispatch
    if name == "local":
        return LocalDispatch(num_experts, groups.host, codec)
    return {"flat": FlatDispatch, "two_hop": TwoHopDispatch}[name](num_experts, groups, codec)
