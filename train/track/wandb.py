"""The door to wandb: reports as its history, online, or offline in the run's folder."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from train.environment import wandb_mode as asked_mode
from train.track.config import TrackConfig
from train.track.metrics import Sample, StepReport
from train.track.metrics_file import read_metrics, read_samples
from train.track.sinks import say as say_to_people
from train.track.wandb_folders import WandbFolders

# Past these, a server that does not answer is given up. The other ranks wait for rank 0's start meanwhile.
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 60, 60
# What stands in wandb's log before the reason for which it has given up sending.
FATAL = "filestream: fatal error: filestream: "


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
    """online, offline or disabled for `track.wandb`; "online" without a key is offline, for there is nobody to ask.

    `auto` is what the environment asks for, where it does.
    """
    if setting == "auto":
        setting = asked_mode(environ) or "auto"
    if setting in ("offline", "disabled"):
        return setting
    return "online" if has_api_key(environ) else "offline"


class WandbSink:
    """Reports as wandb history over tokens, in `run_dir`/wandb; never asks, never fails the run.

    `run_id` is made once per run and belongs in its checkpoints. A run that resumes after `finished_steps` hands it
    back, and wandb gets exactly the steps that it has not, from `run_dir`/metrics.jsonl. Online, its server says where
    it stands. Offline, the folders of earlier starts that ended well are left as they are; a start that was killed took
    an unknown number of steps along, so what it may have written is written again and its folder set aside. So is that
    of a start which was lost before its first checkpoint: nobody knows its id any more.
    """

    def __init__(
        self,
        config: TrackConfig,
        run_dir: Path,
        run_config: dict[str, Any],
        finished_steps: int = 0,
        run_id: str | None = None,
        say: Callable[[str], None] = say_to_people,
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._is_first = run_id is None
        self._config, self._run_dir, self._run_config = config, run_dir, run_config
        self._finished_steps, self._say = finished_steps, say
        self._folders = WandbFolders(run_dir, self.run_id)
        self._run: Any = None
        self._folder = run_dir / "wandb"
        self._last_step = -1
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

        before = self._folders.starts()
        try:
            self._begin()
        except Exception:
            # Until its process ends, wandb refuses to begin a second run of this id. The folder holds nothing to keep.
            wandb.teardown(exit_code=1)
            self._folders.set_aside(self._folders.starts() - before)
            raise

    def _begin(self) -> None:
        """A wandb run that holds every finished step, here or from an earlier start."""
        import wandb

        config, online = self._config, self.mode == "online"
        self._run_dir.mkdir(parents=True, exist_ok=True)
        if self._is_first:
            self._folders.begin_anew()
        kept, torn = self._folders.last_step(self._finished_steps), self._folders.torn()
        limits: dict[str, Any] = {}
        if online:
            limits = {"init_timeout": INIT_TIMEOUT_S, "finish_timeout": FINISH_TIMEOUT_S, "finish_timeout_raises": True}
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
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, **limits),
        )
        run.define_metric("train/consumed_tokens")
        run.define_metric("*", step_metric="train/consumed_tokens")
        self._run, self._folder = run, Path(run.dir).parent
        # Step 0 is an evaluation before the first step: a start that has written nothing yet, here or there, lacks it.
        self._last_step = run.starting_step - 1 if online else kept or -1
        metrics = self._run_dir / "metrics.jsonl"
        if self._last_step < self._finished_steps and metrics.exists():
            written = {each.step: each.samples for each in read_samples(self._run_dir / "samples.jsonl")}
            for row in read_metrics(metrics):
                if row["step"] <= self._finished_steps:
                    self._log(row, written.get(int(row["step"]), []))
        # What the server has now must not be sent a second time from files.
        self._folders.set_aside(self._folders.unsent() if online else torn)

    def _log(self, values: dict[str, float], samples: Sequence[Sample]) -> None:
        import wandb

        step = int(values.pop("step"))
        if step > self._last_step:
            rows = [[step, sample.prompt, sample.text] for sample in samples]
            table = {"samples": wandb.Table(["step", "prompt", "text"], rows)} if rows else {}
            # Committed at once: otherwise the step waits in memory for the next one.
            self._run.log({**values, **table}, step=step, commit=True)
            self._last_step = step

    def _try(self, verb: str, call: Callable[[], object], after: str = "goes on without it") -> bool:
        """Whether a call into wandb worked; if not, one sentence and no more calls."""
        try:
            call()
        except Exception as error:
            # The second line of wandb's own errors is what happened.
            reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            self._say(f"wandb could not {verb} ({reason}); the run {after}")
            self._run = None
            return False
        return True

    def write(self, report: StepReport) -> None:
        """Sends the step, unless wandb has it."""
        if self._run is not None:
            self._try("take a step", lambda: self._log(dict(report.values), report.samples))

    def checkpoint(self) -> None:
        """Nothing: wandb writes as it goes."""

    def close(self, failed: bool) -> None:
        """Finishes the wandb run, with exit code 1 if ours failed."""
        if self._run is not None:
            # wandb writes every step to its own file as well, also online.
            whole = f"is whole in {self._folder}, which `wandb sync` sends"
            kept = whole if self.mode == "online" else "goes on without it"
            if self._try("finish", lambda: self._finish(int(failed)), after=kept) and (refusal := self._refusal()):
                self._say(f"wandb could not send every step ({refusal}); the run {whole}")

    def _refusal(self) -> str | None:
        """Why the server has not taken all of an online run that finished; None where nothing is known against it.

        wandb gives up sending at an answer such as 401 and finishes as if all were well: only its log has the reason.
        """
        log = self._folder / "logs" / "debug-internal.log"
        try:
            lines = log.read_text(errors="replace").splitlines() if self.mode == "online" else []
        except OSError:
            return None
        fatal = (line.partition(FATAL) for line in lines)
        return next((rest.split(" url=")[0].strip(' "}') for _, found, rest in fatal if found), None)

    def _finish(self, exit_code: int) -> None:
        import wandb

        try:
            self._run.finish(exit_code=exit_code)
        finally:
            # `finish` returns before wandb's own process has written the file; this waits for that process.
            wandb.teardown(exit_code=exit_code)
        self._folders.note(self._last_step)
