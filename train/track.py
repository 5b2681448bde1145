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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from train.console import ConsoleSink
from train.leveldb_log import last_records
from train.metrics import StepReport
from train.metrics_file import JsonlSink, LoadsSink, read_metrics
from train.picture import draw_loss
from train.report.page import write_report
from train.report.runs import read_run

__all__ = [
    "ConsoleSink",
    "JsonlSink",
    "LoadsSink",
    "PictureSink",
    "ReportSink",
    "Sink",
    "TrackConfig",
    "Tracker",
    "WandbSink",
    "read_metrics",
]

MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True)
class TrackConfig:
    """Config group `track`.

    `wandb` is auto (online when an API key is set, offline otherwise; WANDB_MODE decides before that), online, offline
    or disabled. `log_interval` is the number of steps between two plain lines in a log,
    `load_interval` between two lines of expert loads in `loads.jsonl` (0: none).
    """

    wandb: str = "auto"
    project: str = "halocline"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    log_interval: int = 10
    load_interval: int = 10

    def check(self) -> None:
        """ValueError for an unknown mode or an interval below 1."""
        if self.wandb not in MODES:
            raise ValueError(f"track.wandb={self.wandb} is not one of {', '.join(MODES)}")
        if self.log_interval < 1:
            raise ValueError(f"track.log_interval={self.log_interval} is below 1")
        if self.load_interval < 0:
            raise ValueError(f"track.load_interval={self.load_interval} is below 0 (0 writes none)")

    def loads_due(self, step: int, num_steps: int) -> bool:
        """Whether the loads of this step, from 1, are written: every `load_interval`-th, the first and the last."""
        return self.load_interval > 0 and (step % self.load_interval == 0 or step in (1, num_steps))


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

    `run_id` is made once per run and belongs in its checkpoints. A run that resumes after `finished_steps` hands it
    back, and wandb gets exactly the steps that it has not. That may be some past the checkpoint, or fewer than it: its
    process dies with ours and takes up to 32 KiB of steps along, which are then sent from `run_dir`/metrics.jsonl.
    Online, wandb says itself where it stands; offline it cannot, so its files are read.
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
        self._last_step = 0
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
        kept = self._last_kept_step()
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
        self._last_step = max(0, run.starting_step - 1) if self.mode == "online" else kept
        metrics = self._run_dir / "metrics.jsonl"
        if self._last_step < self._finished_steps and metrics.exists():
            for row in read_metrics(metrics):
                if row["step"] <= self._finished_steps:
                    self._log(row)

    def _last_kept_step(self) -> int:
        """The last step in this run's offline files; without any, an online run before this one holds the steps."""
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

        files = list(self._run_dir.glob(f"wandb/offline-run-*-{self.run_id}/*.wandb"))
        if not files:
            return self._finished_steps
        records = (Record.FromString(data) for path in files for data in last_records(path))
        return max((record.history.step.num for record in records if record.HasField("history")), default=0)

    def _log(self, values: dict[str, float]) -> None:
        step = int(values.pop("step"))
        if step > self._last_step:
            # Committed at once: otherwise the step waits in memory for the next one.
            self._run.log(values, step=step, commit=True)
            self._last_step = step

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
        """Sends the step, unless wandb has it."""
        if self._run is not None:
            self._try("take a step", lambda: self._log(report.values()))

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


class ReportSink:
    """Writes `report.html` when the run ends."""

    def __init__(self, run_dir: Path, unigram_entropy: float | None = None, say: Callable[[str], None] = _say) -> None:
        """unigram_entropy: of the validation text, in nats per token."""
        self._run_dir, self._entropy, self._say = run_dir, unigram_entropy, say

    def write(self, report: StepReport) -> None:
        """Nothing: the report reads the run's files."""

    def checkpoint(self) -> None:
        """Nothing: it is written at the end."""

    def close(self, failed: bool) -> None:
        """The report of the whole run."""
        out = self._run_dir / "report.html"
        try:
            write_report([read_run(self._run_dir)], out, self._entropy)
        except Exception as error:
            self._say(f"{out} could not be written ({error})")


class Tracker:
    """Fans every report out to the sinks it was handed, in their order; over none, on all ranks but 0, does nothing."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)

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
