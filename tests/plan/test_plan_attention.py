"""A plan of a run on GPUs has the attention kernel that the run takes there: its widths, bytes, operations, memory."""

from __future__ import annotations

import pytest

from launch.plan.events import Event, Kernel, Memory
from launch.plan.layers import Kept, layers_of
from tests.plan.jobs import WAYS, job
from train.config import RunConfig

BATCH, LENGTH = 2, 64


@pytest.fixture(scope="module")
def kept() -> Kept:
    return {}


def wide(*settings: str) -> RunConfig:
    """Heads as V3's in small: keys half as wide again as values, in widths that every kernel takes."""
    sizes = ["model.qk_nope_head_dim=16", "model.qk_rope_head_dim=8", "model.v_head_dim=16"]
    return job(
        *sizes,
        "model.num_nextn_predict_layers=0",
        "model.first_k_dense_replace=0",
        *WAYS["local"],
        "precision=bf16",
        *settings,
    )


def cores(config: RunConfig, kept: Kept) -> list[Kernel]:
    """Attention's core in an MoE layer's forward and backward."""
    passes = layers_of(config, kept=kept).passes["moe"]
    events: list[Event] = [*passes.forward, *passes.backward]
    return [each for each in events if isinstance(each, Kernel) and each.work == "attention"]


@pytest.mark.parametrize(
    ("settings", "name", "v_width"),
    [
        ([], "cudnn", 16),
        (["data.document_mask=true"], "torch_flash", 24),
        (["run.attention_kernel=flash_attention_3", "data.document_mask=true"], "flash_attention_3", 16),
        (["run.attention_kernel=flash_attention_2"], "flash_attention_2", 24),
    ],
)
def test_the_kernel_of_the_run_is_in_the_plan(kept: Kept, settings: list[str], name: str, v_width: int) -> None:
    """One operation each way, that reads and writes what a fused kernel must: no scores, and values no wider than the
    kernel wants them."""
    config = wide(*settings)
    forward, backward = cores(config, kept)
    heads, qk_width = config.model.num_attention_heads, 24
    assert (forward.name, backward.name) == (f"scaled_dot_product_{name}", f"scaled_dot_product_{name}_backward")
    assert (forward.backward, backward.backward) == (False, True)
    assert forward.sizes == backward.sizes == (BATCH, heads, LENGTH, LENGTH, qk_width, v_width)
    positions = BATCH * LENGTH * heads
    assert forward.flops == positions * LENGTH * (qk_width + v_width)  # half of two operations a product
    assert backward.flops == positions * LENGTH * (3 * qk_width + 2 * v_width)
    starts = 4 * (BATCH + 1) if config.data.document_mask else 0
    read, written = 2 * positions * (2 * qk_width + v_width), positions * (2 * v_width + 4)
    assert (forward.read_bytes, forward.written_bytes) == (read + starts, written)
    # Besides, the gradient of the result.
    assert backward.read_bytes == read + written + 2 * positions * v_width + starts
    assert backward.written_bytes == read


def test_values_as_wide_as_they_are_cost_less_memory(kept: Kept) -> None:
    """What a layer keeps from its forward to its backward: a padded result lies there beside its part that goes on, and
    values are padded, where a kernel that takes them as they are has a view of them, which keeps the keys beside."""
    config, left = wide(), []
    for each in (config, wide("run.attention_kernel=flash_attention_2")):
        passes = layers_of(each, kept=kept).passes["moe"]
        left.append(sum(event.num_bytes for event in passes.forward if isinstance(event, Memory)))
    positions = BATCH * LENGTH * config.model.num_attention_heads
    padded_values, padded_result = 2 * positions * (24 - 16), 2 * positions * 24
    keys_beside = 2 * positions * config.model.qk_nope_head_dim
    assert left[1] - left[0] == padded_values + padded_result - keys_beside


def test_documents_need_no_square(kept: Kept) -> None:
    """What all layers share is made without anything as large as a mask of all pairs of positions."""
    shared = layers_of(wide("data.document_mask=true"), kept=kept).passes["stage"].forward
    made = [event.num_bytes for event in shared if isinstance(event, Memory)]
    made += [event.written_bytes for event in shared if isinstance(event, Kernel)]
    assert 0 < max(made) < BATCH * LENGTH * LENGTH * 2
