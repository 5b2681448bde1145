"""Preparing all that a run reads: one source, or the sources of a blend, and those that are only evaluated on, with one
tokenizer for all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from train.data.config import DATASETS, DataConfig
from train.data.meta import FILES, TOKENIZER, Meta
from train.data.prepare.folder import alone_in, given_tokenizer
from train.data.prepare.one_source import prepare, sample_text
from train.data.prepare.sample import SAMPLE_BYTES
from train.data.tokenizer import Tokenizer
from train.files import in_words, replace_durably

_BLEND = "blend.json"


def prepare_sources(config: DataConfig, say: Callable[[str], None] = print) -> dict[str, Meta]:
    """Prepare every source of `config` unless it is there; what lies there, by name, `data.valid_sources` last.

    Raises ValueError as `prepare` does, when the blend's folder was prepared with other settings, and when a file is
    both trained and evaluated on.
    """
    trained = _prepare_trained(config, say)
    evaluated = {name: prepare(source, say) for name, source in config.evaluated.items()}
    _refuse_shared_files(config)
    return trained | evaluated


def _prepare_trained(config: DataConfig, say: Callable[[str], None]) -> dict[str, Meta]:
    if not config.blend:
        return {config.name: prepare(config, say)}
    given = given_tokenizer(config)
    if given is None:
        try:
            _train_tokenizer(config, say)
        except OSError as error:
            raise ValueError(f"data.dir={config.folder} could not be prepared: {in_words(error)}") from None
    return {name: prepare(source, say) for name, source in config.sources.items()}


def _refuse_shared_files(config: DataConfig) -> None:
    """ValueError when a file of `data.valid_sources` is one that is trained on, by the paths that were prepared."""
    if not config.evaluated:
        return
    trained = {path: name for name, source in config.sources.items() for path in _files_of(source)}
    for name, source in config.evaluated.items():
        if shared := [path for path in _files_of(source) if path in trained]:
            raise ValueError(
                f"data.valid_sources: {shared[0]} of {name} is trained on, as a file of {trained[shared[0]]}: what "
                "validates must not be trained on"
            )


def _files_of(config: DataConfig) -> list[str]:
    """The files that a source was prepared from, without links; none of a data set that was loaded by its name."""
    place = (config.source or "").removeprefix(DATASETS)
    if config.source is None or not os.path.exists(place):
        return []
    root = os.path.realpath(place)
    names = json.loads((config.folder / FILES).read_bytes())
    return [os.path.realpath(os.path.join(root, name)) for name in names] if os.path.isdir(root) else [root]


def _train_tokenizer(config: DataConfig, say: Callable[[str], None]) -> None:
    """Leave the blend's tokenizer in its folder, trained on each source by its weight, unless it is there."""
    folder = config.folder
    record = folder / _BLEND
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder, say):
            if not record.exists():  # unless the process that this one has waited for has done it
                _write_tokenizer(config, folder, say)
    _refuse_other(record, config.settings())


def _write_tokenizer(config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
    special = config.fim_tokens if any(source.fim_rate for source in config.sources.values()) else ()
    tokenizer = Tokenizer.train(_sample(config), config.vocab_size, special)
    say(f"trained a tokenizer for the blend in {folder}: byte-level BPE with {tokenizer.vocab_size} tokens")
    body = {"settings": config.settings(), "tokenizer": tokenizer.digest}
    replace_durably(folder / TOKENIZER, tokenizer.text.encode())
    replace_durably(folder / _BLEND, json.dumps(body, indent=1).encode())


def _sample(config: DataConfig) -> Iterator[str]:
    total = sum(each.weight for each in config.blend)
    for each in config.blend:
        # No tokenizer is there yet; all else of the source decides what its text is.
        yield from sample_text(config.sources[each.name], int(SAMPLE_BYTES * each.weight / total))


def _refuse_other(record: Path, asked: dict[str, object]) -> None:
    """ValueError when the blend's record holds other settings, or another tokenizer than the one that lies there."""
    try:
        body = json.loads(record.read_bytes())
        there, digest = body["settings"], body["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} cannot be read: {error}; remove {record.parent} to prepare it again") from None
    for key, value in asked.items():
        if _without_places(there.get(key)) != _without_places(value):
            raise ValueError(
                f"{record.parent} was prepared with data.{key}={there.get(key)}, not {value}: "
                f"name another data.dir, or remove {record.parent} to prepare it again"
            )
    if Tokenizer.load(record.parent / TOKENIZER).digest != digest:
        raise ValueError(f"{record.parent / TOKENIZER} was changed: remove {record.parent} to prepare it again")


def _without_places(value: object) -> object:
    """A setting without where a blend's sources lie, which each source compares by its contents."""
    if not isinstance(value, dict):
        return value
    return {name: each[1:] if isinstance(each, list | tuple) else each for name, each in value.items()}
