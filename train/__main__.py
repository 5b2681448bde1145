"""`torchrun ... -m train key=value ...`, or `python -m train key=value ...` for one process: one rank of one run."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch

from parallel import process
from parallel.process import Groups
from train import compose, metrics
from train.assemble import Job, assemble
from train.checkpoint import CheckpointError
from train.config import RunConfig
from train.data.prepare import prepare
from train.loop import NotFinite, StopRequest, run
from train.track import ConsoleSink, JsonlSink, PictureSink, Tracker, WandbSink

log = logging.getLogger("train")


def main(arguments: Sequence[str]) -> int:
    """One rank from settings to the end of its run; returns the exit code.

    0: the schedule is done, or a checkpoint was saved on SIGTERM. 2: the settings, the data or a checkpoint were
    refused before anything was changed. 3: a loss or gradient was not finite. 4: a checkpoint could not be written.
    Anything unexpected is raised, so that the launcher ends the other ranks.
    """
    try:
        config = compose.load(Path(arguments[1])) if arguments[:1] == ["--config"] else compose.compose(arguments)
        with _logging(config):
            return _rank(config)
    except (ValueError, NotFinite, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 3 if isinstance(error, NotFinite) else 4


def _rank(config: RunConfig) -> int:
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.run.num_threads or max(1, (os.cpu_count() or 1) // local_world_size))
    cuda = torch.cuda.is_available() if config.run.device == "auto" else config.run.device == "cuda"
    if int(os.environ.get("RANK", "0")) == 0:
        # The others wait for this rank when the process groups are made.
        prepare(config.data, log.info)
    with _stop_on_sigterm() as stop:
        groups = process.start(config.parallel, "cuda" if cuda else "cpu", config.mirrored)
        job = assemble(config, groups)
        with _alone_in(job):
            _train(job, stop)
        process.stop(groups)
    return 0


def _train(job: Job, stop: StopRequest) -> None:
    resumed = job.resume()
    if resumed is not None:
        log.info("resumed from %s after step %d", resumed, job.step)
    if job.step >= job.schedule.num_steps:
        if job.is_main:
            print(f"this run is done after step {job.step}; {_where(job)}")
        return
    tracker = _track(job)
    peak = metrics.peak_flops_per_s(
        job.device,
        job.groups.mesh.world_size,
        barrier=lambda: _sum(job, 0.0) and None,
        sum_over_ranks=lambda rate: _sum(job, rate),
    )
    failed = True
    try:
        done = run(job, tracker, peak, stop)
        failed = False
    finally:
        tracker.close(failed)
    if job.is_main:
        print(f"done after step {job.step}; {_where(job)}" if done else f"stopped and saved after step {job.step}")


def _sum(job: Job, number: float) -> float:
    return float(job.gather(torch.tensor([number], dtype=torch.float64, device=job.device)).sum())


def _track(job: Job) -> Tracker:
    """The sinks of rank 0; the run's id in wandb is known to all ranks, as it goes into checkpoints."""
    if not job.is_main:
        job.wandb_id = job.gather_objects(None)[0]
        return Tracker()
    config, folder, title = job.config, job.folder, job.config.run.name
    (folder / "config.yaml").write_text(compose.text(config))
    wandb = WandbSink(config.track, folder, asdict(config), job.step, job.wandb_id)
    job.wandb_id = job.gather_objects(wandb.run_id)[0]
    num_steps, schedule = job.schedule.num_steps, job.schedule
    console = ConsoleSink(
        config.track.log_interval,
        num_steps,
        schedule.tokens_before(num_steps),
        schedule.tokens_before(job.step),
    )
    picture = PictureSink(
        folder / "metrics.jsonl", folder / "loss.png", title, job.valid_rows.tokens.unigram_entropy_nats
    )
    return Tracker([JsonlSink(folder / "metrics.jsonl", job.step), console, wandb, picture])


def _where(job: Job) -> str:
    """What a finished run says: how well it did, and where everything lies."""
    rows = [f"loss curve   {job.folder / 'loss.png'}", f"metrics      {job.folder / 'metrics.jsonl'}"]
    rows += [f"wandb        {job.folder / 'wandb'}", f"checkpoint   {job.checkpoints.latest()}"]
    return "everything lies here:\n" + "\n".join(f"  {row}" for row in rows)


@contextmanager
def _logging(config: RunConfig) -> Iterator[None]:
    """What this rank does, line by line, in `run.dir`/logs/rank_R.log; the last line of a failed one says why."""
    rank = int(os.environ.get("RANK", "0"))
    path = Path(config.run.dir) / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    level, root.level = root.level, logging.INFO
    try:
        yield
    except Exception as error:
        log.error("%s", error, exc_info=not isinstance(error, (ValueError, NotFinite, CheckpointError)))
        raise
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def _stop_on_sigterm() -> Iterator[StopRequest]:
    stop = StopRequest()

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone_in(job: Job) -> Iterator[None]:
    """Two jobs that write one run folder would spoil it: rank 0 holds a lock, which dies with its process."""
    if not job.is_main:
        yield
        return
    with (job.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"run.dir={job.folder} is in use by a running job: choose another run.dir") from None
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
