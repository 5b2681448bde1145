"""The folder of prepared tokens: who may write there, what may lie there, what is taken for whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from train.data.config import DATASETS, DataConfig
from train.data.meta import FILES, META, SPLITS, TOKENIZER, Meta
from train.data.prepare.contents import CONTENTS, STAMPS, changed_files
from train.data.prepare.encoder import fim_ids
from train.data.prepare.report import REPORT
from train.data.read.source import digest_of, num_bytes_of, open_source
from train.data.read.trouble import BAD
from train.data.tokenizer import Tokenizer
from train.files import aside, locked

PARTIAL, LOCK = "partial", ".lock"
# Settings that say where something lies.
_PLACES = ("source", "tokenizer")
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
    asked, there = config.settings(), meta.settings
    for key in asked:
        # Where it lies does not matter, only what it holds, which is compared below.
        if there.get(key) != asked[key] and not (key in _PLACES and asked[key] and there.get(key)):
            raise ValueError(f"{folder} was prepared with data.{key}={there.get(key)}, not {asked[key]}: {remedy}")
    if config.tokenizer is not None:
        tokenizer = given_tokenizer(config)
        if tokenizer is not None and tokenizer.digest != meta.tokenizer_digest:
            raise ValueError(f"{folder} was prepared with another text of data.tokenizer={config.tokenizer}: {remedy}")
    _check_refused(config, folder, meta, remedy)
    meta.check_contents(folder)
    _check_source(config, folder, meta, say)
    return meta


def _check_source(config: DataConfig, folder: Path, meta: Meta, say: Callable[[str], None]) -> None:
    """ValueError unless the source holds what was prepared, wherever it lies now; what was asked is said."""
    asked, there = config.settings()["source"], meta.settings["source"]
    remedy = f"name another data.dir, or remove {folder} to prepare it again"
    is_named = config.source is not None and config.source.startswith(DATASETS)
    is_gone = config.source is not None and not is_named and not Path(config.source).exists()
    if asked != there and (is_named or is_gone or config.source is None or str(there).startswith(DATASETS)):
        raise ValueError(f"{folder} was prepared with data.source={there}, not {asked}: {remedy}")
    if is_gone:
        say(f"{folder} is prepared and whole; its source {config.source} is no longer there, the tokens are used")
        return
    if is_named:
        say(f"{folder} is prepared already and whole: {config.source} was not asked again")
        return
    source = open_source(config)
    if digest_of(source) != meta.source_digest:
        raise ValueError(
            f"{folder} was prepared from {meta.source_num_files} files with {meta.source_num_bytes} bytes"
            f"{f' in {there}' if there != asked else ''}, and {source.said} now holds {len(source.files)} with "
            f"{num_bytes_of(source)}: its names or sizes changed; {remedy}"
        )
    if CONTENTS not in meta.files:
        if asked != there:
            raise ValueError(f"{folder} was prepared with data.source={there}, not {asked}: {remedy}")
        say(f"{folder} is prepared already, by an earlier version: of its source only names and sizes were compared")
        return
    if changed := changed_files(folder, source):
        more = f" and {len(changed) - 1} other files" if len(changed) > 1 else ""
        raise ValueError(
            f"{folder} was prepared from other contents of {changed[0]}{more} in {source.said}, of the same size: "
            f"{remedy}"
        )
    moved = f", of the same contents as {there} before" if there != asked else ""
    say(f"{folder} is prepared already and whole{moved}: nothing to do")


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
    ours = {PARTIAL, LOCK, READY, TOKENIZER, FILES, REPORT, META, CONTENTS, STAMPS}
    ours |= {aside(folder / name).name for name in (READY, STAMPS)}
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
