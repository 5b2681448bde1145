"""Sentences for settings that cannot be: unknown keys, files of groups and options, and what may have been meant."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from train.cli import foreign_keys
from train.config import RunConfig
from train.files import in_words
from train.settings import CONFIGS, Setting, as_section, hint, nearest, settings_of
from train.typed import holds_text, quoted

# Folders of `configs/` that a run has no part in: what a plan knows of machines.
OF_A_PLAN = ("cluster", "kernels")
# What other programs take with dashes, and this one by other means.
MULTIRUN = ("--multirun", "-m")


class Override(Protocol):
    """One `key=value` word as Hydra's grammar reads it."""

    key_or_group: str
    input_line: str | None

    def value(self) -> Any: ...
    def is_add(self) -> bool: ...
    def is_force_add(self) -> bool: ...
    def is_delete(self) -> bool: ...
    def is_sweep_override(self) -> bool: ...


def check(word: Override, file: Path | None) -> None:
    """ValueError for a word that names no key or group, a file that is not there, or several values.

    file: the resolved config that is changed, in which groups have no part.
    """
    key, line = word.key_or_group, word.input_line or word.key_or_group
    if word.is_sweep_override():
        text = f"; as one text, type {quoted(key, line.partition('=')[2])}" if holds_text(key) else ""
        raise ValueError(f"{line} has several values: sweeps are started by python -m launch local --multirun{text}")
    if key in groups() and (word.is_delete() or not isinstance(word.value(), dict)):
        if file is not None:
            raise ValueError(
                f"{line} chooses a file of configs/{key}, and --config {file} has its own {key}: set its keys"
            )
        if word.is_add() or word.is_force_add():
            raise ValueError(f"{line}: the group is there, so a file is chosen without a +: {line.lstrip('+')}")
        if not word.is_delete() and word.value() not in groups()[key]:
            raise ValueError(f"{line} {_no_file(key, str(word.value()))}")
        return
    dotted = _dotted(key)
    if not _is_known(dotted):
        raise ValueError(unknown(key, line))
    if _is_section(dotted):
        if word.is_delete() or not isinstance(word.value(), dict):
            raise ValueError(f"{line}: {_section_sentence(dotted)}")
    elif word.is_delete() and dotted in keys():
        raise ValueError(f"{line}: a key cannot be taken out of the config; set it, as in {key}=VALUE")
    elif word.is_add() and not word.is_force_add() and dotted in keys():
        raise ValueError(f"{line}: the key is there, so it is set without a +: {line.lstrip('+')}")


def _no_file(group: str, name: str) -> str:
    near = difflib.get_close_matches(name, groups()[group], n=1)
    meant = f"did you mean {near[0]}? There" if near else "there"
    return (
        f"names no file of configs/{group}: {meant} are {', '.join(groups()[group])}; a file of your own is named by "
        f"its path, {group}=PATH.yaml"
    )


def check_tree(tree: Mapping[str, Any]) -> None:
    """ValueError for the first key of a composed tree that is none, wherever it stands: in a file or in a list."""
    for key in _unknown_keys(tree, RunConfig, ""):
        raise ValueError(unknown(key))


def unknown(key: str, line: str = "") -> str:
    """The sentence that refuses a key: what it is called here, or which key may be meant."""
    value = line.partition("=")[2]
    ours, answer = foreign_keys.answer(key)
    if answer:
        return f"{answer}: {ours}={value}" if ours and _fits(keys()[ours], value) else answer
    section = key.partition(".")[0]
    known = [*keys()] if "." in key else [*keys(), *groups(), *_sections()]
    if not nearest(key, known):
        if section in _sections():
            return f"{key} is not a key of the config: {_section_sentence(section)}"
        return f"{key} is not a key of the config; its sections are {', '.join(_sections())}"
    return f"{key} is not a key of the config{hint(key, known)}"


def option(word: str, rest: Sequence[str]) -> str:
    """The sentence that refuses a word with dashes. `rest`: the words behind it; the first may be its value."""
    if word in MULTIRUN:
        return f"{word}: sweeps are started by python -m launch local --multirun"
    name, _, value = word.partition("=")
    if not value and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        value = rest[0]
    plain = name.lstrip("-").replace("-", "_")
    if _is_section(plain) and plain not in groups():
        return f"{word}: {_section_sentence(plain)}"
    meant = [plain] if _is_known(_dotted(plain)) or plain in groups() else nearest(plain, list(keys()))
    if foreign_keys.answer(name)[1]:
        return unknown(name, f"{name}={value}")
    if len(meant) == 1 and meant[0].rpartition(".")[2] == plain.rpartition(".")[2]:
        return f"{word}: settings are written without dashes, {meant[0]}={value or 'VALUE'}"
    if meant:
        return unknown(plain)
    return f"{word} is no option: there are --help, --config FILE and --cfg job; settings are written key=value"


