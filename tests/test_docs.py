"""The pages keep up with the program: every key, metric, file, verb and link that they name, and none missing."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import yaml

from launch import pages
from launch.__main__ import VERBS
from launch.sweep.config import SweepConfig
from train.cli import refusals
from train.compose import compose
from train.config import RunConfig
from train.flops import parameter_counts
from train.settings import CONFIGS, settings_of
from train.track.metrics import UNITS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEY = r"[a-z_]\w*(?:\.\w+(?:\[\])?)+"


def rows(page: str, num_columns: int) -> list[list[str]]:
    """The table rows of a page that open with something in backticks."""
    lines = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if len(row) == num_columns]


KEYS = {
    each.key: each for kind, prefix in ((RunConfig, ""), (SweepConfig, "sweep.")) for each in settings_of(kind, prefix)
}
# The verbs' tables come last on the page, and have some keys of a run too.
TABLE = {row[0].strip("`"): row for row in reversed(rows("config.md", 4))}


VERB_KEYS = {
    each.key for verb in VERBS.values() for kind, prefix in verb.settings for each in settings_of(kind, prefix)
}


def test_config_page_has_every_key_and_no_other() -> None:
    assert set(KEYS) - set(TABLE) == set(), "keys that docs/config.md lacks"
    assert set(TABLE) - set(KEYS) - VERB_KEYS == set(), "keys that do not exist"


@pytest.mark.parametrize("key", sorted(KEYS))
def test_config_page_knows_type_and_meaning(key: str) -> None:
    _, kind, _, meaning = TABLE[key]
    assert kind == KEYS[key].type
    assert meaning


def test_config_page_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    composed = dataclasses.asdict(compose([])) | {"sweep": dataclasses.asdict(SweepConfig())}
    composed["parallel"]["dispatch"] = "auto"  # which no config keeps
    for key in KEYS:
        _, _, shown, _ = TABLE[key]
        if "[]." in key:
            assert not shown, f"{key}: an item of a list has no default of its own"
            continue
        value = functools.reduce(lambda node, name: node[name], key.split("."), composed)
        on_page = yaml.safe_load(shown.strip("`"))
        if isinstance(value, float):
            on_page = float(on_page)  # YAML takes 1e-06 for a word
        elif isinstance(value, list | tuple):
            value = [
                {name: part for name, part in item.items() if part is not None} if isinstance(item, dict) else item
                for item in value
            ]
        assert on_page == value, f"{key}: {on_page!r} on the page, {value!r} composed"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tables_of_settings_are_what_the_dataclasses_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` writes them."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert pages.filled(page.read_text()) == page.read_text()


def test_every_table_of_settings_is_on_a_page() -> None:
    marked = {
        name.strip()
        for page in PAGES
        for _, names, _ in pages.MARKED.findall(page.read_text())
        for name in names.split(",")
    }
    assert marked == set(pages.tables())


def test_config_page_has_every_group_and_file() -> None:
    listed = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows("config.md", 2)}
    for group, files in refusals.groups().items():
        assert set(files) <= listed[group], f"docs/config.md lacks files of {group}"


def test_config_page_states_the_sizes_of_its_models() -> None:
    row = next(row[1] for row in rows("config.md", 2) if row[0] == "`model`")
    stated = re.findall(r"`(\w+)` \((?:default, )?([\d.]+) M", row)
    assert len(stated) == 3
    for name, millions in stated:
        total = parameter_counts(compose([f"model={name}"]).model).total
        assert float(millions) == round(total / 1e6, len(millions.partition(".")[2])), name


def test_symbols_page_has_every_metric_with_its_unit() -> None:
    table = {row[0].strip("`"): row[1] for row in rows("symbols.md", 3) if row[0].strip("`") in UNITS or "/" in row[0]}
    assert table == {name: unit for name, unit in UNITS.items() if name != "step"}


def test_alias_table_names_only_metrics_and_keys_of_ours() -> None:
    ours = [row[0] for row in rows("symbols.md", 4)]
    named = [name for cell in ours for name in re.findall(r"`([^`]+)`", cell)]
    assert len(named) > 20
    for name in named:
        assert name in UNITS or name in KEYS or name in {key.split(".")[0] for key in KEYS}, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    targets = [*re.findall(r"\]\(([^)]+)\)", text), *re.findall(r'(?:src|href)="([^"]+)"', text)]
    for target in targets:
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_keys_verbs_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:train|parallel|launch|configs|tests|benchmarks|docs)/[\w/.]*\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for verb in re.findall(r"python -m launch (\w+)", text):
        assert verb in VERBS, verb
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert target in targets, target
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()} | {key.split(".")[0] for key in KEYS}
    for key in re.findall(rf"[\s`(]({KEY})=", text):
        if key.split(".")[0] in groups and page.name != "first-hour.md":  # the hour has a typo on purpose
            assert key in KEYS, key


def test_house_page_knows_every_file() -> None:
    """By its name, or by that of the folder it lies in."""
    text = (ROOT / "docs" / "house.md").read_text()
    for room in ("train", "parallel", "launch", "kernels"):
        for path in (ROOT / room).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            known = f"`{name}`" in text or f"`{path.parent.relative_to(ROOT).as_posix()}/`" in text
            assert path.name == "__init__.py" or known, f"docs/house.md does not say what {name} is"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_settings_shown_in_one_command_compose(page: Path) -> None:
    """Every training command in a page's `sh` blocks describes a run that the program accepts."""
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"-m (?:train|launch (local|slurm|schedule|config))\b", line)
            if found and "--multirun" not in line:
                words = [word.strip("'\"") for word in line.split("#")[0].split() if re.match(r"['\"]?[a-z_.]+=", word)]
                verb = VERBS[found[1] or "train"]
                own = {
                    each.key
                    for kind, prefix in verb.settings
                    if kind is not RunConfig
                    for each in settings_of(kind, prefix)
                }
                # A file of the reader's own is not here.
                compose(
                    [word for word in words if word.partition("=")[0] not in own and not word.endswith("/model.yaml")]
                )
