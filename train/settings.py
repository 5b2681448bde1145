"""A section of settings: a frozen dataclass, filled from plain values with types checked and typos answered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def section(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """One room's config of plain values, types checked; ValueError names the key, as part of section `name`."""
    tree = unlocked(OmegaConf.structured(kind))
    known = [str(key) for key in tree]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {name}.{near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{name}.{key} is not a key of {name}; {hint}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(tree, dict(values)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}.{getattr(error, 'full_key', None)}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, kind)
    return config


def group(kind: type[T], name: str, choice: str) -> T:
    """What `configs/<name>/<choice>.yaml` says by itself, as `name=choice` sets it."""
    tree = OmegaConf.load(CONFIGS / name / f"{choice}.yaml")
    assert isinstance(tree, DictConfig)
    return section(kind, {str(key): value for key, value in tree.items()}, name)


def section_of(kind: type[T], settings: Iterable[str], name: str) -> T:
    """The same of `name.key=value` settings."""
    values = OmegaConf.from_dotlist([setting.removeprefix(f"{name}.") for setting in settings])
    return section(kind, {str(key): value for key, value in values.items()}, name)


def unlocked(node: DictConfig) -> DictConfig:
    """The same, writable: frozen dataclasses come out read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            unlocked(child)
    return node


def dotted(text: str) -> dict[str, Any]:
    """Dotted key to value of a YAML (or JSON) mapping, in its order; empty for any other text."""

    def walk(node: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return dict(walk(tree, "")) if isinstance(tree, Mapping) else {}
