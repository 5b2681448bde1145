"""`checkpoint.branch_from`: a new run that goes on from another one's checkpoint, under changed settings.

Decided when the settings are read: which step folder is meant, whether its state can be kept, what has changed, and how
far the runs before have come (train/ancestry.py). All of it becomes part of the branch's own config, so that its steps
and batches are functions of that alone. A branch that has a checkpoint of its own is a run like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from train.ancestry import Ancestor, Change, ancestors
from train.checkpoint import step_folders
from train.checkpoint.step_folders import CONFIG_FILE, STATE_FILE
from train.config import RunConfig
from train.data.past import SourceRead
from train.files import check_contents
from train.recipe.config import BatchRampConfig
from train.settings import settings_of

_ABSENT = object()
# Where a run lies and who hears of it is its own; by which products a CPU computes it goes on as it was.
_PLACES = ("run.name", "run.dir", "track.", "checkpoint.", "data.dir", "data.num_workers", "precision.bf16_products")
# Settings of a model under which its weights, moments and router biases can be kept: none of them is in a shape.
_FREE_MODEL_KEYS = (
    *("model.initializer_range", "model.max_position_embeddings", "model.rope_scaling", "model.rope_theta"),
    *("model.rms_norm_eps", "model.routed_scaling_factor", "model.norm_topk_prob", "model.scoring_func"),
    *("model.num_experts_per_tok", "model.n_group", "model.topk_group"),
)


def with_ancestry(config: RunConfig, text: Callable[[RunConfig], str]) -> RunConfig:
    """The config with `checkpoint.ancestry` as `checkpoint.branch_from` says; without one it is empty.

    text: a config as its resolved YAML.

    Raises ValueError where there is no checkpoint to begin with, or one whose state this run cannot keep.
    """
    config.checkpoint.check()
    found = [each.plain() for each in _ancestry(config, text)]
    return replace(config, checkpoint=replace(config.checkpoint, ancestry=found))


def _ancestry(config: RunConfig, text: Callable[[RunConfig], str]) -> tuple[Ancestor, ...]:
    named, given = config.checkpoint.branch_from, ancestors(config.checkpoint.ancestry)
    if named is None:
        return ()
    if given and (given[-1].branch_from, given[-1].left_for) == (named, config.run.dir):
        return given
    if own := _own(config, named):
        return own
    folder = step_folders.find_checkpoint(Path(named), "checkpoint.branch_from")
    try:
        state, was = _read(folder)
    except ValueError as error:
        raise ValueError(f"checkpoint.branch_from={named} cannot be branched off: {error}") from None
    root = config.checkpoint.folder(config.run.dir)
    if folder.parent.resolve() == root.resolve():
        raise ValueError(
            f"checkpoint.branch_from={named} lies in {root}, where this run keeps its own checkpoints: a branch is a "
            "new run, so choose another run.dir"
        )
    earlier = ancestors(was["checkpoint"].get("ancestry", []))
    return (*earlier, _ancestor(config, folder, state, was, yaml.safe_load(text(config))))


def _own(config: RunConfig, named: str) -> tuple[Ancestor, ...]:
    """The ancestry that the run's own newest checkpoint has kept, if it is of a branch off the same run."""
    root = config.checkpoint.folder(config.run.dir)
    found = step_folders.find_latest(root) if root.is_dir() else None
    if found is None:
        return ()
    own = yaml.safe_load((found / CONFIG_FILE).read_text())["checkpoint"]
    kept = ancestors(own.get("ancestry", []))
    if own.get("branch_from") != named or not kept:
        return ()
    return (*kept[:-1], replace(kept[-1], left_for=config.run.dir))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The small state of a step folder and its resolved config, as plain values."""
    check_contents(folder, step_folders.read_manifest(folder), [STATE_FILE, CONFIG_FILE])
    state = json.loads((folder / STATE_FILE).read_text())
    if not state["step"]:
        raise ValueError(f"{folder} holds weights and no training: begin with them by checkpoint.init_from={folder}")
    if not state.get("sources"):
        raise ValueError(
            f"{folder} was saved before runs noted what they read: resume its run until it has saved another checkpoint"
        )
    return state, yaml.safe_load((folder / CONFIG_FILE).read_text())


def _ancestor(
    config: RunConfig, folder: Path, state: Mapping[str, Any], was: Mapping[str, Any], now: Mapping[str, Any]
) -> Ancestor:
    changes = tuple(_changes(was, now))
    if lost := [change for change in changes if not _can_be_kept(change.key)]:
        differ = "; ".join(f"{each.key} was {each.was} there and is {each.now} here" for each in lost)
        raise ValueError(
            f"checkpoint.branch_from={config.checkpoint.branch_from} takes the weights and moments of {folder}, which "
            f"are of another model or optimizer: {differ}. Use those settings, or a run of its own"
        )
    train = was["train"]
    return Ancestor(
        run=str(_run_of(folder, was["run"]["dir"])),
        checkpoint=str(folder),
        branch_from=str(config.checkpoint.branch_from),
        left_for=config.run.dir,
        step=state["step"],
        tokens=state["consumed_tokens"],
        seq_len=train["seq_len"],
        global_batch_size=train["global_batch_size"],
        batch_ramp=BatchRampConfig(**train["batch_ramp"]),
        seed=train["seed"],
        sources=tuple(SourceRead(**source) for source in state["sources"]),
        changes=changes,
    )


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """The settings in which two resolved configs differ. What an older program did not have yet is no change."""
    for setting in settings_of(RunConfig):
        key = setting.key
        if "[]" in key or key.startswith(_PLACES):
            continue
        before, after = _value(was, key), _value(now, key)
        if before is not _ABSENT and before != after:
            yield Change(key, before, after)


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name, _ABSENT) if isinstance(tree, Mapping) else _ABSENT
    return tree


def _can_be_kept(key: str) -> bool:
    return key != "optimizer.name" and (not key.startswith("model.") or key.startswith(_FREE_MODEL_KEYS))


def _run_of(folder: Path, run_dir: str) -> Path:
    """The run that a step folder is of: where it lies by default, or where its config says that it is."""
    usual = folder.parent.parent
    return usual if (usual / "metrics.jsonl").exists() else Path(run_dir)