def of_file(error: OSError, words: Iterable[str]) -> str:
    """What the system says of a file or folder, behind the `key=value` word that leads there, if one does."""
    for word in words:
        key, _, value = word.partition("=")
        if value and error.filename is not None and _leads_to(Path(value), Path(os.fsdecode(error.filename))):
            return f"{key}={value} cannot be used: {in_words(error)}"
    return f"a file or folder cannot be used: {in_words(error)}"


def _leads_to(named: Path, path: Path) -> bool:
    """Whether a path is the named one, lies in it or above it, or is the hidden neighbour in which it is written."""
    here, there = named.absolute(), path.absolute()
    is_beside = here.parent == there.parent and here.name in there.name
    return here == there or is_beside or here in there.parents or (there != Path("/") and there in here.parents)


def sentence(error: Exception) -> str:
    """What Hydra or OmegaConf says of a value, in one sentence that names the key."""
    cause = error.__cause__ if getattr(error.__cause__, "full_key", None) else error
    key = getattr(cause, "full_key", None)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if key and type(cause).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
        return unknown(str(key))
    if key:
        said = lines[0].rpartition(" raised while resolving interpolation: ")[2]
        if said != lines[0]:  # of a value that follows from something else, which the sentence names
            return said
        said = lines[0].replace("'None'", "null")
        whole = _places().get(getattr(cause, "object_type", None), "") + str(key)
        return said if whole in said else f"{whole}: {said}"
    return " ".join(lines[:12])


@cache
def keys() -> dict[str, Setting]:
    """Every key of a run's config."""
    return {setting.key: setting for setting in settings_of(RunConfig)}


def groups() -> dict[str, tuple[str, ...]]:
    """The groups of a run's files, and the names of their files."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir() and path.name not in OF_A_PLAN)
    return {path.name: tuple(sorted(file.stem for file in path.glob("*.yaml"))) for path in folders}


@cache
def _sections() -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in keys() if "[]" not in key))


def _section_sentence(section: str) -> str:
    inside = [key for key in keys() if key.startswith(f"{section}.")]
    return f"{section} is a section and no group of files; its keys are {', '.join(inside)}"


@cache
def _places() -> dict[Any, str]:
    """What stands before the keys of each dataclass whose objects are items of a list."""
    found: dict[Any, str] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, annotation in typing.get_type_hints(kind).items():
            found.update({item: f"{prefix}{name}[]." for item in typing.get_args(annotation) if as_section(item)})
            if inner := as_section(annotation):
                walk(inner, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def _is_section(dotted: str) -> bool:
    return dotted in _sections()


def _is_known(dotted: str) -> bool:
    """Whether this is a key, a section, or lies in a dictionary that may hold any key."""
    parts = dotted.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    is_entry = any(key in keys() and keys()[key].type.startswith("dict") for key in above)
    return dotted in keys() or _is_section(dotted) or is_entry


def _dotted(key: str) -> str:
    """A key with the numbers of list items as brackets."""
    found = ""
    for part in key.split("."):
        found += "[]" if part.isdigit() else f".{part}" if found else part
    return found


def _fits(setting: Setting, value: str) -> bool:
    """Whether a number is shown in the key's place: other values may be spelled otherwise here."""
    try:
        float(value)
    except ValueError:
        return False
    return setting.type.split(" or ")[0] in ("int", "float")


def _unknown_keys(tree: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name, value in tree.items():
        if name not in hints:
            yield f"{prefix}{name}"
            continue
        for inner in filter(None, map(as_section, (hints[name], *typing.get_args(hints[name])))):
            if isinstance(value, Mapping):
                yield from _unknown_keys(value, inner, f"{prefix}{name}.")
            for number, item in enumerate(value if isinstance(value, list) else ()):
                if isinstance(item, Mapping):
                    yield from _unknown_keys(item, inner, f"{prefix}{name}[{number}].")
