"""What all ranks of a run must have in common, made sure of before the first step: settings, code, libraries, tokens,
folders. A run of ranks that differ in one of them would train, to the end, a recipe that nobody has asked for.
"""

from __future__ import annotations

import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

from train import compose
from train.config import RunConfig
from train.data.config import DataConfig
from train.data.meta import Meta
from train.files import CRC32, record_of

T = TypeVar("T")
MAX_DIFFERENCES = 8
_MAX_RANKS = 8
_PACKAGES = ("train", "parallel")
_LIBRARIES = ("torch", "numpy", "deepspeed", "transformer_engine", "flash_attn", "flash_attn_3")
# A network file system may show a new file to other machines so much later.
_SEEN_WITHIN_S = 15.0


class Meeting(Protocol):
    """Where all ranks of a run come together; each calls the same methods in the same order."""

    rank: int
    world_size: int

    def from_first(self, doing: str, work: Callable[[], T]) -> T:
        """Rank 0's result of `work`; what it raises is raised on all ranks."""

    def on_all(self, doing: str, work: Callable[[], T]) -> T:
        """Each rank's own result of `work`; what one raises is raised on all ranks."""

    def differing(self, facts: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
        """Facts that are not the same on all ranks, with each rank's value."""


def same_run(meeting: Meeting, config: RunConfig, settings: Callable[[], Mapping[str, str]]) -> RunConfig:
    """The run's config on all ranks: rank 0's.

    What was asked for must be the same everywhere. What follows from it need not be (`run.name=${now:%H-%M}`, an
    environment variable): that is rank 0's.

    Args:
        settings: gives them as they were asked for, by key, values that follow from others not filled in.

    Raises ValueError on all ranks, with ranks, keys and values, when settings, code or libraries differ.
    """
    if meeting.world_size == 1:
        return config
    if differ := meeting.differing({**settings(), **_libraries(), **_code()}):
        raise ValueError(f"the ranks were not started alike: {_in_words(differ)}. Start all in the same way")
    text = meeting.from_first("composes the config", lambda: compose.text(config))
    return config if meeting.rank == 0 else compose.of_text(text)


def same_device(meeting: Meeting, device: Callable[[], str]) -> None:
    """ValueError on all ranks unless all compute on the same kind of device; `device` names it, or refuses."""
    found = meeting.on_all("looks at its device", device)
    if differ := meeting.differing({"the device of run.device": found}):
        raise ValueError(f"the ranks do not compute alike: {_in_words(differ)}")


@contextmanager
def shared(meeting: Meeting, key: str, folder: Path, enter: Callable[[ExitStack], object]) -> Iterator[None]:
    """A folder that all ranks see: a file that rank 0 writes there is looked for by the others, which write nothing
    before they have found it.

    key: the setting that names it. enter: makes the folder and may open there what lasts as long as the block; rank 0
    does it first. Raises ValueError on all ranks when it fails on one, or when one does not see the file.
    """
    with ExitStack() as stack:

        def first() -> tuple[str, str]:
            enter(stack)
            # Left by a killed rank it would be a stranger in the folder: hidden, and named as what it is.
            path = folder / f".seen-by-all-ranks-{secrets.token_hex(8)}"
            try:
                path.touch()
            except OSError as error:
                raise ValueError(f"{key}={folder} cannot be written: {error.strerror}") from None
            stack.callback(path.unlink, missing_ok=True)
            return path.name, socket.gethostname()

        def others() -> None:
            if meeting.rank == 0:
                return
            if not _comes(lambda: (folder / name).exists()):
                raise ValueError(
                    f"{key}={folder} is not shared: rank {meeting.rank} (host {socket.gethostname()}) does not see in "
                    f"{folder.absolute()} what rank 0 (host {host}) has written there: name a folder on a disk that "
                    "all ranks see"
                )
            enter(stack)

        name, host = meeting.from_first(f"opens {key}={folder}", first)
        meeting.on_all(f"looks into {key}={folder}", others)
        if meeting.rank == 0:
            (folder / name).unlink(missing_ok=True)
        yield


def same_tokens(meeting: Meeting, data: DataConfig) -> None:
    """ValueError on all ranks unless all read the same prepared tokens, be it from one disk or from disks of their own.

    Call it when rank 0 has prepared them.
    """

    def look() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, source in {**data.sources, **data.evaluated}.items():
            try:
                _comes(lambda folder=source.folder: (folder / "meta.json").exists())  # type: ignore[misc]
                found[f"the tokens of {name} in data.dir={source.folder}"] = Meta.load(source.folder).fingerprint[:16]
            except ValueError as error:
                who = f"rank {meeting.rank} (host {socket.gethostname()})"
                raise ValueError(f"data.dir={data.folder.absolute()} is not shared: on {who} {error}") from None
        return found

    tokens = meeting.on_all("looks at the tokens", look)
    if differ := meeting.differing(tokens):
        raise ValueError(f"the ranks do not read the same tokens: {_in_words(differ)}")


def _libraries() -> dict[str, str]:
    """Versions of what makes a run's numbers."""
    found = {"the version of Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[f"the version of {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _code() -> dict[str, str]:
    """CRC-32 of every file of this program that a rank runs."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py"))
    return {f"the text of {path.relative_to(root).as_posix()}": record_of(path, CRC32).checksum for path in files}


def _in_words(differ: Mapping[str, Mapping[int, Any]]) -> str:
    """Names with each value and its ranks, the first few of many."""
    phrases = [f"{name} is {_values(values)}" for name, values in list(differ.items())[:MAX_DIFFERENCES]]
    more = f"; and {len(differ) - MAX_DIFFERENCES} more" if len(differ) > MAX_DIFFERENCES else ""
    return "; ".join(phrases) + more


def _values(by_rank: Mapping[int, Any]) -> str:
    """ "0.003 on ranks 0, 2 and 0.3 on rank 1", rank 0's first."""
    ranks: dict[str, list[int]] = {}
    for rank in sorted(by_rank):
        value = by_rank[rank]
        ranks.setdefault("not there" if value is None else str(value), []).append(rank)
    return " and ".join(f"{value} on {_ranks(found)}" for value, found in ranks.items())


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _MAX_RANKS} more" if len(ranks) > _MAX_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_MAX_RANKS]))}{more}"


def _comes(happened: Callable[[], bool]) -> bool:
    """Whether it happens within the time that a file needs from machine to machine."""
    end_s = time.monotonic() + _SEEN_WITHIN_S
    while not happened():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.1)
    return True
