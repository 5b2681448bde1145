"""The verbs' own settings: a frozen dataclass each, which `train.settings.read` fills from `key=value` words.

Needs no torch: `--help` of a verb reads this file and not the verb.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from train.precision.config import PRECISIONS

EXPORT_DTYPES = ("bf16", "fp32", "fp8")
WEIGHTS = ("model", "ema")
DEVICES = ("auto", "cpu", "cuda")
TIMELINE_SUFFIXES = (".svg", ".png", ".json")
PICTURE_SUFFIXES = (".svg", ".png")
PLAN_SUFFIXES = (".html", *PICTURE_SUFFIXES)
SHOWS = ("simulated", "recorded", "both")


@dataclass(frozen=True)
class LocalSettings:
    """`local`: what becomes of a job that has lost a rank. All other words are settings of the run (docs/jobs.md).

    Attributes:
        restarts: how often in a row, without a new checkpoint in between, the job starts again by itself after it has
            lost a rank; 0: never. Never after refused settings, a loss that is not finite, or a request to stop.
        restart_wait_s: seconds before it does; twice as many each time in a row, up to 300.
        min_ranks: with `parallel.elastic=true`, the fewest ranks with which it goes on.
    """

    restarts: int = 0
    restart_wait_s: float = 1.0
    min_ranks: int = 1

    def check(self) -> None:
        """ValueError for a number that cannot be."""
        if self.restarts < 0:
            raise ValueError(f"restarts={self.restarts} must not be negative (0 starts no job again)")
        if not 0 <= self.restart_wait_s < math.inf:
            raise ValueError(f"restart_wait_s={self.restart_wait_s:g} must be a number of at least 0")
        if self.min_ranks < 1:
            raise ValueError(f"min_ranks={self.min_ranks} must be at least 1")

    def check_for(self, num_ranks: int, is_elastic: bool) -> None:
        """ValueError where these settings and those of the run leave nothing to do what they ask for."""
        if is_elastic and not self.restarts:
            raise ValueError(
                "parallel.elastic=true goes on with fewer ranks after a restart: it needs restarts above 0"
            )
        if self.min_ranks > 1 and not is_elastic:
            raise ValueError(f"min_ranks={self.min_ranks} belongs to parallel.elastic=true")
        if self.min_ranks > num_ranks:
            raise ValueError(f"min_ranks={self.min_ranks} is above the {num_ranks} ranks of the run")


@dataclass(frozen=True)
class ExportSettings:
    """`export`: what is written as a model in Hugging Face's layout, and where.

    Attributes:
        checkpoint: a step folder, or a run's folder (or its folder of step folders), of which the latest is taken; an
            imported checkpoint too.
        to: folder to make; refused if it exists.
        dtype: `bf16` (rounded once from the masters), `fp32` (the masters) or `fp8` (as the published V3). In fp8 every
            projection of attention, MLPs and experts is E4M3 in blocks of 128 x 128 beside float32 `weight_scale_inv`;
            embedding, head, norms, router and `eh_proj` are bf16.
        weights: `model`, or `ema` for the moving average.
        max_shard_bytes: largest file; a tensor that is larger by itself is alone.
        tokenizer: `auto` (the checkpoint's own, or that of the run's prepared tokens, unless they were prepared anew
            since), a `tokenizer.json`, or `none`.
    """

    checkpoint: Path
    to: Path
    dtype: str = "bf16"
    weights: str = "model"
    max_shard_bytes: int = 5_000_000_000
    tokenizer: str = "auto"

    def check(self) -> None:
        """ValueError for an unknown word, or a size of no byte."""
        _one_of("dtype", self.dtype, EXPORT_DTYPES)
        _one_of("weights", self.weights, WEIGHTS)
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={self.max_shard_bytes} must be a positive number")


@dataclass(frozen=True)
class VerifySettings:
    """`verify`: which checkpoints are read whole.

    Attributes:
        checkpoint: a step folder; or a run's folder, or a folder of checkpoints, of which all are read.
    """

    checkpoint: Path


@dataclass(frozen=True)
class ImportSettings:
    """`import`: which model in Hugging Face's layout becomes a checkpoint, and where.

    Attributes:
        from_: folder with `config.json` and safetensors, sharded or a single file: float32, bfloat16, float16, float64
            or published FP8 blocks.
        to: folder of the checkpoint to make; refused if it exists.
    """

    from_: Path
    to: Path


@dataclass(frozen=True)
class GenerateSettings:
    """`generate`: which model goes on with which text, and how.

    Attributes:
        checkpoint: a run's folder (its newest complete checkpoint), a folder of checkpoints, or one step folder.
        prompt: the text to go on with; or `prompt_file`. The model sees its tokens and no other.
        prompt_file: a file of the text to go on with, in UTF-8.
        max_new_tokens: most tokens to generate; None: 128, or what `model.max_position_embeddings` leaves.
        speculative: drafts by the prediction depths, and plain decoding beside it, unseen, for text and speed.
        temperature: 0 takes the best token, else tokens are drawn.
        top_p: of the distribution, the fewest tokens that hold this much of it; needs a temperature above 0.
        seed: of what is drawn.
        weights: `model`, or `ema` for the moving average of a run with `optimizer.ema_decay`.
        precision: `fp64`, `fp32`, `bf16` or `fp8`; None: the run's.
        device: `auto` (CUDA where there is a device), `cpu`, `cuda`; not yet run on a GPU.
        tokenizer: a `tokenizer.json`, where the folder of `data.dir` is elsewhere or was prepared anew; None: the one
            beside the run's tokens.
    """

    checkpoint: Path
    prompt: str | None = None
    prompt_file: Path | None = None
    max_new_tokens: int | None = None
    speculative: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    weights: str = "model"
    precision: str | None = None
    device: str = "auto"
    tokenizer: Path | None = None

    def check(self) -> None:
        """ValueError for what cannot be, whatever the checkpoint."""
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("generate needs prompt=TEXT or prompt_file=PATH, one of the two")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be a whole number of at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature:g} must be a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p:g} must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p={self.top_p:g} needs a temperature above 0: at 0 the best token is taken")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be a whole number of at least 0")
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("device", self.device, DEVICES)
        if self.precision is not None:
            _one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class EvaluateSettings:
    """`evaluate`: which model reads which text. Keys of `data` name another text than the run's.

    Attributes:
        checkpoint: a run's folder (its newest complete checkpoint), a folder of checkpoints, or one step folder.
        num_sequences: how many of each source, evenly over it, or `all`; None: `evaluate.num_sequences` of the run.
        seq_len: tokens of a sequence; None: the run's.
        weights: `model`, or `ema` for the moving average of a run with `optimizer.ema_decay`.
        precision: `fp64`, `fp32`, `bf16` or `fp8`; None: the run's.
        device: `auto` (CUDA where there is a device), `cpu`, `cuda`; not yet run on a GPU.
        tokenizer: a `tokenizer.json`, where the folder of the run's tokens is elsewhere or was prepared anew; None: the
            one beside the run's tokens.
        out: file to write the numbers to, as JSON.
    """

    checkpoint: Path
    num_sequences: str | None = None
    seq_len: int | None = None
    weights: str = "model"
    precision: str | None = None
    device: str = "auto"
    tokenizer: Path | None = None
    out: Path | None = None

    def num_sequences_of(self, of_the_run: int) -> int | None:
        """How many sequences are asked for; None: all."""
        if self.num_sequences is None:
            return of_the_run
        return None if self.num_sequences == "all" else int(self.num_sequences)

    def check(self) -> None:
        """ValueError for what cannot be, whatever the checkpoint."""
        asked = self.num_sequences
        if asked is not None and asked != "all" and not (asked.isdecimal() and int(asked) > 0):
            raise ValueError(f"num_sequences={asked} must be a whole number of at least 1, or all")
        if self.seq_len is not None and self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len} must be at least 1")
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("device", self.device, DEVICES)
        if self.precision is not None:
            _one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class ReportSettings:
    """`report`: which runs are drawn over each other, and where.

    Attributes:
        run: folder of a run, or of a sweep, which means all its jobs; may be given several times.
        out: the page to write; None: `report.html` in the folder of the one run or sweep, of several here.
    """

    run: list[Path]
    out: Path | None = None


@dataclass(frozen=True)
class ScheduleSettings:
    """`schedule`: where the picture of a run's recipe goes. All other words are settings of the run.

    Attributes:
        out: the picture to write, a PNG.
    """

    out: Path = Path("schedule.png")


@dataclass(frozen=True)
class PlanSettings:
    """`plan`: on which cluster a run is planned, and what is written. All other words are settings of the run.

    Attributes:
        cluster: a cluster of `configs/cluster`, a YAML file of one's own, or `here`, which `plan calibrate` measures.
        max_vio: how uneven routers are: the fullest expert's load over the mean, less 1. The fullest rank is shown.
        loads: a run's `loads.jsonl`, whose last step says what experts get, instead of `max_vio`.
        timed: with `cluster=here`, start the run's ranks for some seconds and time its own layers in them. Not of
            `plan search` and `plan compare`.
        json: print one object for scripts instead of a screen for people.
        out: a page to write (`.html`), or a folder for it, with that object beside it; or a picture (`.svg`, `.png`).
    """

    cluster: str = "here"
    max_vio: float = 0.0
    loads: Path | None = None
    timed: bool = True
    json: bool = False
    out: Path | None = None

    def check(self) -> None:
        """ValueError for a load that cannot be, or two answers to one question."""
        if not 0 <= self.max_vio < math.inf:
            raise ValueError(f"max_vio={self.max_vio:g} must be a number of at least 0")
        if self.loads is not None and self.max_vio:
            raise ValueError(f"max_vio={self.max_vio:g} and loads={self.loads} both say what experts get: give one")
        if self.out is not None and self.out.suffix not in ("", *PLAN_SUFFIXES) and not self.out.is_dir():
            raise ValueError(f"out={self.out} must end in {', '.join(PLAN_SUFFIXES)}, or be a folder without an ending")


@dataclass(frozen=True)
class SearchSettings(PlanSettings):
    """`plan` and `plan search`: the last three say for what a layout is searched.

    Attributes:
        cluster: a cluster of `configs/cluster`, a YAML file of one's own, or `here`, which `plan calibrate` measures.
        max_vio: how uneven routers are: the fullest expert's load over the mean, less 1. The fullest rank is shown.
        loads: a run's `loads.jsonl`, whose last step says what experts get, instead of `max_vio`.
        timed: with `cluster=here`, start the run's ranks for some seconds and time its own layers in them. Not of
            `plan search` and `plan compare`.
        json: print one object for scripts instead of a screen for people.
        out: a page to write (`.html`), or a folder for it, with that object beside it; or a picture (`.svg`, `.png`).
            Of `plan search` a page alone, of `plan compare` nothing.
        gpus: of `plan search`, devices; unless it is set as many as the run has ranks.
        memory_gb: of `plan search`, what a device has in 1e9 bytes, instead of the cluster's `memory.device_gb`.
        num_best: of `plan search`, layouts to show.
    """

    gpus: int | None = None
    memory_gb: float | None = None
    num_best: int = 10

    def check(self) -> None:
        """As `PlanSettings`; ValueError for a number that cannot be."""
        super().check()
        for name in ("gpus", "num_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ValueError(f"memory_gb={self.memory_gb:g} must be a number above 0")


@dataclass(frozen=True)
class TimelinePipelineSettings:
    """`pipeline`: the schedule that a timeline simulates.

    Attributes:
        schedule: name of the schedule; None: that of the recorded step.
        num_micro_batches: micro-batches of one pipeline, over all its directions.
        pairs: forward and backward of different micro-batches run together; None: as the schedule is published.
        stages_per_rank: for `interleaved_1f1b`; None: 2.
    """

    schedule: str | None = None
    num_micro_batches: int | None = None
    pairs: bool | None = None
    stages_per_rank: int | None = None


@dataclass(frozen=True)
class TimelineParallelSettings:
    """`parallel`: the ranks that a timeline simulates.

    Attributes:
        pp: ranks of the pipeline.
    """

    pp: int | None = None


@dataclass(frozen=True)
class TimelineCostSettings:
    """`cost`: durations of the simulated chunks, in any one unit; of 1 / parallel.pp of the model.

    Where none is given, a recorded step's own costs are taken.

    Attributes:
        f: of a forward; None: 1.
        b: of the part of a backward that makes input gradients; None: 1.
        w: of the part of a backward that makes weight gradients; None: 1.
        pair: of a forward and a whole backward that run together; None: f + b + w, which gains nothing.
        latency: from the end of a chunk until another rank has its result; None: 0.
        early: the results of a whole backward or a pair leave this long before its end; None: 0.
    """

    f: float | None = None
    b: float | None = None
    w: float | None = None
    pair: float | None = None
    latency: float | None = None
    early: float | None = None


@dataclass(frozen=True)
class TimelineSettings:
    """`timeline`: which step of a pipeline is drawn, simulated or recorded, and where.

    Attributes:
        events: trace of a real step, as a run with `profile.steps` writes it to `traces/` in its folder.
        column: which pipeline of the recorded step, from 0.
        show: `simulated`, `recorded` or `both`; None: both.
        out: the picture (`.svg`, `.png`), or a trace for ui.perfetto.dev (`.json`); None: `timeline.svg`, or none with
            `json=true`.
        json: print the numbers as JSON.
    """

    pipeline: TimelinePipelineSettings = field(default_factory=TimelinePipelineSettings)
    parallel: TimelineParallelSettings = field(default_factory=TimelineParallelSettings)
    cost: TimelineCostSettings = field(default_factory=TimelineCostSettings)
    events: Path | None = None
    column: int | None = None
    show: str | None = None
    out: Path | None = None
    json: bool = False

    @property
    def has_shape(self) -> bool:
        """Whether anything of the schedule is given."""
        return self.pipeline != TimelinePipelineSettings() or self.parallel != TimelineParallelSettings()

    def check(self) -> None:
        """ValueError for a schedule that is not whole, and for what belongs to a recorded step where there is none."""
        needed = {
            "pipeline.schedule": self.pipeline.schedule,
            "parallel.pp": self.parallel.pp,
            "pipeline.num_micro_batches": self.pipeline.num_micro_batches,
        }
        if self.events is None or self.has_shape:
            for key, value in needed.items():
                if value is None:
                    raise ValueError(f"timeline needs {key}=...")
        for key in ("column", "show"):
            if getattr(self, key) is not None and self.events is None:
                raise ValueError(f"{key}={getattr(self, key)} belongs to events=FILE")
        _one_of("show", self.show or "both", SHOWS)
        if self.out is not None and self.out.suffix not in TIMELINE_SUFFIXES:
            raise ValueError(f"out={self.out} must end in {', '.join(TIMELINE_SUFFIXES)}")


def _one_of(key: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ValueError(f"{key}={value} is not one of {', '.join(words)}")
