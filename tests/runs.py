"""Runs driven through the entry point of `python -m train`, in long-lived ranks or in processes of their own."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.spawn import Ranks
from tests.texts import write_library
from train.checkpoint.step_folders import read_manifest
from train.data.config import DataConfig
from train.data.prepare.one_source import prepare
from train.files import check_contents
from train.track.metrics_file import read_metrics

# A DeepSeek-V3 in every part whose numbers a test can afford: 3 layers, 8 experts in 4 groups, one prediction depth.
SMALL = [
    # model
    *("model.vocab_size=300", "model.hidden_size=32", "model.intermediate_size=48", "model.moe_intermediate_size=16"),
    *("model.num_hidden_layers=3", "model.num_attention_heads=2", "model.n_routed_experts=8"),
    *("model.num_experts_per_tok=3", "model.n_group=4", "model.topk_group=2", "model.q_lora_rank=16"),
    *("model.kv_lora_rank=8", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.v_head_dim=8"),
    # recipe
    *("train.seq_len=24", "train.micro_batch_size=1", "train.global_batch_size=8", "train.max_steps=10"),
    *("lr_scheduler.warmup_steps=4", "evaluate.interval=5", "evaluate.num_sequences=10", "checkpoint.interval=0"),
    # place
    *("track.wandb=disabled", "track.plan=false", "zero.engine=native", "run.num_threads=1", "run.device=cpu"),
]

# The same without experts and prediction depths, and with grouped-query attention.
DENSE = [
    *SMALL,
    *("model.attention=gqa", "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=8"),
    *("model.q_lora_rank=null", "model.kv_lora_rank=null", "model.qk_nope_head_dim=null"),
    *("model.qk_rope_head_dim=null", "model.v_head_dim=null", "model.n_routed_experts=0"),
    *("model.first_k_dense_replace=3", "model.moe_intermediate_size=null", "model.n_shared_experts=null"),
    *("model.num_experts_per_tok=null", "model.n_group=null", "model.topk_group=null"),
    "model.num_nextn_predict_layers=0",
]


def prepare_text(folder: Path) -> list[str]:
    """Tokens of a small library of files in `folder`, and the settings that use them."""
    source = write_library(folder.with_name("library"))
    data = DataConfig(
        source=str(source),
        dir=str(folder),
        suffixes=(".py",),
        vocab_size=300,
        valid_fraction=0.2,
        max_document_bytes=64,  # so that rows of a test hold borders of documents
    )
    prepare(data, say=lambda line: None)
    return [
        f"data.source={source}",
        f"data.dir={folder}",
        "data.suffixes=[.py]",
        "data.vocab_size=300",
        "data.valid_fraction=0.2",
        "data.max_document_bytes=64",
    ]


@contextmanager
def nothing_beside_the_numbers() -> Iterator[None]:
    """Makes short what takes up to two fifths of a small run and is no part of its numbers: the half second of products
    whose rate MFU calls 1, and the picture of the loss, an empty file here."""
    from train.track import gauges
    from train.view.sinks import PictureSink

    rate = partial(gauges.gemm_flops_per_s, size=64, window_s=0.01)
    with (
        mock.patch.object(gauges, "gemm_flops_per_s", rate),
        mock.patch.object(PictureSink, "checkpoint", lambda sink: sink._out.touch()),
    ):
        yield


def train_main(settings: list[str], fault: Callable[[], Any] | None = None, whole: bool = False) -> int:
    """What `torchrun ... -m train SETTINGS` runs on this rank; `fault`, a context manager's maker, spoils it.

    whole: nothing of the run is made shorter, as nothing is in processes of their own (tests/launched.py).
    """
    from train.__main__ import main

    try:
        with ExitStack() as stack:
            if not whole:
                stack.enter_context(nothing_beside_the_numbers())
            if fault is not None:
                stack.enter_context(fault())
            return main(settings)
    finally:
        # A run that was refused ends without a word to the others, as its process is about to; this process goes on.
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass
class Finished:
    """What a run left behind."""

    folder: Path
    rows: list[dict[str, float]]

    @property
    def masters(self) -> dict[str, Tensor]:
        """Every state of the last checkpoint whole, by name: "master.NAME", moments and router biases."""
        return read_checkpoint(last_checkpoint(self.folder))


def last_checkpoint(folder: Path) -> Path:
    """The folder of a run's last checkpoint."""
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def forget_after(folder: Path, step: int) -> None:
    """Leave a run as if it had been killed just after this step's checkpoint."""
    while (last := last_checkpoint(folder)).name > f"step-{step:08d}":
        shutil.rmtree(last)
    (folder / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]))


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, flat, by its name, as torch.distributed.checkpoint itself reads them."""
    manifest = read_manifest(path)
    check_contents(path, manifest)
    reader = FileSystemReader(path)
    stored = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    whole = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    with warnings.catch_warnings(action="ignore"):  # that no process group is used
        dcp.load(whole, storage_reader=reader, no_dist=True)
    return whole


def run_in(
    ranks: Ranks,
    folder: Path,
    settings: list[str],
    world_size: int,
    fault: Callable[[], Any] | None = None,
    exit_code: int | None = 0,
    whole: bool = False,
) -> Finished:
    """Train in `folder` on long-lived ranks, to the exit code that is expected (None: any); `whole` as `train_main`."""
    words = [*settings, f"run.dir={folder}"]
    codes = ranks.run(train_main, words, fault, whole, world_size=world_size, with_group=False)
    assert exit_code is None or codes == [exit_code] * world_size, codes
    path = folder / "metrics.jsonl"
    return Finished(folder, read_metrics(path) if path.exists() else [])


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def environment() -> Mapping[str, str]:
    """For processes of their own: one thread, no wandb, no accident with the ranks' variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
