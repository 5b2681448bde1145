"""`python -m launch export`: a checkpoint as a model in Hugging Face's layout.

    python -m launch export checkpoint=runs/tiny to=exported/tiny
    python -m launch export checkpoint=runs/tiny/checkpoints/step-00000300 to=exported/tiny dtype=fp8 weights=ema

Weights are read as flat ranges of the checkpoint and written in bands of rows, so memory depends neither on the model
nor on the size of a shard. `to` appears when all of it has been written and read back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from launch.settings import ExportSettings
from train.checkpoint import step_folders
from train.checkpoint.goes_on import read_state
from train.checkpoint.reader import RangeReader
from train.checkpoint.state import TrainState
from train.data.config import DataConfig
from train.data.meta import TOKENIZER
from train.data.prepare.progress import Progress
from train.data.rows.blend import check_same_tokens, prepared_tokenizer
from train.files import CRC32, FileRecord, check_contents, check_read_back, new_folder, write_durably
from train.hf import config as hf_config
from train.hf import tokenizer as hf_tokenizer
from train.hf.layout import DiskTensor, disk_tensors
from train.hf.tensor_files import INDEX, Spec, all_finite, read_specs, write_index, write_shard
from train.model.config import ModelConfig
from train.precision.published import to_published
from train.settings import read, section

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
# Which state of a checkpoint each word of `weights` means.
STATES = {"model": "master.", "ema": "ema."}


@dataclass(frozen=True)
class Item:
    """A tensor to write, and the scales beside it where it is quantised."""

    disk: DiskTensor
    spec: Spec
    scales: Spec | None = None

    @property
    def specs(self) -> list[Spec]:
        return [self.spec] if self.scales is None else [self.spec, self.scales]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def export(settings: Sequence[str]) -> int:
    """Export the checkpoint that `key=value` settings name, and say what was written. ValueError for bad settings."""
    given = read(ExportSettings, settings, "export")
    source, target = step_folders.find_checkpoint(given.checkpoint, "checkpoint"), given.to
    state = read_state(source)
    tree = yaml.safe_load(state.config)
    model = section(ModelConfig, tree["model"], "model")
    hf_config.layout_of(model)  # refused before anything is written
    data = section(DataConfig, tree["data"], "data") if tree.get("data") else None
    end_of_document = data.end_of_document if data else None
    tokenizer = _tokenizer(given.tokenizer, source, data, state)
    if tokenizer is not None:
        hf_tokenizer.check(tokenizer, model.vocab_size, end_of_document)
    with new_folder(target) as partial:
        manifest = step_folders.read_manifest(source)
        with Progress("comparing checksums", _total_bytes(manifest), _say) as progress:
            for name, entry in manifest.items():
                check_contents(source, manifest, [name])
                progress.add(entry.num_bytes)
        files = write_model(source, partial, model, given.dtype, STATES[given.weights], given.max_shard_bytes)
        eod = None
        if tokenizer is not None:
            eod = hf_tokenizer.write(tokenizer, partial, model.max_position_embeddings, end_of_document)
        (partial / hf_config.GENERATION_CONFIG).write_text(hf_config.generation_config_json(eod))
        # The file that makes it a model comes last.
        text = hf_config.config_json(model, given.dtype, eod)
        write_durably(partial / hf_config.CONFIG, text.encode(), CRC32)
    num_bytes = sum(spec.num_bytes for specs in files.values() for spec in specs)
    print(
        f"{target}: {num_bytes / 1e9:.3f} GB in {len(files)} files, {given.dtype}, from {source} "
        f"(step {state.step}, {'moving average' if given.weights == 'ema' else 'masters'}), "
        f"{'with' if tokenizer else 'without'} tokenizer"
    )
    return 0


def write_model(
    source: Path, folder: Path, model: ModelConfig, dtype: str, kind: str, max_shard_bytes: int
) -> dict[str, list[Spec]]:
    """Write all weights as shards with an index and read them back; returns the tensors of every file.

    kind: prefix of the state to take, "master." or "ema.". ValueError when the checkpoint lacks a tensor, has one of
    another size, or holds numbers that are not finite.
    """
    items = plan(model, dtype)
    with RangeReader(source) as reader:
        _check_source(reader, items, source, kind)
        parts = list(cut(items, max_shard_bytes))
        shards = {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, start=1)}
        files = {name: [spec for item in shard for spec in item.specs] for name, shard in shards.items()}
        with Progress("exporting", sum(item.num_bytes for item in items), _say) as progress:
            for name, shard in shards.items():
                meant = write_shard(folder / name, files[name], _values(reader, shard, kind, progress))
                _read_back(folder / name, meant, files[name])
    _read_back(folder / INDEX, write_index(folder / INDEX, files))
    return files


def plan(model: ModelConfig, dtype: str) -> list[Item]:
    """Every tensor to write, in order."""
    items = []
    for disk in [*disk_tensors(model), *disk_tensors(model, copies=True)]:
        if dtype == "fp8" and disk.is_linear:
            scales = Spec(disk.scale_name, torch.float32, disk.scale_shape)
            items.append(Item(disk, Spec(disk.name, torch.float8_e4m3fn, disk.shape), scales))
        else:
            items.append(Item(disk, Spec(disk.name, torch.float32 if disk.is_bias else DTYPES[dtype], disk.shape)))
    return items


def cut(items: Sequence[Item], max_shard_bytes: int) -> Iterator[list[Item]]:
    """Consecutive tensors of at most `max_shard_bytes` together; one that is larger by itself is alone."""
    shard: list[Item] = []
    num_bytes = 0
    for item in items:
        if shard and num_bytes + item.num_bytes > max_shard_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(item)
        num_bytes += item.num_bytes
    yield shard


def _source_name(disk: DiskTensor, kind: str) -> str:
    return disk.entry.ours if disk.is_bias else f"{kind}{disk.entry.ours}"


def _check_source(reader: RangeReader, items: Sequence[Item], source: Path, kind: str) -> None:
    known = {name: saved.numel for name, saved in reader.tensors.items()}
    if kind == STATES["ema"] and not any(name.startswith(kind) for name in known):
        raise ValueError(f"weights=ema: {source} holds no moving average, as optimizer.ema_decay was 0")
    ends: dict[str, int] = {}
    for item in items:
        name = _source_name(item.disk, kind)
        ends[name] = max(ends.get(name, 0), item.disk.offset + item.disk.numel)
    for name, end in ends.items():
        if known.get(name) != end:
            raise ValueError(f"{source} has {known.get(name, 'no')} elements of {name}, the model needs {end}")


def _values(reader: RangeReader, shard: Sequence[Item], kind: str, progress: Progress) -> Iterator[Tensor]:
    """The bytes of a shard, band by band."""
    for item in shard:
        scales = []
        for rows, offset, numel in item.disk.bands():
            values = reader.read(_source_name(item.disk, kind), offset, numel)
            values = values.view(rows.stop - rows.start, *item.disk.shape[1:])
            if not all_finite(values):
                raise ValueError(f"{item.disk.entry.ours} holds infinities or NaN: it cannot be exported")
            if item.scales is None:
                values = values.to(item.spec.dtype)
            else:
                values, band_scales = to_published(values.float())
                scales.append(band_scales)
            yield values
            progress.add(values.nbytes)
        if item.scales is not None:
            yield torch.cat(scales)
            progress.add(item.scales.num_bytes)


def _read_back(path: Path, meant: FileRecord, specs: Sequence[Spec] | None = None) -> None:
    """OSError unless the disk has what was meant to be written, in tensors that a reader finds."""
    check_read_back(path, meant)
    if specs is not None and list(read_specs(path).values()) != list(specs):
        raise OSError(f"{path} does not read back as the tensors that were written")


def _tokenizer(choice: str, source: Path, data: DataConfig | None, state: TrainState) -> Path | None:
    """The `tokenizer.json` to export: the one named, the checkpoint's own, or that of the run's prepared tokens."""
    if choice == "none":
        return None
    places = [source / TOKENIZER if choice == "auto" else Path(choice)]
    if choice == "auto" and data is not None:
        places.append(prepared_tokenizer(data))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(
            f"no tokenizer at {' or '.join(map(str, places))}: name one with tokenizer=FILE, or leave it out with "
            "tokenizer=none"
        )
    if data is not None and found in places[1:]:
        check_same_tokens(data, state.fingerprints["data"])
    return found


def _total_bytes(manifest: Mapping[str, FileRecord]) -> int:
    return sum(entry.num_bytes for entry in manifest.values())


def _say(line: str) -> None:
    print(line, flush=True)
