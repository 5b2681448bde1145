"""`python -m launch import`: a model in Hugging Face's layout as a checkpoint that a run can start from.

    python -m launch import from=downloads/model to=imported/model
    python -m launch local model=imported/model/model.yaml checkpoint.init_from=imported/model \\
        data.tokenizer=imported/model/tokenizer.json

Weights in float32, bfloat16, float16, float64 or the published FP8 blocks become masters in float32; moments are fresh
when a run starts. Like a checkpoint of a run, `to` is whole from its first moment.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from torch import Tensor

from launch.settings import ImportSettings
from train.checkpoint import step_folders
from train.checkpoint.state import TrainState, capture_rng, fingerprint
from train.checkpoint.step_folders import CONFIG_FILE, STATE_FILE
from train.checkpoint.writer import write_ranges
from train.data.prepare.progress import Progress
from train.files import CRC32, check_read_back, new_folder, record_of, write_durably
from train.hf import config as hf_config
from train.hf import tokenizer as hf_tokenizer
from train.hf.config import Published
from train.hf.layout import BLOCK_ROWS, DiskTensor, disk_tensors, rows_of_halves
from train.hf.tensor_files import Spec, TensorFolder, all_finite, some
from train.model.config import ModelConfig
from train.precision.published import from_published
from train.recipe.ema import MASTER
from train.settings import read

MODEL_FILE = "model.yaml"


def import_model(settings: Sequence[str]) -> int:
    """Import the folder that `key=value` settings name; prints the model's YAML and how to train on.

    ValueError for bad settings, and for a folder whose tensors are not those of the model in its `config.json`.
    """
    given = read(ImportSettings, settings, "import")
    source, target = given.from_, given.to
    published = hf_config.read_config(source)
    model = published.model
    with TensorFolder(source) as folder, new_folder(target) as partial:
        tensors, copies = disk_tensors(model), disk_tensors(model, copies=True)
        check_tensors(folder.specs, tensors, copies, source)
        check_copies(folder, copies)
        records = write_ranges(partial, _sizes(tensors), _ranges(folder, tensors, published))
        files = {STATE_FILE: start_state(model).to_json(), CONFIG_FILE: yaml.safe_dump({"model": asdict(model)})}
        files[MODEL_FILE] = model_yaml(model, source)
        for name, text in files.items():
            records[name] = write_durably(partial / name, text.encode(), CRC32)
        for name, meant in records.items():
            check_read_back(partial / name, meant)
        carried = hf_tokenizer.carry(source, partial)
        records |= {name: record_of(partial / name, CRC32) for name in carried}
        step_folders.write_manifest(partial, records)
    print(files[MODEL_FILE])
    print(_next(target, carried))
    return 0


def check_tensors(
    found: Mapping[str, Spec], tensors: Sequence[DiskTensor], copies: Sequence[DiskTensor], source: Path
) -> None:
    """ValueError, naming tensors, unless a folder holds exactly those of the model, in shapes and types that fit.

    Copies of embedding and head may be missing, and tensors without elements are no matter: `transformers` writes such
    for shared experts where there are none.
    """
    found = {name: spec for name, spec in found.items() if math.prod(spec.shape)}
    known = {disk.name: disk for disk in [*tensors, *copies]}
    scales = {disk.scale_name: disk for disk in known.values() if _is_fp8(found.get(disk.name))}
    if missing := sorted(({disk.name for disk in tensors} | set(scales)) - set(found)):
        raise ValueError(f"{source} lacks {len(missing)} tensors of the model: {some(missing)}")
    if unknown := sorted(set(found) - set(known) - set(scales)):
        raise ValueError(f"{source} has {len(unknown)} tensors that the model does not have: {some(unknown)}")
    for name, spec in found.items():
        shape = known[name].shape if name in known else scales[name].scale_shape
        if spec.shape != shape:
            raise ValueError(f"{source}: {name} has shape {list(spec.shape)}, the model needs {list(shape)}")
        if _is_fp8(spec) and not (name in known and known[name].is_linear):
            raise ValueError(f"{source}: {name} is quantised, which only projections are")


def check_copies(folder: TensorFolder, copies: Sequence[DiskTensor]) -> None:
    """ValueError when a copy of embedding or head differs from its original, which the model shares."""
    originals = {"embed_tokens.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for disk in copies:
        if disk.name in folder.specs:
            for rows, _, _ in disk.bands():
                original = originals[disk.entry.ours]
                if not torch.equal(folder.read(disk.name, rows), folder.read(original, rows)):
                    raise ValueError(f"{disk.name} differs from {original}, which the model shares with it")


def start_state(model: ModelConfig) -> TrainState:
    """The small state of a run that has not taken a step."""
    return TrainState(
        step=0,
        consumed_tokens=0,
        consumed_sequences=0,
        num_optimizer_steps=0,
        rng=capture_rng(),
        wandb_id=None,
        fingerprints={"model": fingerprint({"model": asdict(model)})},
        config=yaml.safe_dump({"model": asdict(model)}),
    )


def model_yaml(model: ModelConfig, source: Path) -> str:
    """A file of `configs/model` for this model."""
    return f"# From {source / hf_config.CONFIG}\n{yaml.safe_dump(asdict(model), sort_keys=False)}"


def _sizes(tensors: Sequence[DiskTensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for disk in tensors:
        sizes[_state_name(disk)] = sizes.get(_state_name(disk), 0) + disk.numel
    return sizes


def _state_name(disk: DiskTensor) -> str:
    return disk.entry.ours if disk.is_bias else f"{MASTER}{disk.entry.ours}"


def _ranges(
    folder: TensorFolder, tensors: Sequence[DiskTensor], published: Published
) -> Iterator[tuple[str, int, Tensor]]:
    """Every weight in float32, band by band. ValueError, naming it, for one that is not finite."""
    total_bytes = sum(4 * disk.numel for disk in tensors)
    with Progress("importing", total_bytes, lambda line: print(line, flush=True)) as progress:
        for disk in tensors:
            order = rows_of_halves(published.model, disk) if published.halves else None
            scales = folder.read(disk.scale_name) if _is_fp8(folder.specs[disk.name]) else None
            for rows, offset, _ in disk.bands():
                values = _band(folder, disk.name, rows, scales, order)
                if not all_finite(values):
                    raise ValueError(f"{disk.name} holds infinities or NaN: it cannot be imported")
                progress.add(values.nbytes)
                yield _state_name(disk), offset, values.flatten()
                del values  # before the next band is made


def _band(folder: TensorFolder, name: str, rows: slice, scales: Tensor | None, order: Tensor | None) -> Tensor:
    """Our rows of a tensor, in float32, from wherever they lie on disk.

    scales: of blocks, for quantised ones. order: the row on disk of each of ours; None where they are the same.
    """
    wanted = None
    if order is not None:
        # Rows are moved within a head, so they lie close to each other; whole blocks keep scales simple.
        first, last = int(order[rows].min()), int(order[rows].max())
        start = first // BLOCK_ROWS * BLOCK_ROWS
        rows, wanted = slice(start, last + 1), order[rows] - start
    values = folder.read(name, rows)
    if scales is None:
        values = values.float()
    else:
        values = from_published(values, scales[rows.start // BLOCK_ROWS : -(-rows.stop // BLOCK_ROWS)])
    return values if wanted is None else values[wanted]


def _is_fp8(spec: Spec | None) -> bool:
    return spec is not None and spec.dtype == torch.float8_e4m3fn


def _next(target: Path, carried: Sequence[str]) -> str:
    lines = [
        "To train on:",
        f"  python -m launch local {shlex.quote(f'model={target / MODEL_FILE}')} "
        f"{shlex.quote(f'checkpoint.init_from={target}')}"
        + (f" {shlex.quote(f'data.tokenizer={target / carried[0]}')}" if carried else ""),
    ]
    return "\n".join([*lines, *([] if carried else ["There was no tokenizer.json beside the weights."])])
