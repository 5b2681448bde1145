"""Settings: frozen dataclasses, what their docstrings say of each key, and plain values read into them.

A dataclass of settings is the one place of its keys: the annotation is the type, the field's default the default, and
the entry in the docstring's `Attributes:` section the help, whose first sentence is the short one. `--help`,
docs/config.md, the hints for typos and the tree that Hydra composes are all made from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import keyword
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

# Beside the packages: in a checkout, and where a wheel is installed.
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# What Hydra and OmegaConf write for a value that must be given.
MISSING = "???"
# Names that are offered for a word that is right but for its section.
MAX_HINTS = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key that can be set.

    Attributes:
        key: as it is typed; `list[].name` is a field of a list's items.
        type: as people write it: "int or null".
        default: plain value, MISSING where one must be given; None for fields of a list's items.
        text: what it means, from the docstring.
    """

    key: str
    type: str
    default: Any
    text: str

    @property
    def help(self) -> str:
        """The first sentence of the text."""
        return re.split(r"\. +(?=[A-Z`])", self.text)[0].rstrip(".")


def settings_of(kind: type, prefix: str = "") -> Iterator[Setting]:
    """Every key of a dataclass of settings, those of its nested sections and of its lists' items included, in order."""
    hints, texts = typing.get_type_hints(kind), attributes(kind)
    for field in dataclasses.fields(kind):
        found, key = hints[field.name], f"{prefix}{_key(field.name)}"
        if inner := as_section(found):
            yield from settings_of(inner, f"{key}.")
            continue
        yield Setting(key, type_name(found), _default(field), texts.get(field.name, ""))
        for item in filter(None, map(as_section, typing.get_args(found))):
            yield from (dataclasses.replace(each, default=None) for each in settings_of(item, f"{key}[]."))


def as_section(hint: Any) -> type | None:
    """The dataclass that an annotation is; None for one that is none."""
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def attributes(kind: type) -> dict[str, str]:
    """What the `Attributes:` section of a class's docstring says of each attribute, on one line; empty without it."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.fullmatch(r" {4}(\w+): (.*)", line)
        if entry:
            name, found[entry[1]] = entry[1], entry[2]
        elif line.strip() and name:
            found[name] += f" {line.strip()}"
    return found


def summary(kind: type) -> str:
    """The first sentence of a class's docstring, without the section's name that it opens with."""
    first = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return re.sub(r"^`\w+`: ", "", first).split(". ")[0].rstrip(".")


def type_name(hint: Any) -> str:
    """A type as people write it: "int", "str or null", "list"."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in options and str in options:  # a word, with true and false as other spellings of two of them
        options = (str,)
    names = ["null" if option is type(None) else (typing.get_origin(option) or option).__name__ for option in options]
    return " or ".join({"tuple": "list", "Path": "str"}.get(name, name) for name in names)


def defaults(kind: type) -> dict[str, Any]:
    """Plain default values of a dataclass of settings and its nested sections; MISSING where one must be given."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: defaults(inner) if (inner := as_section(hints[field.name])) else _default(field)
        for field in dataclasses.fields(kind)
    }


def section(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """One room's config of plain values, types checked; ValueError names the key, as part of section `name`."""
    tree = unlocked(OmegaConf.structured(kind))
    known = [f"{name}.{key!s}" for key in tree]
    for key in values:
        if f"{name}.{key}" not in known:
            raise ValueError(f"{name}.{key} is not a key of {name}{hint(f'{name}.{key}', known)}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(tree, dict(values)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}.{getattr(error, 'full_key', None)}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, kind)
    return config


def group(kind: type[T], name: str, choice: str) -> T:
    """What `configs/<name>/<choice>.yaml` says by itself, as `name=choice` sets it."""
    return read_file(kind, CONFIGS / name / f"{choice}.yaml", name)


def read_file(kind: type[T], path: Path, name: str) -> T:
    """A YAML file as one dataclass of settings, types checked.

    ValueError, by the key as part of section `name`, for a file that is no YAML mapping, for a key that is missing or
    unknown, and for a value of another type.
    """
    try:
        tree = OmegaConf.load(path)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} holds no settings: it must be keys with values")
    for key, text in _missing(kind, OmegaConf.to_container(tree), name):
        raise ValueError(f"{path}: {key} is missing: {text}")
    return section(kind, {str(key): value for key, value in tree.items()}, name)


