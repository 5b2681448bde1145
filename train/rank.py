"""One rank of one run, from its config to its exit code."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from train import compose, device_variables, environment, run_folder
from train.agree import same_device, same_run, same_tokens, shared
from train.assemble import HangError, Meeting, PeerError, assemble, device_of, join, meet
from train.banner import banner
from train.checkpoint.agreement import CheckpointError
from train.config import RunConfig
from train.data.config import DataConfig
from train.data.prepare.all_sources import prepare_sources
from train.data.rows.blend import exposure_table
from train.deterministic import deterministic
from train.files import named_files, replace_durably
from train.job import Job
from train.loop import run
from train.not_finite import NotFiniteError
from train.precision.build import choose_engine
from train.resume import resume
from train.settle import settled
from train.stopping import StopRequest, end_now, tell_torchrun, within
from train.track import gauges
from train.track.console import ConsoleSink
from train.track.events import OUTCOMES, Events
from train.track.last_step import METRICS, last_step
from train.track.metrics_file import JsonlSink, LoadsSink, SamplesSink, read_metrics
from train.track.planned import sentence as as_planned
from train.track.sinks import Sink, Tracker
from train.track.tensorboard import TensorboardSink
from train.track.wandb import WandbSink
from train.view.sinks import PictureSink, ReportSink

log = logging.getLogger("train")

# A sentence explains these: the settings, the data or a checkpoint were refused before anything was changed; a loss or
# gradient was not finite; a checkpoint could not be written; another rank did not come or was silent; one was lost.
EXIT_CODES = {ValueError: 2, NotFiniteError: 3, CheckpointError: 4, HangError: 5, PeerError: 6}
# Of these every rank has its own to tell.
OF_PEERS = (HangError, PeerError)
# What is left to report of a run that has lost a rank may take so long: a launcher kills before long.
CLOSE_S = 15.0


def run_rank(config: RunConfig, settings: Callable[[], Mapping[str, str]], stop: StopRequest, speaks: bool) -> int:
    """Run this rank to the end; returns the exit code.

    0: the schedule is done, or was left after a checkpoint because a signal asked for it. Others: `EXIT_CODES`.
    Anything unexpected is raised, so that the launcher ends the other ranks.

    Args:
        settings: as `agree.same_run` takes them.
        speaks: whether a refusal is printed, as one rank of a machine does for all.
    """
    # Where rank 0's folder is its config says; no other rank writes events.
    events = Events(Path(config.run.dir), writes=environment.read().rank == 0, alert=config.track.alert)
    with meet(config, partial(_say, speaks), partial(_end_hung, events)) as meeting:
        try:
            meeting.come()
            config = same_run(meeting, config, settings)
            same_device(meeting, lambda: device_of(config))
            with _folders(config, meeting), _told(events), deterministic(config.run.deterministic):
                events.add("start", **_arranged(config))
                _rank(config, meeting, stop, events)
            return 0
        except tuple(EXIT_CODES) as error:
            stop.leave()
            if speaks or isinstance(error, OF_PEERS):
                print(error, file=sys.stderr, flush=True)
            if isinstance(error, OF_PEERS):
                tell_torchrun(str(error))
            if isinstance(error, ValueError):
                meeting.part()
            return _code_of(error)


def _arranged(config: RunConfig) -> dict[str, object]:
    """How many ranks a run has, and how they are arranged."""
    parallel = config.parallel
    schedule = f", {config.pipeline.schedule}" if parallel.pp > 1 else ""
    topology = f"pp={parallel.pp} dp={parallel.dp} ep={parallel.ep} nodes={parallel.nodes}{schedule}"
    return {"num_ranks": parallel.world_size, "num_nodes": parallel.nodes, "topology": topology}


@contextmanager
def _told(events: Events) -> Iterator[None]:
    """An error that ends the run is an event, whatever it is."""
    try:
        yield
    except Exception as error:
        _add_end(events, _code_of(error), str(error) or type(error).__name__)
        raise


def _add_end(events: Events, code: int, reason: str) -> None:
    events.add("end", outcome=OUTCOMES.get(code, "failed"), code=code, reason=reason)


def _code_of(error: Exception) -> int:
    """Python's own 1 for an error that nobody has foreseen."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)


