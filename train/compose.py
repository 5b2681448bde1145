"""The only door to Hydra: settings on the command line + the tree in `configs/` -> one checked RunConfig."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train import branch, follows
from train.cli import refusals
from train.config import RunConfig
from train.files import in_words
from train.own_files import placed
from train.settings import CONFIGS, check_fits, defaults, flat, unlocked
from train.typed import as_typed, bare

# What configs/run.yaml lays its own choices over: every key with its default.
ConfigStore.instance().store("settings", defaults(RunConfig))
follows.register()


@dataclass(frozen=True)
class Asked:
    """What the words behind a command ask of the composer.

    Attributes:
        settings: `key=value` words, in Hydra's grammar.
        file: a resolved config that they change; None: the tree in `configs/`.
        show: the composed tree is to be printed, as Hydra's `--cfg job` does.
        resolve: and what follows from other keys filled in.
    """

    settings: list[str]
    file: Path | None = None
    show: bool = False
    resolve: bool = False

    @staticmethod
    def of(words: Iterable[str]) -> Asked:
        """ValueError for an option that is not known, or lacks its word."""
        settings: list[str] = []
        options: dict[str, str] = {}
        rest = list(words)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if not word.startswith("-"):
                settings.append(word)
            elif word == "--resolve":
                options[word] = "true"
            elif name in ("--config", "--cfg", "-c"):
                if not equals and not rest:
                    raise ValueError(f"{name} needs {'FILE' if name == '--config' else 'job'} behind it")
                options["--cfg" if name == "-c" else name] = value if equals else rest.pop(0)
            else:
                raise ValueError(refusals.option(word, rest))
        if options.get("--cfg", "job") != "job":
            raise ValueError(f"--cfg {options['--cfg']}: only --cfg job can be shown, the run's own tree")
        file = Path(options["--config"]) if "--config" in options else None
        return Asked(settings, file, "--cfg" in options, "--resolve" in options)


def started(words: Sequence[str], start: Callable[[RunConfig], int]) -> int:
    """Start the run that the words describe, and return its exit code; with `--cfg job` print its tree instead."""
    asked = Asked.of(words)
    if not asked.show:
        return start(compose(words))
    try:
        print(OmegaConf.to_yaml(raw(words), resolve=asked.resolve), end="")
    except OmegaConfBaseException as error:  # of a value that follows from another one
        raise ValueError(refusals.sentence(error)) from None
    return 0


def show(words: Sequence[str]) -> int:
    """`python -m launch config`: print the checked and resolved tree, as a run's config.yaml has it."""

    def start(config: RunConfig) -> int:
        print(text(config), end="")
        return 0

    return started(words, start)


def compose(words: Iterable[str]) -> RunConfig:
    """The run that `configs/run.yaml` and these `key=value` settings describe, types and every rule checked.

    `--config FILE` among the words takes a resolved config for the tree in `configs/`. Writes nothing anywhere, so all
    ranks may call it at once.

    Raises ValueError, in one sentence, for an unknown key (with the nearest known one), a value of another type, an
    unknown file of a group, or a rule that does not hold.
    """
    return checked(raw(words))


def raw(words: Iterable[str]) -> DictConfig:
    """The composed tree before types and rules are checked; ValueError for settings that Hydra cannot place."""
    asked = Asked.of(words)
    # Files of one's own are Hydra's from here on; with a resolved config there are no groups to choose of.
    with placed(asked.settings, () if asked.file else refusals.groups()) as (others, own):
        return _composed(as_typed(others), own, asked.file)


def _composed(settings: list[str], own: list[str], file: Path | None) -> DictConfig:
    overrides = _parsed(settings)
    for override in overrides:
        refusals.check(override, file)
    try:
        if file is not None:
            return _changed(_tree(file), overrides)
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose("run", [*settings, *own])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(refusals.sentence(error)) from None
    except OSError as error:
        raise ValueError(f"the files of settings cannot be read: {in_words(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"a file of settings is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"a file of settings is no YAML: {' '.join(str(error).split())}") from None


