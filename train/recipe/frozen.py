"""`train.freeze`: parameters that a run leaves as they are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

MAX_HINTS = 3


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """The parameters that the patterns of `train.freeze` match, of all of the model's.

    Raises ValueError for a pattern that matches nothing, with the names most like it, and where nothing
    is left to train.
    """
    if not patterns:
        return frozenset()
    known = list(dict.fromkeys(names))
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in known if fnmatchcase(name, pattern)}
        if not matched:
            near = difflib.get_close_matches(pattern, known, n=MAX_HINTS, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"names are such as {', '.join(known[:MAX_HINTS])}"
            raise ValueError(f"train.freeze has {pattern}, which matches no parameter of the model; {hint}")
        found |= matched
    if len(found) == len(known):
        raise ValueError(f"train.freeze={list(patterns)} freezes every parameter: nothing would be trained")
    return frozenset(found)
