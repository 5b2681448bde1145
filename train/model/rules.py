"""How sizes of a model are checked: in sentences that name a key, its value and the rule. Needs no torch."""

from __future__ import annotations

from typing import Any


def require(holds: bool, sentence: str) -> None:
    """ValueError of this sentence unless the rule holds."""
    if not holds:
        raise ValueError(sentence)


def shown(value: Any) -> str:
    """A value as a config file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def setting(sizes: object, key: str) -> str:
    """The attribute `key` of some sizes as a setting of the model: `model.key=value`."""
    return f"model.{key}={shown(getattr(sizes, key))}"
