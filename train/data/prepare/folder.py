"""The folder of prepared tokens: who may write there, what may lie there, what is taken for whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from train.data.config import DATASETS, DataConfig
from train.data.meta import FILES, META, SPLITS, TOKENIZER, Meta
from train.data.prepare.encoder import fim_ids
from train.data.prepare.report import REPORT
from train.data.read.source import digest_of, num_bytes_of, open_source
from train.data.read.trouble import BAD
from train.data.tokenizer import Tokenizer
from train.files import aside, locked

PARTIAL, LOCK = "partial", ".lock"
READY = "meta.ready.json"  # all is written and described, and being moved into place


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of `data.tokenizer`; None when one is to be trained. ValueError when it cannot be used."""
    if config.tokenizer is None:
        if config.end_of_document is not None:
            raise ValueError(
                f"data.end_of_document={config.end_of_document} names a token of a given tokenizer, "
                "and data.tokenizer is null"
            )
        return None
    tokenizer = Tokenizer.load(config.tokenizer, config.end_of_document)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"data.vocab_size={config.vocab_size} is below the {tokenizer.vocab_size} tokens "
            f"of data.tokenizer={config.tokenizer}"
        )
    if config.fim_rate:
        fim_ids(tokenizer, config.fim_tokens)
    return tokenizer


def check_prepared(config: DataConfig, folder: Path, say: Callable[[str], None]) -> Meta:
    """Prepared data that is there already: whole, unchanged, and what `config` asks for. ValueError otherwise."""
    meta = Meta.load(folder)
    remedy = f"name another data.dir, or remove {folder} to prepare it again"
    for key, asked in config.settings().items():
        if meta.settings.get(key) != asked:
            raise ValueError(f"{folder} was prepared with data.{key}={meta.settings.get(key)}, not {asked}: {remedy}")
    if config.tokenizer is not None:
        tokenizer = given_tokenizer(config)
        if tokenizer is not None and tokenizer.digest != meta.tokenizer_digest:
            raise ValueError(f"{folder} was prepared with another text of data.tokenizer={config.tokenizer}: {remedy}")
    _check_refused(config, folder, meta, remedy)
    meta.check_contents(folder)
    if config.source is not None and not config.source.startswith(DATASETS) and not Path(config.source).exists():
        say(f"{folder} is prepared and whole; its source {config.source} is no longer there, the tokens are used")
        return meta
    if config.source is not None and config.source.startswith(DATASETS):
        say(f"{folder} is prepared already and whole: {config.source} was not asked again")
        return meta
    source = open_source(config)
    if digest_of(source) != meta.source_digest:
        raise ValueError(
            f"{folder} was prepared from {meta.source_num_files} files with {meta.source_num_bytes} bytes, and "
            f"{source.said} now holds {len(source.files)} with {num_bytes_of(source)}: its names or sizes changed; "
            f"{remedy}"
        )
    say(f"{folder} is prepared already and whole: nothing to do")
    return meta


def _check_refused(config: DataConfig, folder: Path, meta: Meta, remedy: str) -> None:
    """ValueError when `config` refuses what was passed over here."""
    for reason in BAD:
        skipped = meta.skipped[reason]
        if skipped.count and config.on_bad_document == "refuse":
            raise ValueError(
                f"{folder} was prepared with data.on_bad_document=skip and passed over {skipped.count} documents or "
                f"files ({BAD[reason]}: {skipped.examples[0]}): {remedy}"
            )


def alone_in(folder: Path, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Hold the folder's lock, waiting for another process that prepares there; a killed holder frees it."""
    return locked(folder / LOCK, f"another process is preparing {folder}: waiting for it", wait=say)


def refuse_strangers(folder: Path) -> None:
    """ValueError when the folder holds anything that no call of `prepare` has left."""
    ours = {PARTIAL, LOCK, READY, TOKENIZER, FILES, REPORT, META, aside(folder / READY).name}
    for path in sorted(folder.iterdir()):
        shard = path.suffix == ".bin" and path.name.startswith(tuple(f"{split}-" for split in SPLITS))
        if path.name not in ours and not shard:
            raise ValueError(f"data.dir={folder} holds {path.name}, which is no prepared data: name an empty folder")


def clear(folder: Path, keep: str = LOCK) -> None:
    """Remove what a killed call has left, but for the lock and `keep`."""
    for path in folder.iterdir():
        if path.name in (LOCK, keep):
            continue
        if path.name == PARTIAL:
            shutil.rmtree(path)
        else:
            path.unlink()
