"""What travels over each level of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.plan.answer import WORDS
from launch.plan.kernels import AS_WRITTEN, KERNELS
from launch.plan.page.words import milliseconds
from train.view.report.document import table
from train.view.report.panels import short_bytes

# What each kind of group carries.
LEVELS = {
    "rail": "rows of experts, between machines",
    "node": "rows of experts, inside a machine",
    "ep": "rows of experts",
    "link": "activations and their gradients, between stages",
    "dense": "gradients and weights, over replicas",
    "expert": "experts' gradients and weights, over replicas",
    "embedding": "gradients and weights of embedding and head",
    "world": "norms and counts",
}


def traffic_section(figures: Mapping[str, Any]) -> str:
    """Bytes per level, and how long they take in each set of kernels; nothing for a process that is alone."""
    known = {kernels: {each["level"]: each for each in figures[kernels]["traffic"]} for kernels in KERNELS}
    if not known[AS_WRITTEN]:
        return ""
    rows = []
    for level, each in known[AS_WRITTEN].items():
        row = [f"{level}: {LEVELS[level]}", short_bytes(each["sent_bytes_per_rank"])]
        row.append(short_bytes(each["sent_bytes_per_token"]))
        for kernels in KERNELS:
            found = known[kernels][level]
            row.append(f"{milliseconds(found['network_s'])} / {milliseconds(found['exposed_s'])}")
        rows.append(row)
    header = ["level", "a rank sends in a step", "all ranks, per token", *(WORDS[kernels] for kernels in KERNELS)]
    return (
        "<h2>Traffic <small>bytes are means over ranks; then the milliseconds that messages of a step take, and those "
        "of them that a device waits for, of the rank with most</small></h2>" + table(header, rows, kind="figures")
    )
