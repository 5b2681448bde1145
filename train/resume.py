"""What a rank's part of a run puts into checkpoints, and the ways in which a run begins.

`resume` chooses among them: a run goes on from its own checkpoint, or branches off another run's, or takes the weights
of another one, or starts with the initial weights it was assembled with. They differ in which states of a checkpoint
they load, and in what becomes of the position, the optimizer's steps and the random numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from parallel.shards import Piece
from parallel.zero.optimizer import MASTER
from train import compose
from train.ancestry import Ancestor
from train.checkpoint.ranges import FlatRange, Pieces
from train.checkpoint.state import TrainState, capture_rng, check_weights_fit, fingerprint, restore_rng
from train.job import Job
from train.recipe.ema import Ema
from train.settings import dotted
from train.track.metrics_file import begin_with
from train.track.sinks import tell

log = logging.getLogger(__name__)

# Settings under which a validation loss is another one: losses before and after a change of them cannot be compared.
_MEASURES = ("evaluate.", "data.", "train.seq_len")


def save(job: Job) -> None:
    """Take a checkpoint of the finished step; returns when it is copied."""
    job.checkpoints.save(small_state(job), *pieces(job))


def resume(job: Job) -> Path | None:
    """Begin as `checkpoint` says; the checkpoint of its own that the run goes on from, or None.

    Raises ValueError when a checkpoint is of another model, data or recipe, or damaged.
    """
    found = job.checkpoints.resume(small_state(job))
    if found is not None:
        _go_on(job, *found)
        return found[0]
    if ancestors := job.config.ancestors:
        _branch_off(job, ancestors[-1])
    elif job.config.checkpoint.init_from is not None:
        _begin_with_weights(job, Path(job.config.checkpoint.init_from))
    return None


def small_state(job: Job) -> TrainState:
    """Everything but the tensors of a checkpoint taken now."""
    return TrainState(
        step=job.step,
        consumed_tokens=job.recipe.tokens_before(job.step),
        consumed_sequences=job.recipe.sequences_before(job.step),
        num_optimizer_steps=job.optimizer.num_steps,
        rng=capture_rng(),
        wandb_id=job.wandb_id,
        fingerprints=fingerprints(job),
        config=compose.text(job.config),
        sources=[asdict(source) for source in job.train_rows.followed.sources],
        best_valid_loss=job.patience.best,
        num_evaluations_since_best=job.patience.num_since,
    )


def fingerprints(job: Job) -> dict[str, str]:
    """What makes the numbers of a run: it is never resumed under another model, data or recipe."""
    config = job.config
    recipe = {
        **json.loads(job.recipe.fingerprint()),
        "optimizer": config.optimizer.recipe(),
        **config.precision.arithmetic(),
    }
    if config.train.freeze:
        recipe["freeze"] = sorted(config.train.freeze)
    if config.checkpoint.init_from is not None:
        recipe["init_from"] = config.checkpoint.init_from
    if config.checkpoint.branch_from is not None:
        recipe["branched"] = [config.checkpoint.branch_from, [each.checkpoint for each in config.ancestors]]
    tokens = {"train": job.train_rows.fingerprint, "document_mask": config.data.document_mask}
    return {
        "model": fingerprint({"model": asdict(config.model)}),
        "data": fingerprint({"data": tokens}),
        "recipe": fingerprint(recipe),
    }


def pieces(job: Job) -> tuple[Pieces, dict[str, int]]:
    """All large state of this rank as ranges of global tensors, and the sizes of those: what a checkpoint holds.

    Weights are the masters rounded to the run's precision, so they are not stored a second time. Waits for the moving
    average, which is a state like any other.
    """
    found: dict[str, Sequence[FlatRange]] = {**job.optimizer.state()}
    sizes = job.optimizer.state_sizes()
    if job.ema is not None:
        found |= job.ema.state()
        sizes |= job.ema.sizes(sizes)
    for model in job.models:
        for name, bias in model.named_buffers():
            found[name] = [Piece(0, bias)]
            sizes[name] = bias.numel()
    return found, sizes


def _go_on(job: Job, folder: Path, state: TrainState) -> None:
    """Be where the run was when this checkpoint was taken: every state, the position and the random numbers."""
    job.checkpoints.load(folder, *pieces(job))
    job.optimizer.load_finished(state.num_optimizer_steps)
    job.step, job.wandb_id = state.step, state.wandb_id
    job.patience.best, job.patience.num_since = state.best_valid_loss, state.num_evaluations_since_best
    restore_rng(state.rng)


def _branch_off(job: Job, ancestor: Ancestor) -> None:
    """Be where another run was when its checkpoint was taken, under the settings of this one; said before step one.

    A moving average that the other run did not have begins with the weights. The run's id in wandb is its own.
    """
    folder = Path(ancestor.checkpoint)
    state = job.checkpoints.state_of(folder)
    lines = [f"branches off {ancestor.run} after step {state.step} and {state.consumed_tokens:,} tokens ({folder})"]
    lines += [str(change) for change in ancestor.changes] or ["no setting has changed"]
    lines += job.train_rows.followed.sentences()
    had_average = bool(dotted(state.config).get("optimizer.ema_decay"))
    _load(job, folder, with_moments=True, with_average=had_average)
    job.optimizer.load_finished(state.num_optimizer_steps)
    if job.ema is not None and not had_average:
        job.ema = Ema(job.optimizer.state(), job.config.optimizer.ema_decay)
        lines.append("the moving average begins with the weights, as the run before had none")
    job.step = state.step
    restore_rng(state.rng)
    if not any(change.key.startswith(_MEASURES) for change in ancestor.changes):
        job.patience.best, job.patience.num_since = state.best_valid_loss, state.num_evaluations_since_best
    elif job.patience.limit is not None:
        lines.append("evaluate.patience counts anew, as what is evaluated has changed")
    if job.is_main:
        lines += begin_with(Path(ancestor.run), job.folder, state.step)
        tell("\n  ".join(lines))


def _begin_with_weights(job: Job, named: Path) -> None:
    """Take the weights and biases of a checkpoint; everything else begins anew.

    Raises ValueError when it is damaged, or of a model that its weights do not fit.
    """
    folder = job.checkpoints.find(
        named, "checkpoint.init_from", lambda found, saved: check_weights_fit(job.config.model, saved, found)
    )
    _load(job, folder, with_moments=False, with_average=False)
    job.optimizer.load_finished(num_steps=0)
    if job.ema is not None:
        job.ema = Ema(job.optimizer.state(), job.config.optimizer.ema_decay)
    log.info("starts from the weights of %s", folder)


def _load(job: Job, folder: Path, with_moments: bool, with_average: bool) -> None:
    """Load weights and biases, and with them what else is asked for."""
    everything, sizes = pieces(job)
    anew = set[str]()
    if not with_moments:
        anew |= {name for name in job.optimizer.state_sizes() if not name.startswith(f"{MASTER}.")}
    if job.ema is not None and not with_average:
        anew |= job.ema.state().keys()
    job.checkpoints.load(folder, {name: parts for name, parts in everything.items() if name not in anew}, sizes)
