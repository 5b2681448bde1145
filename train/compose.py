"""The only door to Hydra: settings on the command line + the tree in `configs/` -> one checked RunConfig."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import RunConfig
from train.settings import CONFIGS, unlocked

T = TypeVar("T")


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


def text(config: RunConfig) -> str:
    """The resolved config as YAML; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


@dataclass(frozen=True)
class Swept:
    """A setting that varies in a sweep, and what it may be: one of `choices`, or a number from `low` to `high`.

    Attributes:
        choices: values as they stand on a command line; empty for an interval.
        is_range: the choices are numbers in even steps.
        is_log: a number of the interval is drawn by its logarithm.
        is_int: and is whole.
    """

    key: str
    choices: tuple[str, ...] = ()
    is_range: bool = False
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_int: bool = False

    @property
    def ends(self) -> tuple[str, str]:
        """The first and the last of its values."""
        if self.choices:
            return self.choices[0], self.choices[-1]
        return (str(int(self.low)), str(int(self.high))) if self.is_int else (repr(self.low), repr(self.high))


def space(overrides: Iterable[str]) -> tuple[list[str], list[Swept]]:
    """(settings that all jobs share, settings that vary), in Hydra's own sweep grammar: `a=1,2`, `a=choice(x,y)`,
    `a=range(0,4)`, `a=interval(0,1)`, `a=int(interval(1,9))`, and `tag(log, ...)` around an interval.

    Raises ValueError for what cannot be read, for a range without a value, and for an interval that is none.
    """
    settings = list(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(settings)
    except HydraException as error:
        raise ValueError(_sentence(error, settings)) from None
    fixed = [str(item.input_line) for item in parsed if not item.is_sweep_override()]
    return fixed, [_swept(item) for item in parsed if item.is_sweep_override()]


def _swept(item: Override) -> Swept:
    value, key = item.value(), item.get_key_element()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        is_log, is_int = "log" in value.tags, isinstance(value.start, int)
        if not (math.isfinite(value.start) and math.isfinite(value.end) and value.start < value.end):
            raise ValueError(f"{item.input_line} is no interval: its first number must be below its second")
        if is_log and value.start <= 0:
            raise ValueError(f"{item.input_line} has no logarithm at its lower end: it must be above 0")
        return Swept(key, low=value.start, high=value.end, is_log=is_log, is_int=is_int)
    if isinstance(value, Glob):
        raise ValueError(f"{item.input_line}: glob is not known here; list the choices, as in {key}=a,b")
    choices = tuple(item.sweep_string_iterator())
    if not choices:
        raise ValueError(f"{item.input_line} is an empty range: the grid would have no job")
    return Swept(key, choices, is_range=isinstance(value, RangeSweep) and not value.shuffle)


def _schema() -> DictConfig:
    """RunConfig's keys and types, to be filled."""
    return unlocked(OmegaConf.structured(RunConfig))


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
