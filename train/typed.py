"""Words on a command line whose key holds text: what was typed is the text, whatever Hydra's grammar makes of it.

Hydra reads `run.name=1.10` as a number and refuses `data.source=runs/a=1,b=2`. Where a key's type is text there is
nothing to guess, so such values are handed to Hydra in quotes. What its grammar has for text stays: quotes,
`${interpolations}`, the choices of a sweep, `null` where a key may be null.
"""

from __future__ import annotations

import os
import re
import shlex
import types
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from train.config import RunConfig
from train.settings import leaves

_WORD = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)


def as_typed(words: Iterable[str], sweeps: bool = False) -> list[str]:
    """The words in Hydra's grammar, the text of every key that holds text being what was typed.

    A leading `~/` is the home folder, as a shell has it where a word begins.

    sweeps: whether several values may be meant, as in `run.name=a,b`. Where they may not, that is one text if a file of
        this name is there; else it is left as it is, and refused by whoever reads it.
    """
    return [_word(word, sweeps) for word in words]


def quoted(key: str, text: str) -> str:
    """The word for a shell's command line that sets `key` to this text in any of these commands."""
    return shlex.quote(f"{key}={_in_quotes(text)}")


def bare(key: str, value: str) -> str:
    """A choice of a sweep as people write it: without quotes where `key=` before it is read as the same."""
    found = _parsed(value)
    text = found.value() if found is not None else None
    if key not in _kinds()[0] or not isinstance(text, str):
        return value
    again = _parsed(_value(text, key in _nullable(), False))
    same = again is not None and not again.is_sweep_override() and again.value() == text
    return text if same else value


def holds_text(key: str) -> bool:
    """Whether a key's value is text, and nothing but text or null."""
    return key in _kinds()[0]


def _word(word: str, sweeps: bool) -> str:
    match = _WORD.fullmatch(word)
    if not match:
        return word
    (plus, key, value), (texts, lists) = match.groups(), _kinds()
    if key in texts:
        return f"{plus}{key}={_value(_at_home(value), key in _nullable(), sweeps)}"
    if key in lists and re.fullmatch(r"\[.*\]", value.strip(), re.DOTALL) and "${" not in value:
        items = [item.strip() for item in _split(value.strip()[1:-1])]
        return f"{plus}{key}=[{','.join(_value(_at_home(item), False, False) for item in items)}]"
    return word


def _value(text: str, may_be_null: bool, sweeps: bool) -> str:
    """A value that Hydra reads as just this text, or as the choices of a sweep."""
    found = _parsed(text)
    if found is None:
        return _in_quotes(text)
    if found.is_sweep_override():
        if not sweeps and not os.path.exists(text):
            return text
        if not sweeps:
            return _in_quotes(text)
        choices = found.value()
        plain = isinstance(choices, ChoiceSweep) and choices.simple_form
        return ",".join(_value(item, may_be_null, False) for item in _split(text)) if plain else text
    value = found.value()
    if isinstance(value, str) or (value is None and may_be_null):
        return text
    return _in_quotes(text)


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"x={text}")
    except HydraException:
        return None


def _in_quotes(text: str) -> str:
    # Double quotes are easier to read within the single ones of a shell.
    return QuotedString(text=text, quote=Quote.single if '"' in text else Quote.double).with_quotes()


def _at_home(text: str) -> str:
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _split(text: str) -> list[str]:
    """The items of a list without its brackets: commas within quotes or brackets do not part them."""
    items, start, depth, quote = [], 0, 0, ""
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote and text[place - 1] != "\\" else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            items.append(text[start:place])
            start = place + 1
    return [*items, text[start:]] if text.strip() else []


@cache
def _kinds() -> tuple[frozenset[str], frozenset[str]]:
    """(keys that hold text, keys that hold a list of texts)."""
    found = dict(leaves(RunConfig))
    texts = frozenset(key for key, hint in found.items() if set(_options(hint)) <= {str, type(None)})
    lists = frozenset(
        key for key, hint in found.items() for each in _options(hint) if typing.get_args(each) in ((str, ...), (str,))
    )
    return texts, lists


@cache
def _nullable() -> frozenset[str]:
    return frozenset(key for key, hint in leaves(RunConfig) if type(None) in _options(hint))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
