"""Folders of checkpoints on disk: which are complete, publishing one, forgetting old ones, tidying up after a kill.

A checkpoint is written into a hidden folder beside its final place and renamed there when it is whole, so a folder
named `step-XXXXXXXX` is complete from its first moment. `manifest.json` inside it lists every file with its size and
CRC-32; the file `latest` beside the folders names the one to resume from and is replaced last. Nothing here
communicates.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.files import (
    CRC32,
    PARTIAL,
    FileRecord,
    aside,
    check_sizes,
    checksum_of,
    replace_durably,
    sync,
    write_durably,
)
from train.settings import dotted

MANIFEST = "manifest.json"
# The small state of a run, and its resolved config.
STATE_FILE, CONFIG_FILE = "state.json", "config.yaml"
LATEST = "latest"
REPLACED, DELETED = ".replaced", ".deleted"

_STEP = re.compile(r"step-(\d{8,})")

log = logging.getLogger(__name__)


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint taken after `step` finished steps."""
    return root / f"step-{step:08d}"


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the done-marker of a folder whose files are all in place."""
    body = {name: [entry.num_bytes, int(entry.checksum, 16)] for name, entry in sorted(files.items())}
    text = json.dumps({"files": body, "crc32": _body_crc(body)}, indent=1)
    write_durably(folder / MANIFEST, text.encode(), CRC32)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """File name to record. ValueError, naming the file, when the marker is missing or damaged."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        body = content["files"]
        sound = content["crc32"] == _body_crc(body)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint was never completed") from None
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: it does not agree with its own checksum")
    return {name: FileRecord(num_bytes, CRC32, f"{crc:08x}") for name, (num_bytes, crc) in body.items()}


def check_complete(folder: Path) -> None:
    """Marker, presence and sizes, without reading the files. ValueError in a sentence that names the file."""
    check_sizes(folder, read_manifest(folder))


def is_step_folder(path: Path) -> bool:
    """Whether a folder's name is that of a checkpoint."""
    return _STEP.fullmatch(path.name) is not None


def survey(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """All step folders under `root`: the complete ones, newest first, and what is wrong with each other one."""
    complete, broken = [], {}
    for folder in sorted(_step_folders(root), key=step_of, reverse=True):
        try:
            check_complete(folder)
            complete.append(folder)
        except ValueError as error:
            broken[folder] = str(error)
    return complete, broken


def find_latest(root: Path) -> Path | None:
    """The checkpoint to resume from: the one that `latest` names, else the newest complete one.

    Falling back is said in a warning. None when there is no complete checkpoint.
    """
    named = _named_by_latest(root)
    complete, broken = survey(root)
    if named in complete:
        return named
    if named is None and not complete and not broken:
        return None
    if named is None:
        trouble = f"{root / LATEST} does not name a checkpoint"
    else:
        trouble = f"{root / LATEST} names {named.name}, but {broken.get(named, 'there is no such folder')}"
    choice = complete[0] if complete else None
    log.warning("%s: %s", trouble, f"falling back to {choice.name}" if choice else "and no other one is complete")
    return choice


def find_checkpoint(path: Path, key: str) -> Path:
    """The step folder that is meant: `path` itself, or the newest one of the run or folder of checkpoints `path`.

    key: the setting that names it. ValueError in a sentence of its own for each way in which there is none.
    """
    said = f"{key}={path}"
    if not path.is_dir():
        raise ValueError(f"{said} {_absence(path)}")
    if (path / MANIFEST).exists():
        check_complete(path)
        return path
    if _STEP.fullmatch(path.name):
        raise ValueError(f"{said} was never completed: it has no {MANIFEST}{_others(path)}")
    root = checkpoints_of(path)
    found = find_latest(root)
    if found is not None:
        return found
    broken = survey(root)[1]
    if broken:
        raise ValueError(f"{said} holds no complete checkpoint, only broken ones: {'; '.join(broken.values())}")
    if root != path:
        raise ValueError(f"{said} is a run that has no checkpoint yet: there is no step folder in {root}")
    raise ValueError(f"{said} holds no checkpoint: {_WANTED}")


def run_of(path: Path) -> Path:
    """The folder of the run that has its checkpoints, or this one, in `path`; `path` itself where there is none."""
    root = path.parent if _STEP.fullmatch(path.name) else path
    above = root.parent
    return above if root.name == "checkpoints" and (above / CONFIG_FILE).exists() else path


_WANTED = "name a run's folder, a folder of checkpoints, or one step-XXXXXXXX of it"


def _absence(path: Path) -> str:
    """What is wrong with a path that is no folder."""
    if path.exists():
        return f"is a file: {_WANTED}"
    if _STEP.fullmatch(path.name) and path.parent.is_dir():
        return f"is not there (checkpoint.keep_latest_k says how many stay){_others(path)}"
    there = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=3)
    return f"does not exist{f'; did you mean {path.with_name(near[0])}?' if near else ''}"


def _others(path: Path) -> str:
    complete = [each.name for each in survey(path.parent)[0]]
    return f"; {path.parent} has {', '.join(complete[:4])}" if complete else f"; {path.parent} has no complete one"


def checkpoints_of(path: Path) -> Path:
    """Where the run in `path` keeps its checkpoints; `path` itself where it is no run's folder."""
    try:
        named = dotted((path / CONFIG_FILE).read_text()).get("checkpoint.dir")
    except (OSError, UnicodeDecodeError):
        named = None
    if named:
        return Path(str(named))
    inner = path / "checkpoints"
    return inner if inner.is_dir() or (path / CONFIG_FILE).exists() else path


def publish(partial: Path, final: Path) -> None:
    """Rename a whole folder into place, then let `latest` name it. At every moment a complete checkpoint is named."""
    root = final.parent
    sync(partial)
    replaced = aside(final, REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(root)
    replace_durably(root / LATEST, f"{final.name}\n".encode())
    shutil.rmtree(replaced, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Delete all but `keep` checkpoints (0 keeps all): the one `latest` names stays, then the newest before it.

    Those with a higher step than `latest` belong to a future that was abandoned by resuming before it; they go first.
    """
    named = _named_by_latest(root)
    if keep == 0 or named is None:
        return

    def rank(folder: Path) -> tuple[bool, int]:
        return step_of(folder) <= step_of(named), step_of(folder)

    others = sorted((folder for folder in _step_folders(root) if folder != named), key=rank, reverse=True)
    for folder in others[keep - 1 :]:
        doomed = aside(folder, DELETED)
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tidy(root: Path) -> None:
    """Remove what a killed save left. A checkpoint that was being replaced returns when its successor never came."""
    for path in root.glob(".step-*"):
        final = path.with_name(path.stem[1:])
        if path.suffix == REPLACED and not final.exists():
            os.rename(path, final)
        elif path.suffix in (PARTIAL, REPLACED, DELETED):
            shutil.rmtree(path, ignore_errors=True)
    aside(root / LATEST).unlink(missing_ok=True)


def _step_folders(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]


def step_of(folder: Path) -> int:
    """The number of finished steps of the checkpoint in a step folder."""
    match = _STEP.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def _named_by_latest(root: Path) -> Path | None:
    try:
        name = (root / LATEST).read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return root / name if _STEP.fullmatch(name) else None


def _body_crc(body: Mapping[str, Any]) -> int:
    return int(checksum_of(body, CRC32), 16)
