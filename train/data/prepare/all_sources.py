"""Preparing all that a run reads: one source, or the sources of a blend with one tokenizer for all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from train.data.config import DataConfig
from train.data.prepare.folder import given_tokenizer
from train.data.meta import TOKENIZER, Meta, flush_folder, write_flushed
from train.data.prepare.one_source import prepare, sample_text
from train.data.prepare.sample import SAMPLE_BYTES
from train.data.tokenizer import Tokenizer

_BLEND = "blend.json"


def prepare_sources(config: DataConfig, say: Callable[[str], None] = print) -> dict[str, Meta]:
    """Prepare every source of `config` unless it is there; what lies there, by name.

    Raises ValueError as `prepare` does, and when the blend's folder was prepared with other settings.
    """
    if not config.blend:
        return {config.name: prepare(config, say)}
    given = given_tokenizer(config)
    if given is None:
        try:
            _train_tokenizer(config, say)
        except OSError as error:
            raise ValueError(f"data.dir={config.folder} could not be prepared: {error}") from None
    return {name: prepare(source, say) for name, source in config.sources.items()}


def _train_tokenizer(config: DataConfig, say: Callable[[str], None]) -> None:
    """Leave the blend's tokenizer in its folder, trained on each source by its weight, unless it is there.

    Two processes at once would write the same bytes: each its own file, renamed into place.
    """
    folder, settings = config.folder, config.settings()
    record = folder / _BLEND
    if record.exists():
        _refuse_other(record, settings)
        return
    folder.mkdir(parents=True, exist_ok=True)
    special = config.fim_tokens if any(source.fim_rate for source in config.sources.values()) else ()
    tokenizer = Tokenizer.train(_sample(config), config.vocab_size, special)
    say(f"trained a tokenizer for the blend in {folder}: byte-level BPE with {tokenizer.vocab_size} tokens")
    body = {"settings": settings, "tokenizer": tokenizer.digest}
    for name, data in ((TOKENIZER, tokenizer.text.encode()), (_BLEND, json.dumps(body, indent=1).encode())):
        aside = folder / f"{name}.{os.getpid()}"
        write_flushed(aside, data)
        aside.replace(folder / name)
    flush_folder(folder)


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
        if there.get(key) != value:
            raise ValueError(
                f"{record.parent} was prepared with data.{key}={there.get(key)}, not {value}: "
                f"name another data.dir, or remove {record.parent} to prepare it again"
            )
    if Tokenizer.load(record.parent / TOKENIZER).digest != digest:
        raise ValueError(f"{record.parent / TOKENIZER} was changed: remove {record.parent} to prepare it again")
