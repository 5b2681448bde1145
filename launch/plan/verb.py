"""`python -m launch plan`: what a run needs on a cluster and how long it takes, before it is started there.

`plan search` looks for the best layout on so many devices, `plan compare` puts settings with several values side by
side, `plan pair` draws what stands beside what in a pair, and `plan calibrate` measures this machine, which
`cluster=here` then is.

    python -m launch plan experiment=v3_h800_2048 cluster=h800
    python -m launch plan experiment=v3_h800_2048 cluster=h800 out=v3.html
    python -m launch plan search experiment=v3_h800_2048 cluster=h800 gpus=2048 memory_gb=80
    python -m launch plan pair experiment=v3_h800_2048 cluster=h800 out=pair.svg
    python -m launch plan compare experiment=v3_h800_2048 cluster=h800 pipeline.schedule=1f1b,zbv,dualpipe,dualpipev

Words that are no settings of the verb are settings of the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from launch.plan import answer, cluster, compare, search
from launch.plan.job import NOT_TIMED, Plan
from launch.plan.loads import make_routing
from launch.plan.space import space_of
from launch.plan.timed import timed
from launch.settings import PICTURE_SUFFIXES, PlanSettings, SearchSettings
from train import compose
from train.config import RunConfig
from train.settings import hint, leaves, read

Asked = TypeVar("Asked", bound=PlanSettings)


def plan(words: Sequence[str]) -> int:
    """Plans the run that the settings describe. ValueError for bad settings, of the run's or of the cluster's."""
    if words and words[0] in PARTS:
        return PARTS[words[0]](words[1:])
    if words and "=" not in words[0] and not words[0].startswith("-"):
        raise ValueError(f"plan {words[0]} is not known{hint(words[0], tuple(PARTS))}")
    asked, others = _apart(PlanSettings, words)
    figures = cluster.load(asked.cluster)

    if asked.out is not None:
        from launch.plan.page import write as page  # what draws takes half a second to import

        page.check_can_write(asked.out)

    def start(config: RunConfig) -> int:
        layers = timed(config) if asked.cluster == "here" and asked.timed else NOT_TIMED
        planned = Plan(config, figures, make_routing=make_routing(asked.max_vio, asked.loads), timed=layers)
        found = answer.numbers(planned) if asked.json or asked.out else {}
        print(json.dumps(found, indent=1) if asked.json else answer.screen(planned))
        if asked.out is not None:
            written = page.write(planned, found, asked.out)
            if not asked.json:
                print(f"\nwritten: {written}")
        return 0

    return compose.started(others, start)


def _compare(words: Sequence[str]) -> int:
    asked, others = _apart(PlanSettings, words, "compare")
    routing = make_routing(asked.max_vio, asked.loads)
    runs = compare.compared(others, cluster.load(asked.cluster), routing)
    print(compare.numbers(runs) if asked.json else compare.table(runs))
    return 0


def _search(words: Sequence[str]) -> int:
    asked, others = _apart(SearchSettings, words)
    figures = cluster.load(asked.cluster)
    if asked.out is not None:
        from launch.plan.page import search as page

        page.check_can_write_search(asked.out)
    if asked.memory_gb is not None:
        figures = replace(figures, memory=replace(figures.memory, device_gb=asked.memory_gb))
        figures.check()
    space = space_of(others, asked.gpus, figures)
    found = search.search(space, figures, make_routing(asked.max_vio, asked.loads), asked.num_best)
    numbers = search.numbers(found, figures) if asked.json or asked.out else {}
    print(json.dumps(numbers, indent=1) if asked.json else search.table(found, figures))
    if asked.out is not None:
        written = page.write_search(found, figures, numbers, asked.out)
        if not asked.json:
            print(f"\nwritten: {written}")
    return 0 if found.best else 1


def _pair(words: Sequence[str]) -> int:
    asked, others = _apart(PlanSettings, words)
    if asked.out is None or asked.out.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"out={asked.out}: plan pair draws a picture, which must end in {', '.join(PICTURE_SUFFIXES)}")
    figures, out, routing = cluster.load(asked.cluster), asked.out, make_routing(asked.max_vio, asked.loads)

    def start(config: RunConfig) -> int:
        from launch.plan.page.pair import draw_pair  # what draws takes half a second to import

        draw_pair(Plan(config, figures, make_routing=routing), out)
        print(f"written: {out}")
        return 0

    return compose.started(others, start)


def _calibrate(words: Sequence[str]) -> int:
    from launch.plan.calibrate import calibrate

    return calibrate(words)


# What may follow `plan`.
PARTS: dict[str, Callable[[Sequence[str]], int]] = {
    "calibrate": _calibrate,
    "compare": _compare,
    "pair": _pair,
    "search": _search,
}


def _apart(kind: type[Asked], words: Sequence[str], part: str = "") -> tuple[Asked, list[str]]:
    """The verb's own settings, checked, and the others. part: what follows `plan`, where that draws nothing."""
    keys = {key for key, _ in leaves(kind, "")}
    own = [word for word in words if word.partition("=")[0] in keys]
    asked = read(kind, own, "plan")
    if part and asked.out is not None:
        raise ValueError(f"out={asked.out}: plan {part} draws nothing; give it to the plan of one run")
    return asked, [word for word in words if word not in own]
