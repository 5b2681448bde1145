"""What can be set, as text for people: `--help` on a terminal, and the tables of docs/."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from train import compose
from train.config import RunConfig
from train.settings import CONFIGS, MISSING, Setting, as_section, defaults, flat, settings_of, summary

HELP = ("--help", "-h")
WIDTH = 100
# Where the help of a key begins.
COLUMN = 50


OPTIONS = {
    "-h, --help": "this text",
    "--config FILE": "begin from a run's resolved config.yaml instead of the defaults; keys override it",
    "--cfg job": "print the composed tree and end; --resolve fills in what follows from other keys",
}


def run_help(program: str) -> str:
    """Every way to describe a run to `program`: its options, groups and keys."""
    lines = [
        f"usage: {program} [key=value ...]",
        "",
        "A run is one tree of settings: the defaults below, a file of each group, single keys over both.",
        "",
        *(f"  {word:<16}{text}" for word, text in OPTIONS.items()),
        "",
        "The whole tree, checked and resolved:  python -m launch config key=value ...",
        "Every key at length:                   docs/config.md",
        "",
        "Groups: name=FILE takes configs/name/FILE.yaml; an experiment sets keys of many sections.",
        *_groups(),
    ]
    return "\n".join([*lines, *keys_help(RunConfig)])


def keys_help(kind: type, prefix: str = "") -> Iterator[str]:
    """The keys of a dataclass of settings, section by section, with type, default and one sentence each."""
    values = default_values(kind, prefix)
    for name, found in sections(kind, prefix):
        yield ""
        yield textwrap.shorten(f"{name}: {summary(found)}" if name else summary(found), WIDTH)
        for setting in settings_of(found, f"{name}." if name else ""):
            yield from _key_lines(setting, values)


def sections(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(name, dataclass) of the sections of a dataclass of settings: itself where it has plain keys of its own."""
    found = {name: as_section(hint) for name, hint in typing.get_type_hints(kind).items()}
    if None in found.values():
        yield prefix.rstrip("."), kind
        return
    for name, inner in found.items():
        assert inner is not None
        yield f"{prefix}{name}", inner


def run_tables() -> dict[str, str]:
    """The table in Markdown of each section of a run's config, by name."""
    values = default_values(RunConfig)
    return {name: table(kind, f"{name}.", values) for name, kind in sections(RunConfig)}


def table(kind: type, prefix: str = "", values: Mapping[str, Any] | None = None) -> str:
    """The keys of a dataclass of settings as a table in Markdown: key, type, default, meaning.

    values: defaults by key; None: the dataclass's own.
    """
    values = default_values(kind, prefix) if values is None else values
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for setting in settings_of(kind, prefix):
        shown = _shown_default(setting, values)
        default = f" `{shown}` " if shown else " "
        lines.append(f"| `{setting.key}` | {setting.type} |{default}| {_markdown(setting.text.rstrip('.'))} |")
    return "\n".join(lines)


def default_values(kind: type, prefix: str = "") -> dict[str, Any]:
    """Default by key. A run's keys without one have that of `python -m train` without a word: a small model's sizes."""
    own = dict(flat(defaults(kind), prefix))
    if kind is not RunConfig:
        return own
    composed = dict(flat(dataclasses.asdict(compose.compose([]))))
    return {key: composed[key] if key.startswith("model.") else value for key, value in own.items()}


def flow(value: Any) -> str:
    """A plain value as a word on a command line or in a YAML file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    return str(value)


def _groups() -> Iterator[str]:
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        files = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        yield from textwrap.wrap(files, WIDTH, initial_indent=f"  {folder.name:<14}", subsequent_indent=" " * 16)


def _key_lines(setting: Setting, values: Mapping[str, Any]) -> Iterator[str]:
    shown = _shown_default(setting, values)
    left = f"  {setting.key}  {setting.type}" + (f" = {shown}" if shown else "")
    first, *more = textwrap.wrap(_plain(setting.help), WIDTH - COLUMN, break_on_hyphens=False) or [""]
    if len(left) < COLUMN:
        yield f"{left:<{COLUMN}}{first}"
    else:
        yield from textwrap.wrap(left, WIDTH, subsequent_indent=" " * 6, break_long_words=False)
        yield " " * COLUMN + first
    yield from (" " * COLUMN + line for line in more)


def _shown_default(setting: Setting, values: Mapping[str, Any]) -> str:
    """Empty for what has none: items of lists, and what must be given."""
    if "[]" in setting.key or values.get(setting.key, MISSING) == MISSING:
        return ""
    return flow(values[setting.key])


def _plain(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text.replace("`", ""))


def _markdown(text: str) -> str:
    """Python's None as YAML's null, other pages as links, bars as part of a cell."""
    text = re.sub(r"`?\bNone\b`?", "`null`", text)
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text).replace("|", "\\|")