def _say(speaks: bool, sentence: str) -> None:
    """While this rank waits for others to begin. Beside rank 0, which may be at work, rank 1 tells people."""
    log.info("%s", sentence)
    if speaks or environment.read().rank == 1:
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def _folders(config: RunConfig, meeting: Meeting) -> Iterator[None]:
    """The run's folders, which all ranks see, and this rank's log in one of them."""
    folder = Path(config.run.dir)

    def open_log(stack: ExitStack) -> None:
        stack.enter_context(run_folder.opened(folder, meeting.rank, tuple(EXIT_CODES)))

    with ExitStack() as folders:
        folders.enter_context(shared(meeting, "run.dir", folder, open_log))
        if config.checkpoint.dir is not None:
            root = config.checkpoint.folder(folder)
            folders.enter_context(
                shared(meeting, "checkpoint.dir", root, lambda _: run_folder.make("checkpoint.dir", root))
            )
        yield


def _rank(config: RunConfig, meeting: Meeting, stop: StopRequest, events: Events) -> None:
    place = environment.read()
    if config.run.num_threads is not None or place.num_threads is None:
        fair = environment.fair_threads(place.local_world_size or 1)
        torch.set_num_threads(config.run.num_threads or fair)
    # Which way of multiplying is the faster one may differ between machines, and all ranks take one.
    config = meeting.from_first("times its products", lambda: settled(config, device_of(config)))
    config.track.check_installed()
    meeting.from_first("prepares the data", lambda: _prepare(config.data, meeting))
    same_tokens(meeting, config.data)
    together: Exception | None = None
    with join(config, meeting, partial(_end_hung, events), _note) as groups:
        stop.honour()
        try:
            with named_files():
                job = assemble(config, groups)
            _train(job, stop, events)
        except (NotFiniteError, CheckpointError) as error:
            # All ranks raise it. They also leave together: one that left first would look dead to the others.
            together = error
    if together is not None:
        raise together


def _prepare(data: DataConfig, meeting: Meeting) -> None:
    """Rank 0's alone; the others, who wait, hear how far it is."""

    def say(line: str) -> None:
        log.info("%s", line)
        meeting.doing = f"prepares the data: {line}"

    prepare_sources(data, say)


def _end_hung(events: Events, sentence: str) -> NoReturn:
    """End this process, from the watchdog's thread: the main one waits where nothing reaches it."""
    _end(events, HangError(sentence))


def _note(sentence: str | None) -> None:
    """Note a long wait, and that it is over, for whoever looks at a rank that a library has ended without a word."""
    log.info("%s", sentence or "that wait is over")
    tell_torchrun(sentence)


def _end(events: Events, error: Exception) -> NoReturn:
    if logging.getLogger().hasHandlers():  # the run's folder is there
        log.error("%s", error)
        _add_end(events, _code_of(error), str(error))
    tell_torchrun(str(error))
    end_now(_code_of(error), str(error))


def _train(job: Job, stop: StopRequest, events: Events) -> None:
    with named_files():
        resumed = resume(job)
    if resumed is not None:
        log.info("resumed from %s after step %d", resumed, job.step)
        num_lost_steps = max(0, last_step(job.folder / METRICS) - job.step)
        events.add("resume", step=job.step, checkpoint=str(resumed), num_lost_steps=num_lost_steps)
    if job.is_done:
        events.add("end", outcome="done", code=0, reason=f"this run is {_done(job)}")
        _say_where(job, f"this run is {_done(job)}", {}, job.step)
        return
    if job.is_main:
        _introduce(job)
    with named_files():
        tracker = _track(job)
    first = job.step
    try:
        done = run(job, tracker, _peak_flops_per_s(job), stop)
    except PeerError as error:
        with within(CLOSE_S, partial(_end, events, error)):
            tracker.close(failed=True)
        raise
    except BaseException:
        tracker.close(failed=True)
        raise
    said = _done(job) if done else f"stopped and saved after step {job.step}"
    if not done and job.step == first:
        said = f"stopped before step {job.step + 1}: there was nothing new to save"
    events.add("end", outcome="done" if done else "stopped", code=0, reason=said)
    tracker.close()  # which writes the report, with this end in it
    if done or job.step > first:
        _say_where(job, said, tracker.latest, first)
    elif job.is_main:
        print(said, flush=True)


def _done(job: Job) -> str:
    """At which step a run is done, and why where that is not its last one."""
    num_steps = job.recipe.num_steps
    early = f" of {num_steps}, as {job.patience.sentence}" if job.step < num_steps else ""
    return f"done after step {job.step}{early}"