def checked(tree: DictConfig) -> RunConfig:
    """A RunConfig of this tree; ValueError for a missing or unknown key, a wrong type or a broken rule."""
    try:
        plain = OmegaConf.to_container(tree)
        assert isinstance(plain, dict)
        refusals.check_tree({str(key): value for key, value in plain.items()})
        config = OmegaConf.to_object(OmegaConf.merge(unlocked(OmegaConf.structured(RunConfig)), tree))
    except OmegaConfBaseException as error:
        raise ValueError(refusals.sentence(error)) from None
    assert isinstance(config, RunConfig)
    for key, value in flat(asdict(config)):
        check_fits(key, value)
    config = branch.with_ancestry(config, text)
    config.check()
    return config


def changed(config: RunConfig, words: Iterable[str]) -> RunConfig:
    """The run with single keys changed by `key=value` words, checked. ValueError as `compose` raises it."""
    overrides = _parsed(list(words))
    for override in overrides:
        refusals.check(override, None)
    try:
        tree = OmegaConf.create(text(config))
        assert isinstance(tree, DictConfig)
        return checked(_changed(tree, overrides))
    except OmegaConfBaseException as error:
        raise ValueError(refusals.sentence(error)) from None


def load(path: Path) -> RunConfig:
    """The checked RunConfig of a resolved YAML file, as `text` makes it."""
    return checked(_tree(path))


def asked(words: Iterable[str]) -> dict[str, str]:
    """Every key of the tree that these words describe, with its value as text: what follows from other keys, from the
    time or from the environment as it is written, not as what it is here and now. ValueError as `compose` raises it."""
    tree = OmegaConf.to_container(raw(words), resolve=False)
    assert isinstance(tree, dict)
    return {key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in flat(tree)}


def of_text(text: str) -> RunConfig:
    """The checked RunConfig of what `text` made, elsewhere."""
    tree = OmegaConf.create(text)
    assert isinstance(tree, DictConfig)
    return checked(tree)


def text(config: RunConfig) -> str:
    """The resolved config as YAML; `load` and `of_text` read it back."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(asdict(config))))


def _literal(value: Any) -> Any:
    """Plain values in which OmegaConf sees no references: a `${` that is left in a resolved text stands for itself."""
    if isinstance(value, Mapping):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
    parsed = _parsed(as_typed(overrides, sweeps=True))
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
    choices = tuple(bare(key, choice) for choice in item.sweep_string_iterator())
    if not choices:
        raise ValueError(f"{item.input_line} is an empty range: the grid would have no job")
    return Swept(key, choices, is_range=isinstance(value, RangeSweep) and not value.shuffle)


def _parsed(settings: Sequence[str]) -> list[Override]:
    """The words in Hydra's grammar; ValueError for the first that is not of it."""
    parser, found = OverridesParser.create(), []
    for setting in settings:
        try:
            found.append(parser.parse_override(setting))
            if not found[-1].key_or_group:
                raise ValueError(f"{setting} cannot be read as key=value: there is no key")
        except HydraException as error:
            raise ValueError(f"{setting} cannot be read as key=value: {str(error).splitlines()[0]}") from None
    return found


def _changed(resolved: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """A resolved config, laid over the defaults, with single keys changed."""
    tree = OmegaConf.merge(defaults(RunConfig), resolved)
    assert isinstance(tree, DictConfig)
    if overrides:  # what a branch has changed is to be found anew
        tree.checkpoint.ancestry = []
    for override in overrides:
        key = override.key_or_group
        if override.is_delete():
            above, _, last = key.rpartition(".")
            del OmegaConf.select(tree, above)[last]
        else:
            OmegaConf.update(tree, key, override.value())
    return tree


def _tree(path: Path) -> DictConfig:
    """The YAML in a file; ValueError where there is none."""
    try:
        tree = OmegaConf.load(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, DictConfig) or not tree:
        raise ValueError(f"{path} holds no config: it must be keys with values")
    return tree
