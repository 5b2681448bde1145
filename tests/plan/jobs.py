"""Small runs that a plan is tried on: every kind of layer, every way to the experts."""

from __future__ import annotations

from train.compose import compose
from train.config import RunConfig

BASE = ["model=tiny", "model.num_hidden_layers=3", "zero.engine=native", "train.seq_len=64", "train.micro_batch_size=2"]
WAYS = {
    "local": ["parallel.dispatch=local"],
    "flat": ["parallel.dp=4", "parallel.ep=4", "parallel.nodes=2", "parallel.dispatch=flat"],
    "two_hop": ["parallel.dp=4", "parallel.ep=4", "parallel.nodes=2", "parallel.dispatch=two_hop"],
}
RECOMPUTE = {
    "nothing": [],
    "norms and heads": ["recompute.norm=true", "recompute.mla_up_proj=true"],
    "nodes": ["recompute.nodes=[attention,experts,dense]"],
}


def job(*settings: str) -> RunConfig:
    return compose([*BASE, *settings])
