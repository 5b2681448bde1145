"""Where step reports go: `metrics.jsonl`, the console, wandb and the picture of the loss curve.

Rank 0 opens a `Tracker` over a list of sinks; other ranks have one over none. This file is the only door to wandb.
Only `metrics.jsonl` is part of a run: if its file cannot be written, the run fails. Every other sink that breaks says
so in one sentence and is silent from then on.
"""

from __future__ import annotations

import netrc
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlparse

from tqdm import tqdm

from train.metrics import StepReport
from train.metrics_file import JsonlSink, read_metrics
from train.picture import draw_loss

MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True)
class TrackConfig:
    """Config group `track`.

    `wandb` is auto (online when an API key is set, offline otherwise; WANDB_MODE decides before that), online, offline
    or disabled. `log_interval` is the number of steps between two plain lines in a log.
    """

    wandb: str = "auto"
    project: str = "halocline"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_interval: int = 10

    def check(self) -> None:
        """ValueError for an unknown mode or an interval below 1."""
        if self.wandb not in MODES:
            raise ValueError(f"track.wandb={self.wandb} is not one of {', '.join(MODES)}")
        if self.log_interval < 1:
            raise ValueError(f"track.log_interval={self.log_interval} is below 1")


class Sink(Protocol):
    """Takes the reports of a run, one per finished step, in order."""

    def write(self, report: StepReport) -> None:
        """One finished step."""

    def checkpoint(self) -> None:
        """The step just written is being saved."""

    def close(self, failed: bool) -> None:
        """The run ends, well or not."""


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


# --- console ---


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


