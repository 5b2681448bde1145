"""Files of a group that lie outside of `configs/`: `model=mine/model.yaml`, `experiment=~/recipes/long.yaml`.

Hydra finds files of a group by name in folders of groups. A path is given such a folder for as long as the tree is
composed, so that a file of one's own is read by the same rules as those in `configs/`, defaults lists included.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

_WORD = re.compile(r"(\w+)=(.*)", re.DOTALL)
ENDINGS = (".yaml", ".yml")


@contextmanager
def placed(words: Sequence[str], groups: Collection[str]) -> Iterator[tuple[list[str], list[str]]]:
    """(words without those that name a path, words by which Hydra finds the files of these inside the block).

    ValueError, with the names that are near, for a path without a file.
    """
    own = [found for word in words if (found := own_file(word, groups))]
    if not own:
        yield list(words), []
        return
    with tempfile.TemporaryDirectory(prefix="halocline-configs-") as folder:
        named = []
        for number, (group, path) in enumerate(own):
            # A name that no file in `configs/` has: those are found first.
            name = f"own_{number}_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
            target = Path(folder) / group / f"{name}.yaml"
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path.resolve())
            named.append(f"{group}={name}")
        others = [word for word in words if not own_file(word, groups)]
        yield others, [*named, f"hydra.searchpath=[file://{folder}]"]


def own_file(word: str, groups: Collection[str]) -> tuple[str, Path] | None:
    """(group, file) of a word that names a file of a group by its path; None for any other word."""
    match = _WORD.fullmatch(word)
    if not match or match[1] not in groups or not ("/" in match[2] or match[2].endswith(ENDINGS)):
        return None
    group, path = match[1], Path(match[2]).expanduser()
    if not path.is_file():
        raise ValueError(f"{word}: there is no such file{_near(path)}")
    if path.suffix not in ENDINGS:
        raise ValueError(f"{word}: a file of settings ends in {' or '.join(ENDINGS)}")
    try:
        yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{word} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{word} is no YAML: {' '.join(str(error).split())}") from None
    return group, path


def _near(path: Path) -> str:
    if path.is_dir():
        path = path / "?"
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    there = sorted(each.name for each in path.parent.iterdir() if each.suffix in ENDINGS)
    near = difflib.get_close_matches(path.name, there, n=1)
    if near:
        return f"; did you mean {path.with_name(near[0])}?"
    return f"; {path.parent} has {', '.join(there[:8])}" if there else f"; {path.parent} has none"
