"""Which checkpoint a run goes on from, and the small state of it. Nothing here communicates."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import step_folders
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.state import MAX_NAMED_DIFFERENCES, TrainState, differences
from train.checkpoint.step_folders import CONFIG_FILE, STATE_FILE
from train.files import check_contents


def read_state(path: Path) -> TrainState:
    """The small state of a complete checkpoint. ValueError, naming the file, when it is missing or damaged."""
    manifest = step_folders.read_manifest(path)
    check_contents(path, manifest, [STATE_FILE, CONFIG_FILE])
    return TrainState.from_json((path / STATE_FILE).read_text(), (path / CONFIG_FILE).read_text())


def resume_decision(config: CheckpointConfig, root: Path, now: TrainState) -> tuple[Path, TrainState] | None:
    """Which checkpoint a run goes on from, with its state; None to start anew. Never under another model, data, recipe.

    Args:
        root: the run's own folder of checkpoints.
        now: the run as it would start: only `fingerprints` and `config` are read.

    Raises ValueError when the checkpoint belongs to another model, data or recipe (naming the keys and both values),
    when only broken checkpoints are there, when `never` meets a checkpoint, or when the path in `resume` is no complete
    checkpoint.
    """
    if config.resume == "never":
        # Going on without them would delete them one by one, and a later `auto` could take them for this run's own.
        if earlier := step_folders.find_latest(root):
            raise ValueError(
                f"checkpoint.resume=never would start anew beside {earlier}, a checkpoint of an earlier run: delete "
                f"{root}, or choose another run.dir"
            )
        return None
    if config.resume == "auto":
        found = step_folders.find_latest(root)
        broken = "; ".join(step_folders.survey(root)[1].values())
        if found is None and broken:
            raise ValueError(
                f"checkpoint.resume=auto found no complete checkpoint in {root}, only broken ones ({broken}): move "
                "them away, or start anew with checkpoint.resume=never"
            )
    else:
        found = step_folders.find_checkpoint(Path(config.resume), "checkpoint.resume")
    if found is None:
        return None
    saved = read_state(found)
    if differ := differences(now, saved):
        shown = "; ".join(differ[:MAX_NAMED_DIFFERENCES])
        more = f"; and {len(differ) - MAX_NAMED_DIFFERENCES} more" if len(differ) > MAX_NAMED_DIFFERENCES else ""
        raise ValueError(
            f"checkpoint.resume={config.resume} would go on from {found}, which is of another run: {shown}{more}. "
            "Use those settings; or go on from there under these, in a folder of its own: "
            f"checkpoint.branch_from={found} run.dir=ANOTHER_FOLDER"
        )
    return found, saved
