"""Which steps of a run lie in wandb's folders, known without opening its files, whose format is wandb's own.

wandb makes a folder for every start of a run. `wandb sync` sends the offline ones of one id, the oldest first; where a
folder begins with a step that the server has, wandb numbers all of its steps anew. So every step must lie in one folder
alone. A start that ends well notes its last step in `steps.json`. What the folder of a killed start holds is not known:
the next one writes its steps again, from `metrics.jsonl`, and sets that folder aside, where `wandb sync` does not look.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from train.files import replace_durably

OFFLINE = "offline-"


@dataclass(frozen=True)
class Notes:
    """What `steps.json` says: folders of starts that ended well, and the last step in them, from 1 on without a gap."""

    last_step: int = 0
    folders: list[str] = field(default_factory=list)


class WandbFolders:
    """The folders of one run, in `run_dir`/wandb."""

    def __init__(self, run_dir: Path, run_id: str) -> None:
        self._root, self._run_id = run_dir / "wandb", run_id
        self._path = self._root / "steps.json"

    def starts(self) -> set[Path]:
        """A folder per start of the run that has not been set aside."""
        return set(self._root.glob(f"*run-*-{self._run_id}"))

    def torn(self) -> set[Path]:
        """Those of offline starts that did not end well."""
        kept = self._read().folders
        return {path for path in self.starts() if path.name.startswith(OFFLINE) and path.name not in kept}

    def begin_anew(self) -> None:
        """Leave nothing of earlier starts under other ids: they had come to no checkpoint, which would have kept their
        id, and their steps are cut off everywhere else, too. What was sent stays as it is."""
        others = set(self._root.glob(f"{OFFLINE}run-*-*")) - self.starts()
        self.set_aside(path for path in others if not any(path.glob("*.synced")))
        self._path.unlink(missing_ok=True)

    def unsent(self) -> set[Path]:
        """Those of offline starts that `wandb sync` would send: it leaves a mark beside what it has sent."""
        return {path for path in self.starts() if path.name.startswith(OFFLINE) and not any(path.glob("*.synced"))}

    def last_step(self, finished_steps: int) -> int:
        """The last step that wandb has, here or on its server, for an offline start of a run after `finished_steps`."""
        kept = self._read()
        last = kept.last_step
        for path in self.starts():
            if path.name in kept.folders:
                continue
            # An online start sends as it goes; how far it came only the server knows.
            last = max(last, sent_step(path) if path.name.startswith(OFFLINE) else finished_steps)
        return last

    def note(self, last_step: int) -> None:
        """A start has ended well: all steps up to this one are in the folders that there are."""
        kept = Notes(last_step, sorted(path.name for path in self.starts()))
        replace_durably(self._path, f"{json.dumps(asdict(kept))}\n".encode())

    def set_aside(self, folders: Iterable[Path]) -> None:
        """Move folders into `replaced/`: their steps lie elsewhere now, wandb's measurements of the machine do not."""
        for path in folders:
            replaced = self._root / "replaced"
            replaced.mkdir(exist_ok=True)
            path.rename(replaced / path.name)

    def _read(self) -> Notes:
        try:
            return Notes(**json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return Notes()


def sent_step(folder: Path) -> int:
    """The last step that `wandb sync` has sent of an offline start, from the summary that it writes; 0 without one.

    It may be sent before the start ends, and of one that was killed, what is whole.
    """
    try:
        return int(json.loads((folder / "files" / "wandb-summary.json").read_text())["_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0