class ConsoleSink:
    """Progress for people: one moving line on a terminal, plain `key=value` lines in a log.

    A log gets every `log_interval`-th step, the first, the last and those with a validation loss. The time left is
    what the tokens left take at the rate of the last 20 reports, all between them included.
    """

    def __init__(
        self,
        log_interval: int,
        total_steps: int,
        total_tokens: int,
        consumed_tokens: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stdout
        self._log_interval, self._total_steps, self._total_tokens = log_interval, total_steps, total_tokens
        self._clock = clock
        self._seen = deque([(clock(), consumed_tokens)], maxlen=20)
        self._is_first = True
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty():
            layout = "{percentage:3.0f}% |{bar:24}| {desc}"
            self._bar = tqdm(
                total=total_tokens, initial=consumed_tokens, file=self._stream, bar_format=layout, dynamic_ncols=True
            )

    def _time_left(self, report: StepReport) -> str:
        self._seen.append((self._clock(), report.consumed_tokens))
        (first_s, first_tokens), (last_s, last_tokens) = self._seen[0], self._seen[-1]
        seconds_per_token = (last_s - first_s) / max(1, last_tokens - first_tokens)
        return str(timedelta(seconds=round(seconds_per_token * max(0, self._total_tokens - report.consumed_tokens))))

    def write(self, report: StepReport) -> None:
        """Moves the line, or prints one when it is due."""
        time_left = self._time_left(report)
        if self._bar is not None:
            valid = "" if report.valid_loss is None else f" valid {report.valid_loss:.3f}"
            rate = f"{_short(report.tokens_per_s)} tokens/s"
            self._bar.n = min(report.consumed_tokens, self._total_tokens)
            if valid:
                self._bar.write(f"step {report.step}: loss {report.loss:.4f}{valid}", file=self._stream)
            self._bar.set_description_str(
                f"step {report.step}/{self._total_steps}  loss {report.loss:.4f}  {rate}  ETA {time_left}"
            )
            return
        is_last = report.step >= self._total_steps
        if self._is_first or is_last or report.step % self._log_interval == 0 or report.valid_loss is not None:
            print(self._line(report, time_left), file=self._stream, flush=True)
        self._is_first = False

    def _line(self, report: StepReport, time_left: str) -> str:
        optional = (
            ("valid_loss", report.valid_loss, ".4f"),
            ("mtp_loss", report.mtp_loss, ".4f"),
            ("max_vio", report.max_vio, ".2f"),
            ("mfu", report.mfu, ".3f"),
        )
        parts = [
            f"step={report.step}/{self._total_steps}",
            f"tokens={_short(report.consumed_tokens)}",
            f"loss={report.loss:.4f}",
            *(f"{name}={value:{style}}" for name, value, style in optional if value is not None),
            f"grad_norm={report.grad_norm:.3f}",
            f"lr={report.lr:.2e}",
            f"tokens_per_s={report.tokens_per_s:.0f}",
            f"eta={time_left}",
        ]
        return " ".join(parts)

    def checkpoint(self) -> None:
        """Nothing to show: the checkpoint speaks for itself."""

    def close(self, failed: bool) -> None:
        """Leaves the moving line where it stands."""
        if self._bar is not None:
            self._bar.close()


# --- wandb ---


def has_api_key(environ: Mapping[str, str]) -> bool:
    """Whether wandb would find a key by itself: in WANDB_API_KEY, or in the netrc file for its host."""
    if environ.get("WANDB_API_KEY"):
        return True
    path = Path(environ.get("NETRC") or Path.home() / ".netrc")
    try:
        host = urlparse(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        return netrc.netrc(str(path)).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_mode(setting: str, environ: Mapping[str, str]) -> str:
    """online, offline or disabled for `track.wandb`; "online" without a key is offline, for there is nobody to ask."""
    if setting == "auto" and environ.get("WANDB_MODE") in MODES[1:]:
        setting = environ["WANDB_MODE"]
    if setting in ("offline", "disabled"):
        return setting
    return "online" if has_api_key(environ) else "offline"


class WandbSink:
    """Reports as wandb history over tokens, in `run_dir`/wandb; never asks, never fails the run.

    `run_id` is made once per run and belongs in its checkpoints: a resumed run hands it back and sends only steps
    after `finished_steps`, each with its own number (an offline run cannot find out where it stood).
    """

    def __init__(
        self,
        config: TrackConfig,
        run_dir: Path,
        run_config: dict[str, Any],
        finished_steps: int = 0,
        run_id: str | None = None,
        say: Callable[[str], None] = _say,
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._config, self._run_dir, self._run_config = config, run_dir, run_config
        self._finished_steps, self._say = finished_steps, say
        self._run: Any = None
        self.mode = wandb_mode(config.wandb, os.environ)
        if self.mode == "offline" and config.wandb == "online":
            say("track.wandb=online, but no API key is set: wandb keeps the run offline")
        if self.mode == "online" and not self._try("start online", self._start, after="keeps it offline"):
            self.mode = "offline"
        if self.mode == "offline":
            self._try("start", self._start)

    def _start(self) -> None:
        # Imported here: it takes most of a second, which a run without wandb need not wait.
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, init_timeout=60, finish_timeout=60
        )
        config = self._config
        self._run_dir.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            mode=self.mode,  # type: ignore[arg-type]
            dir=str(self._run_dir),
            id=self.run_id,
            resume="allow",
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=config.name,
            tags=list(config.tags),
            config=self._run_config,
            settings=settings,
        )
        run.define_metric("train/consumed_tokens")
        run.define_metric("*", step_metric="train/consumed_tokens")
        self._run = run

    def _try(self, verb: str, call: Callable[[], object], after: str = "goes on without it") -> bool:
        """Whether a call into wandb worked; if not, one sentence and no more calls."""
        try:
            call()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._say(f"wandb could not {verb} ({reason[0]}); the run {after}")
            self._run = None
            return False
        return True

    def write(self, report: StepReport) -> None:
        """Sends the step, unless a run before this one did."""
        if self._run is None or report.step <= self._finished_steps:
            return
        values = report.values()
        del values["step"]
        # Committed at once: otherwise the step waits in memory for the next one, and a kill loses it.
        self._try("take a step", lambda: self._run.log(values, step=report.step, commit=True))

    def checkpoint(self) -> None:
        """Nothing: wandb writes as it goes."""

    def close(self, failed: bool) -> None:
        """Finishes the wandb run, with exit code 1 if ours failed."""
        if self._run is not None:
            self._try("finish", lambda: self._finish(int(failed)))

    def _finish(self, exit_code: int) -> None:
        import wandb

        self._run.finish(exit_code=exit_code)
        # `finish` returns before wandb's own process has written the file; this waits for that process.
        wandb.teardown(exit_code=exit_code)


# --- picture ---


class PictureSink:
    """Draws the loss curve from `metrics.jsonl` at every checkpoint and at the end."""

    def __init__(
        self,
        metrics: Path,
        out: Path,
        title: str = "",
        unigram_entropy: float | None = None,
        say: Callable[[str], None] = _say,
    ) -> None:
        self._metrics, self._out, self._title, self._entropy = metrics, out, title, unigram_entropy
        self._say = say
        self._works = True

    def write(self, report: StepReport) -> None:
        """Nothing: the picture reads the file."""

    def checkpoint(self) -> None:
        """Draws what there is."""
        if not self._works:
            return
        try:
            draw_loss({self._title: read_metrics(self._metrics)}, self._out, unigram_entropy=self._entropy)
        except Exception as error:
            self._works = False
            self._say(f"{self._out} could not be drawn ({error}); the run goes on without it")

    def close(self, failed: bool) -> None:
        """Draws the whole run."""
        self.checkpoint()


class Tracker:
    """Fans every report out to the sinks it was handed, in their order; over none, on all ranks but 0, it does nothing.

    `wandb_id` belongs in the run's checkpoints. `places` says where the run's records lie, for people.
    """

    def __init__(self, sinks: Iterable[Sink] = (), wandb_id: str | None = None, places: dict[str, Path] | None = None):
        self._sinks = list(sinks)
        self.wandb_id = wandb_id
        self.places = places or {}

    def write(self, report: StepReport) -> None:
        """One finished step, to all."""
        for sink in self._sinks:
            sink.write(report)

    def checkpoint(self) -> None:
        """Call after the step's `write` and before its checkpoint is complete."""
        for sink in self._sinks:
            sink.checkpoint()

    def close(self, failed: bool = False) -> None:
        """Closes all; call it once."""
        for sink in self._sinks:
            sink.close(failed)


@dataclass(frozen=True)
class RunSpan:
    """How far a run goes, and where it stands when it is opened (0 unless it is resumed)."""

    total_steps: int
    total_tokens: int
    finished_steps: int = 0
    consumed_tokens: int = 0


def open_tracker(
    config: TrackConfig,
    run_dir: Path,
    span: RunSpan,
    run_config: dict[str, Any],
    wandb_id: str | None = None,
    unigram_entropy: float | None = None,
) -> Tracker:
    """Every sink of a run, for its rank 0: files in `run_dir`, `run_config` (the resolved config) for wandb.

    `wandb_id` is the one a checkpoint kept, when there is one. `unigram_entropy` (nats per token) is drawn as the
    line that a model without context would reach.
    """
    metrics, picture = run_dir / "metrics.jsonl", run_dir / "loss.png"
    jsonl = JsonlSink(metrics, span.finished_steps, _say)
    console = ConsoleSink(config.log_interval, span.total_steps, span.total_tokens, span.consumed_tokens)
    wandb_sink = WandbSink(config, run_dir, run_config, span.finished_steps, wandb_id)
    drawn = PictureSink(metrics, picture, config.name or run_dir.name, unigram_entropy)
    places = {"loss curve": picture, "metrics": metrics}
    if wandb_sink.mode != "disabled":
        places["wandb files"] = run_dir / "wandb"
    return Tracker([jsonl, console, wandb_sink, drawn], wandb_sink.run_id, places)
