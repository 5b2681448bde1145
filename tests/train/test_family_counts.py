"""Parameters of the published models: as laid out without memory, by formula, and as their reports have them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests.reference import LocalDispatch
from train.compose import compose
from train.flops import parameter_counts
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.torch_engine import TorchEngine


class Row(NamedTuple):
    """A file of configs/model, what its model holds, and what its report says of it in billions."""

    model: str
    total: int
    activated: int
    published_total: str
    published_activated: str
    counts_embedding: bool = False


TABLE = [
    # Every parameter of a dense model is said to be activated.
    Row("deepseek_llm_7b", 6_910_365_696, 6_490_935_296, "6.9", "6.9", counts_embedding=True),
    Row("deepseek_llm_67b", 67_425_001_472, 66_586_140_672, "67.4", "67.4", counts_embedding=True),
    # This report counts the embedding among what is activated, though it is only looked up.
    Row("deepseek_moe_16b", 16_375_728_128, 2_618_935_296, "16.4", "2.8", counts_embedding=True),
    Row("deepseek_v2", 235_741_434_880, 20_851_512_320, "236", "21"),
    Row("deepseek_v2_lite", 15_706_484_224, 2_451_435_008, "15.7", "2.4"),
    Row("v3_671b", 671_026_404_352, 36_625_603_584, "671", "37"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.model)
def test_counts_are_the_published_ones(row: Row) -> None:
    config = compose([f"model={row.model}", *without_bias(row.model)]).model
    counts = parameter_counts(config)
    with torch.device("meta"):
        model = Transformer(config, LocalDispatch(config.n_routed_experts), everywhere(TorchEngine()))
    held = {name: parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("mtp.")}
    assert sum(held.values()) == counts.total == row.total
    assert counts.activated == row.activated
    # A report may round or cut the digits that it does not print.
    activated = row.activated + counts.embedding * row.counts_embedding
    for count, published in ((row.total, row.published_total), (activated, row.published_activated)):
        unit = 10.0 ** -len(published.partition(".")[2])
        assert abs(count / 1e9 - float(published)) < unit, published


def without_bias(model: str) -> list[str]:
    """The default recipe moves router biases, which only some models have."""
    return [] if model.startswith("v3") else ["moe.bias_update_rate=0"]
