"""`key=value` words of verbs that take a few keys of their own instead of a run's config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence


def read_settings(verb: str, words: Sequence[str], defaults: Mapping[str, str | None]) -> dict[str, str]:
    """Key to text. A default of None marks a key that must be given, "" one that the result lacks where it is not.

    Raises ValueError for a word that is no `key=value`, an unknown key, one given twice, or a missing one.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word} cannot be read as key=value")
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": it takes {', '.join(defaults)}"
            raise ValueError(f"{key} is not a key of {verb}{hint}")
        if not value:
            raise ValueError(f"{key} is empty: it needs a value, {key}=...")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given[key] = value
    if missing := [key for key, default in defaults.items() if default is None and key not in given]:
        raise ValueError(f"{missing[0]}=... is missing: {verb} needs {', '.join(missing)}")
    return {key: default for key, default in defaults.items() if default} | given
