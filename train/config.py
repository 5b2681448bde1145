"""RunConfig: the rooms' own frozen configs side by side, and the one function that knows the rules between rooms."""

from __future__ import annotations

from dataclasses import dataclass, field

from parallel import mesh
from parallel.expert import placement
from parallel.mesh import ParallelConfig
from train.checkpoint import CheckpointConfig
from train.data.config import DataConfig
from train.model.config import ModelConfig
from train.optim import OptimConfig
from train.schedule import LrSchedulerConfig, MoeConfig, MtpConfig, Schedule, TrainConfig, batch_sizes
from train.track import TrackConfig

PRECISIONS = ("fp64", "fp32", "bf16")
SCHEDULES = ("1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class FolderConfig:
    """`run`: where the run lives and on what."""

    name: str = "tiny"
    dir: str = "runs/tiny"
    device: str = "auto"
    num_threads: int | None = None
    compile: bool = False

    def check(self) -> None:
        """ValueError unless the device is known and the number of threads positive."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"run.device={self.device} is not one of auto, cpu, cuda")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"run.num_threads={self.num_threads} must be at least 1, or null to share the cores")


@dataclass(frozen=True)
class PrecisionConfig:
    """`precision`: fp64 | fp32 | bf16 (design: fp64 is for proofs)."""

    name: str = "fp32"

    def check(self) -> None:
        """ValueError for an unknown precision."""
        if self.name not in PRECISIONS:
            raise ValueError(f"precision={self.name} is not one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class PipelineConfig:
    """`pipeline`: the order of the stages' work. With one stage every schedule is the same."""

    schedule: str = "1f1b"

    def check(self) -> None:
        """ValueError for an unknown schedule."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"pipeline.schedule={self.schedule} is not one of {', '.join(SCHEDULES)}")


@dataclass(frozen=True)
class ZeroConfig:
    """`zero`: who holds master weights and moments."""

    engine: str = "deepspeed"

    def check(self) -> None:
        """ValueError for an unknown engine."""
        if self.engine not in ("deepspeed", "native"):
            raise ValueError(f"zero.engine={self.engine} is not one of deepspeed, native")


@dataclass(frozen=True)
class EvaluateConfig:
    """`evaluate`: loss on the same sequences of the validation split."""

    interval: int = 50
    num_sequences: int = 64

    def check(self) -> None:
        """ValueError unless there is something to evaluate on."""
        if self.interval < 0:
            raise ValueError(f"evaluate.interval={self.interval} must not be negative (0 evaluates at the end only)")
        if self.num_sequences < 1:
            raise ValueError(f"evaluate.num_sequences={self.num_sequences} must be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One run, as its resolved `config.yaml` has it."""

    model: ModelConfig
    run: FolderConfig = field(default_factory=FolderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimConfig = field(default_factory=OptimConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @property
    def mirrored(self) -> bool:
        """Whether each stage lives on two mirrored ranks (DualPipe, report section 3.2.1)."""
        return self.pipeline.schedule == "dualpipe" and self.parallel.pp > 1

    def schedule(self) -> Schedule:
        """The recipe over tokens. ValueError for one that cannot be."""
        return Schedule(self.train, self.lr_scheduler, self.moe, self.mtp)

    def check(self) -> None:
        """Every rule of every room and between rooms; ValueError names field, value and rule.

        Pure: needs no process, device or data, so that everything illegal is refused before any is taken.
        """
        rooms = (
            self.run,
            self.model,
            self.pipeline,
            self.data,
            self.optimizer,
            self.zero,
            self.precision,
            self.checkpoint,
            self.evaluate,
            self.track,
        )
        for room in rooms:
            room.check()
        mesh.check(self.parallel, self.mirrored)
        self.schedule()
        self._check_sequences()
        placement.check(self.parallel, self.model.n_routed_experts, self.model.n_group)
        if self.zero.engine == "deepspeed" and self.precision.name == "fp64":
            raise ValueError("zero.engine=deepspeed keeps fp32 masters and cannot hold precision=fp64: use native")
        if self.data.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size={self.data.vocab_size} is above model.vocab_size={self.model.vocab_size}: "
                "the model has no row for the last tokens"
            )

    def _check_sequences(self) -> None:
        train, model = self.train, self.model
        if train.seq_len > model.max_position_embeddings:
            raise ValueError(
                f"train.seq_len={train.seq_len} is above model.max_position_embeddings={model.max_position_embeddings}"
            )
        if train.seq_len <= model.num_nextn_predict_layers:
            raise ValueError(
                f"train.seq_len={train.seq_len} leaves no token to predict for "
                f"model.num_nextn_predict_layers={model.num_nextn_predict_layers}: it must be larger"
            )
        per_round = self.parallel.dp * train.micro_batch_size
        for size in batch_sizes(train):
            if size % per_round:
                raise ValueError(
                    f"a global batch of {size} sequences (train.global_batch_size, train.batch_ramp) is no multiple of "
                    f"parallel.dp={self.parallel.dp} times train.micro_batch_size={train.micro_batch_size}"
                )
        if self.data.valid_fraction == 0:
            raise ValueError("data.valid_fraction=0 leaves nothing to evaluate on: it must be above 0")
