"""How a setting of the recipe is refused."""

from __future__ import annotations


def refuse(broken: bool, sentence: str) -> None:
    """ValueError with this sentence where a rule is broken."""
    if broken:
        raise ValueError(sentence)


def check_positive(**values: int | None) -> None:
    """ValueError for the first value below 1; a name's `__` is a dot of the key. None is a value that is not set."""
    for name, value in values.items():
        key = name.replace("__", ".")
        refuse(value is not None and value < 1, f"{key}={value} is below 1")