def read(kind: type[T], words: Sequence[str], verb: str, prefix: str = "") -> T:
    """A verb's own settings, of the words that follow it. A key of a list may be given several times.

    prefix: what stands before every key, as in "sweep.".

    Raises ValueError for a word that is no `key=value`, an unknown key, one given twice, an empty or missing one, a
    value of another type, and what the settings' own `check` refuses.
    """
    hints = dict(leaves(kind, prefix))
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word} cannot be read as key=value")
        if key not in hints:
            raise ValueError(f"{key} is not a key of {verb}{hint(key, hints)}")
        if not text:
            raise ValueError(f"{key} is empty: it needs a value, {key}=...")
        if typing.get_origin(hints[key]) is list:
            given.setdefault(key, []).append(_value(key, text, typing.get_args(hints[key])[0]))
        elif key in given:
            raise ValueError(f"{key} is given twice")
        else:
            given[key] = _value(key, text, hints[key])
    needed = [each.key for each in settings_of(kind, prefix) if each.default == MISSING]
    if missing := [key for key in needed if key not in given]:
        raise ValueError(f"{missing[0]}=... is missing: {verb} needs {', '.join(needed)}")
    settings = _build(kind, given, prefix)
    if check := getattr(settings, "check", None):
        check()
    return settings


def hint(key: str, known: Collection[str]) -> str:
    """The end of a sentence that refuses a key: which ones may be meant, or which ones there are."""
    if found := nearest(key, known):
        *others, last = found
        return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"
    return f": it takes {', '.join(known)}"


def nearest(key: str, known: Collection[str]) -> list[str]:
    """The known keys that may be meant: those with the same last word in another section, else the one spelled most
    like it. Empty if none is near."""
    word, by_word = _last(key), {_last(each): each for each in known}
    if same := [each for each in known if _last(each) == word]:
        return [each for each in same if "[]" not in each][:MAX_HINTS] or same[:MAX_HINTS]
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return near
    return [by_word[each] for each in difflib.get_close_matches(word, by_word, n=1, cutoff=0.75)]


def unlocked(node: DictConfig) -> DictConfig:
    """The node itself, made writable with all below it: frozen dataclasses come out read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            unlocked(child)
    return node


def dotted(text: str) -> dict[str, Any]:
    """Dotted key to value of a YAML (or JSON) mapping, in its order; empty for any other text."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return dict(flat(tree)) if isinstance(tree, Mapping) else {}


def flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings, in their order; an empty one is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _missing(kind: type, tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, help) of what a plain tree lacks of a dataclass of settings, in its sections and in its lists' items."""
    hints, texts = typing.get_type_hints(kind), attributes(kind)
    for field in dataclasses.fields(kind):
        at, inner = f"{key}.{_key(field.name)}", as_section(hints[field.name])
        given = tree.get(_key(field.name)) if isinstance(tree, Mapping) else None
        if inner and _default(field) == MISSING:
            yield from _missing(inner, given, at)
        elif given is None and _default(field) == MISSING:
            yield at, texts.get(field.name, "")
        for item in filter(None, map(as_section, typing.get_args(hints[field.name]))):
            for number, each in enumerate(given if isinstance(given, list) else ()):
                yield from _missing(item, each, f"{at}[{number}]")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _key(name: str) -> str:
    """A field's key: the underscore that keeps a name apart from Python's own words is not typed."""
    return name[:-1] if name.endswith("_") and keyword.iskeyword(name[:-1]) else name


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return _plain(field.default)
    return MISSING if field.default_factory is dataclasses.MISSING else _plain(field.default_factory())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, type) of every key that a word may set."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = f"{prefix}{_key(field.name)}"
        if inner := as_section(hints[field.name]):
            yield from leaves(inner, f"{key}.")
        else:
            yield key, hints[field.name]


def _value(key: str, text: str, hint: Any) -> Any:
    """A word as a value of a type; ValueError for what is none."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text == "null":
        return None
    if bool in options:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text} must be true or false")
        return text.lower() == "true"
    try:
        if not {int, float}.isdisjoint(options):
            value: Any = _whole(text) if int in options else float(text)
            check_fits(key, value)
            return value
    except _TooLargeError:
        raise
    except (ValueError, OverflowError):
        raise ValueError(f"{key}={text} must be a {'whole ' if int in options else ''}number") from None
    return Path(text).expanduser() if Path in options else text


class _TooLargeError(ValueError):
    """A whole number does not fit into 64 bits."""


def check_fits(key: str, value: Any) -> None:
    """ValueError for a whole number, alone or in lists, that 64 bits do not hold: torch and file formats count so."""
    for each in value if isinstance(value, list | tuple) else ():
        check_fits(key, each)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _TooLargeError(f"{key}={value} is too large: a whole number has at most 64 bits here")


def _whole(text: str) -> int:
    """ValueError for a text that is no whole number; 5e9 is one."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number != int(number):
            raise
        return int(number)


def _build(kind: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = f"{prefix}{_key(field.name)}"
        if inner := as_section(hints[field.name]):
            values[field.name] = _build(inner, given, f"{key}.")
        elif key in given:
            values[field.name] = given[key]
    return kind(**values)
