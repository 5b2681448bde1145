"""`python -m launch plan`: what a run needs on a cluster and how long it takes, before it is started there.

`plan calibrate` measures this machine, which `cluster=here` then is; `plan compare` puts settings with several values
side by side.

    python -m launch plan experiment=v3_h800_2048 cluster=h800
    python -m launch plan compare experiment=v3_h800_2048 cluster=h800 pipeline.schedule=1f1b,zbv,dualpipe,dualpipev

Words that are no settings of the verb are settings of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from launch.plan import answer, cluster, compare
from launch.plan.job import Plan
from launch.plan.routing import Routing
from launch.plan.world import MakeRouting, balanced
from launch.settings import PlanSettings
from parallel.expert.placement import Placement
from train import compose
from train.config import RunConfig
from train.settings import hint, leaves, read
from train.track.metrics_file import read_loads

# Words that may follow `plan`.
PARTS = ("calibrate", "compare")


def plan(words: Sequence[str]) -> int:
    """Plans the run that the settings describe. ValueError for bad settings, of the run's or of the cluster's."""
    if words and words[0] == "calibrate":
        from launch.plan.calibrate import calibrate

        return calibrate(words[1:])
    if words and words[0] not in PARTS and "=" not in words[0] and not words[0].startswith("-"):
        raise ValueError(f"plan {words[0]} is not known{hint(words[0], PARTS)}")
    several = words[:1] == ["compare"]
    words = words[several:]
    keys = {key for key, _ in leaves(PlanSettings, "")}
    own = [word for word in words if word.partition("=")[0] in keys]
    asked = read(PlanSettings, own, "plan")
    figures = cluster.load(asked.cluster)

    others = [word for word in words if word not in own]
    if several:
        runs = compare.compared(others, figures, routing_of(asked))
        print(compare.numbers(runs) if asked.json else compare.table(runs))
        return 0

    def start(config: RunConfig) -> int:
        planned = Plan(config, figures, make_routing=routing_of(asked))
        print(json.dumps(answer.numbers(planned), indent=1) if asked.json else answer.screen(planned))
        return 0

    return compose.started(others, start)


def routing_of(asked: PlanSettings) -> MakeRouting:
    """What experts get, by the verb's settings. ValueError for a file without loads."""
    if asked.loads is not None:
        rows = read_loads(asked.loads)
        if not rows:
            raise ValueError(f"loads={asked.loads} holds no step")
        loads = rows[-1].loads

        def counted(config: RunConfig, placement: Placement) -> Routing | None:
            if not config.model.n_routed_experts:
                return None
            return Routing.of_loads(config.model, placement, _num_tokens(config), loads)

        return counted
    if not asked.max_vio:
        return balanced

    def uneven(config: RunConfig, placement: Placement) -> Routing | None:
        if not config.model.n_routed_experts:
            return None
        return Routing.with_max_vio(config.model, placement, _num_tokens(config), asked.max_vio)

    return uneven


def _num_tokens(config: RunConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_len