def _introduce(job: Job) -> None:
    """Says on the console and in the log what is about to run."""
    config, device = job.config, job.device
    where = device.type if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"
    engines = choose_engine(config.precision, device) if config.precision.name == "fp8" else "torch"
    exposures = job.train_rows.exposures(config.num_sequences)
    text = banner(config, where, torch.get_num_threads(), engines, exposures, job.step)
    if device.type == "cuda":
        core = job.models[0].packing.core.name
        text = f"{text}\ndevice  attention by {core}; {', '.join(device_variables.shown())}"
    log.info("what runs:\n%s", text)
    log.info("what it reads:\n%s", exposure_table(job.train_rows, config.num_sequences))
    print(text, flush=True)


def _peak_flops_per_s(job: Job) -> float:
    def sum_over_ranks(number: float) -> float:
        return float(job.gather(torch.tensor([number], dtype=torch.float64, device=job.device)).sum())

    # What is measured draws random numbers, and the run's own go on where the checkpoint left them.
    with torch.random.fork_rng(devices=[]):
        return gauges.peak_flops_per_s(
            job.device, job.groups.mesh.world_size, lambda: sum_over_ranks(0.0), sum_over_ranks
        )


def _track(job: Job) -> Tracker:
    """The sinks of rank 0; the run's id in wandb is known to all ranks, as it goes into checkpoints."""
    if not job.is_main:
        job.wandb_id = job.from_first(job.wandb_id)
        return Tracker()
    config, folder, title = job.config, job.folder, job.config.run.name
    replace_durably(folder / "config.yaml", compose.text(config).encode())
    wandb = WandbSink(config.track, folder, asdict(config), job.step, job.wandb_id)
    job.wandb_id = job.from_first(wandb.run_id)
    num_steps, recipe = job.recipe.num_steps, job.recipe
    console = ConsoleSink(
        config.track.log_interval,
        num_steps,
        recipe.tokens_before(num_steps),
        recipe.tokens_before(job.step),
    )
    entropy = job.validation.unigram_entropy_nats
    picture = PictureSink(folder / "metrics.jsonl", folder / "loss.png", title, entropy)
    steps, loads = JsonlSink(folder / "metrics.jsonl", job.step), LoadsSink(folder / "loads.jsonl", job.step)
    sinks: list[Sink] = [steps, loads, console, wandb]
    samples = folder / "samples.jsonl"
    if config.evaluate.prompts or samples.exists():  # what a run that had prompts has written past its checkpoint goes
        sinks.append(SamplesSink(samples, job.step))
    if config.track.tensorboard:
        sinks.append(TensorboardSink(folder, job.step))
    return Tracker([*sinks, picture, ReportSink(folder, entropy)])


def _say_where(job: Job, what: str, latest: Mapping[str, float], first: int) -> None:
    """Ends a run for people: how well it predicts, whether it went as planned since step `first`, and where everything
    lies that there is."""
    checkpoint = job.checkpoints.latest()
    if job.is_main:
        names = {
            "report": "report.html",
            "loss curve": "loss.png",
            "metrics": "metrics.jsonl",
            "wandb": "wandb",
        }
        made = {label: job.folder / name for label, name in names.items() if (job.folder / name).exists()}
        places = [f"  {label:<12} {path}" for label, path in (*made.items(), ("checkpoint", checkpoint))]
        rows = _rows(job)
        plan = as_planned([row for row in rows if row["step"] > first])
        lines = [f"{what}{_verdict(job, [*rows, latest])}", *([plan] if plan else []), *places]
        print("\n".join(lines), flush=True)


def _rows(job: Job) -> list[dict[str, float]]:
    path = job.folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def _verdict(job: Job, rows: Sequence[Mapping[str, float]]) -> str:
    """The last validation loss beside what counting tokens alone would reach; empty before there is one.

    rows: metrics of all starts, those of this one last whatever became of the file.
    """
    valid = next((row["valid/loss"] for row in reversed(rows) if "valid/loss" in row), math.nan)
    entropy = job.validation.unigram_entropy_nats
    if math.isnan(valid) or entropy is None:
        return ""
    side = "below" if valid < entropy else "not below"
    return f": validation loss {valid:.4f} nats per token, {side} the {entropy:.4f} of the same tokens' unigrams"
