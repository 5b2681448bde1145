"""The only door to Hydra: settings on the command line + the tree in `configs/` -> one checked RunConfig."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import RunConfig

T = TypeVar("T")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(overrides: Iterable[str]) -> RunConfig:
    """The run that `configs/run.yaml` and these `key=value` settings describe, types and every rule checked.

    Writes nothing anywhere, so all ranks may call it at once.

    Raises ValueError, in one sentence, for an unknown key (with the nearest known one), a value of another type, an
    unknown file of a group, or a rule that does not hold.
    """
    return checked(raw(overrides))


def raw(overrides: Iterable[str]) -> DictConfig:
    """The composed tree before types and rules are checked; ValueError for settings that Hydra cannot place."""
    settings = list(overrides)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return hydra.compose("run", settings)
        except HydraException as error:
            raise ValueError(_sentence(error, settings)) from None


def checked(tree: DictConfig) -> RunConfig:
    """A RunConfig of this tree; ValueError for a missing or unknown key, a wrong type or a broken rule."""
    try:
        typed = OmegaConf.merge(_schema(), tree)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        first = str(error).splitlines()[0]
        raise ValueError(f"{key}: {first}" if key and key not in first else first) from None
    assert isinstance(config, RunConfig)
    config.check()
    return config


def load(path: Path) -> RunConfig:
    """The checked RunConfig of a resolved YAML file, as `save` writes it."""
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    return checked(tree)


def section(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """One room's config of plain values, types checked; ValueError names the key, as part of section `name`."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_unlocked(OmegaConf.structured(kind)), dict(values)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{name}.{key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, kind)
    return config


def text(config: RunConfig) -> str:
    """The resolved config as YAML; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def sweep(overrides: Iterable[str]) -> list[list[str]]:
    """Every job of a grid: `a=1,2 b=3 c=range(0,2)` gives the settings of four jobs, in Hydra's own sweep grammar."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ValueError(_sentence(error, list(overrides))) from None
    choices = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [str(item.input_line)]
        for item in parsed
    ]
    return [list(job) for job in itertools.product(*choices)]


def _schema() -> DictConfig:
    """RunConfig's keys and types, to be filled."""
    return _unlocked(OmegaConf.structured(RunConfig))


def _unlocked(node: DictConfig) -> DictConfig:
    """The same, writable: frozen dataclasses come out read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _unlocked(child)
    return node


def _sentence(error: HydraException, settings: list[str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for setting in settings:
        key, _, value = setting.lstrip("+~").partition("=")
        if not _is_readable(setting):
            return f"{setting} cannot be read as key=value: {lines[0]}"
        files = sorted(path.stem for path in (CONFIGS / key).glob("*.yaml")) if key in _groups() else []
        if files and value not in (*files, "null"):
            return f"{key}={value} is not one of {', '.join(files)}"
        near = difflib.get_close_matches(key, _keys(), n=1, cutoff=0.6)
        if any(key in line for line in lines) and key not in _keys():
            return f"{key} is not a key of the config" + (f"; did you mean {near[0]}?" if near else "")
    return " ".join(lines[:12])


def _is_readable(setting: str) -> bool:
    try:
        OverridesParser.create().parse_override(setting)
    except HydraException:
        return False
    return True


def _groups() -> list[str]:
    return [path.name for path in CONFIGS.iterdir() if path.is_dir()]


def _keys() -> list[str]:
    def walk(node: DictConfig, prefix: str) -> Iterable[str]:
        for key in node:
            full = f"{prefix}{key!s}"
            yield full
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from walk(child, f"{full}.")

    return [*walk(_schema(), ""), *_groups()]
