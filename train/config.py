"""RunConfig: the rooms' own frozen configs side by side, and the one function that knows the rules between rooms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from parallel import mesh
from parallel.expert import placement
from parallel.mesh import ParallelConfig
from parallel.pipeline import registry
from parallel.pipeline.placement import Placement
from parallel.pipeline.schedule import Schedule
from train.ancestry import Ancestor, ancestors
from train.checkpoint.config import CheckpointConfig
from train.data.config import DataConfig
from train.data.past import Reading
from train.hf.names import parameters
from train.model.attention import choice
from train.model.attention.kinds import LatentSizes
from train.model.config import ModelConfig, given
from train.model.parts import Parts
from train.model.recompute_config import RecomputeConfig
from train.precision.config import PrecisionConfig
from train.recipe.config import LrSchedulerConfig, MoeConfig, MtpConfig, TrainConfig
from train.recipe.frozen import frozen_names
from train.recipe.optimizer import OptimizerConfig
from train.recipe.ramp import batch_sizes
from train.recipe.recipe import Recipe
from train.run_config import FolderConfig
from train.split import split
from train.track.config import TrackConfig


@dataclass(frozen=True)
class PipelineConfig:
    """`pipeline`: the stages, and the order of their work.

    Attributes:
        schedule: `1f1b`, `interleaved_1f1b`, `zb_h1`, `zbv`, `dualpipe` or `dualpipev`; all the same with one stage.
            `dualpipe` needs an even `parallel.pp`.
        pairs: forward and backward of different micro-batches run together, so that one computes while the other
            communicates; None: as the schedule is published. `zb_h1` and `zbv` have none.
        stages_per_rank: for `interleaved_1f1b`, which takes 2 unless it is set; None for all others.
        layers: layers of each stage from first to last; None balances what the ranks of a pipeline work, head and
            prediction depths counted.
        short_steps: steps of the batch ramp with fewer micro-batches than `dualpipe` takes: `refuse` before the run
            starts, or `1f1b` over one of its directions.
    """

    schedule: str = "1f1b"
    pairs: bool | None = None
    stages_per_rank: int | None = None
    layers: list[int] | None = None
    short_steps: str = "refuse"

    def check(self) -> None:
        """ValueError for an unknown way with short steps; the schedule's own rules are checked with the mesh."""
        if self.short_steps not in ("refuse", "1f1b"):
            raise ValueError(f"pipeline.short_steps={self.short_steps} is not one of refuse, 1f1b")


@dataclass(frozen=True)
class ZeroConfig:
    """`zero`: who holds master weights and moments.

    Attributes:
        engine: `deepspeed` or `native`; unless it is set `native` with `precision=fp64`, which needs it.
    """

    engine: str = "deepspeed"

    def check(self) -> None:
        """ValueError for an unknown engine."""
        if self.engine not in ("deepspeed", "native"):
            raise ValueError(f"zero.engine={self.engine} is not one of deepspeed, native")


@dataclass(frozen=True)
class ProfileConfig:
    """`profile`: which steps are recorded as a timeline.

    Attributes:
        steps: steps, from 1, whose timeline is written to `<run.dir>/traces/step-00000012.json`, as in
            `'profile.steps=[12,40]'`; on a CPU only. `python -m launch timeline events=FILE` draws it, ui.perfetto.dev
            opens it.
    """

    steps: list[int] = field(default_factory=list)

    def check(self) -> None:
        """ValueError for a step that cannot be, or is named twice."""
        for step in self.steps:
            if step < 1:
                raise ValueError(f"profile.steps={self.steps}: steps count from 1")
            if self.steps.count(step) > 1:
                raise ValueError(f"profile.steps={self.steps} names step {step} twice")


@dataclass(frozen=True)
class EvaluateConfig:
    """`evaluate`: the loss on text that is not trained on.

    Attributes:
        interval: steps between evaluations; 0 is at the end only.
        num_sequences: sequences of the validation split, evenly over it and always the same ones; of a blend by weight,
            at least one of each source. As many of each of `data.valid_sources`.
        at_start: evaluate before the first step, too, as step 0.
        patience: end the run after so many evaluations in a row that have not improved `valid/loss`; None: never. It
            then ends as at its last step.
        min_improvement: by how much `valid/loss` must be below the best one before to improve on it, in nats per token.
        prompts: texts that the model goes on with at evaluations, into `samples.jsonl`, the report, wandb and
            TensorBoard.
        prompts_interval: evaluations from one such generation to the next; the last evaluation has one, too.
        prompt_tokens: most tokens to generate per prompt. Each costs a forward pass over the text so far.
        prompt_temperature: 0 takes the best token, else tokens are drawn, by a generator of their own.
    """

    interval: int = 50
    num_sequences: int = 64
    at_start: bool = False
    patience: int | None = None
    min_improvement: float = 0.0
    prompts: list[str] = field(default_factory=list)
    prompts_interval: int = 1
    prompt_tokens: int = 64
    prompt_temperature: float = 0.0

    def check(self) -> None:
        """ValueError unless there is something to evaluate on, and for prompts and a patience that cannot be."""
        if self.interval < 0:
            raise ValueError(f"evaluate.interval={self.interval} must not be negative (0 evaluates at the end only)")
        for key in ("num_sequences", "prompts_interval", "prompt_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"evaluate.{key}={getattr(self, key)} must be at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"evaluate.patience={self.patience} must be at least 1, or null to train to the end")
        if self.patience is not None and not self.interval:
            raise ValueError(
                f"evaluate.patience={self.patience} counts evaluations, and evaluate.interval=0 has one at the end only"
            )
        for key in ("min_improvement", "prompt_temperature"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"evaluate.{key}={getattr(self, key)} must be a number of at least 0")
        for prompt in self.prompts:
            if not prompt:
                raise ValueError(
                    f"evaluate.prompts={self.prompts}: a prompt is empty, and must have at least one token"
                )

    def due(self, step: int, is_last: bool) -> bool:
        """Whether so many finished steps are followed by an evaluation."""
        return is_last or (self.at_start if step == 0 else self.interval > 0 and step % self.interval == 0)

    def prompts_due(self, step: int, is_last: bool) -> bool:
        """Whether the evaluation after this step is one that goes on with the prompts."""
        return bool(self.prompts) and (is_last or (step // max(1, self.interval)) % self.prompts_interval == 0)


@dataclass(frozen=True)
class RunConfig:
    """One run, as its resolved `config.yaml` has it."""

    model: ModelConfig
    run: FolderConfig = field(default_factory=FolderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @property
    def mirrored(self) -> bool:
        """Whether each stage lives on two mirrored ranks (DualPipe, report section 3.2.1)."""
        return self.pipeline.schedule == "dualpipe" and self.parallel.pp > 1

    @property
    def placement(self) -> Placement:
        """Which rank of a pipeline holds which stage. ValueError for a schedule that cannot be."""
        return registry.place(self.pipeline.schedule, self.parallel.pp, self.pipeline.stages_per_rank)

    @property
    def slices(self) -> list[Parts]:
        """What each slice of the model consists of. ValueError as `split` and `placement`."""
        fp8 = (self.precision.is_fp8(module) for module in ("down_proj", "lm_head"))
        held = self.placement.slices_of_ranks
        return split(self.model, held, self.train.seq_len, self.pipeline.layers, *fp8)

    @property
    def shared_ends(self) -> bool:
        """Whether the first and the last stage both hold the embedding, on ranks that share nothing else."""
        route = self.placement.routes[0]
        apart = self.placement.rank_of[route[0]] != self.placement.rank_of[route[-1]]
        return apart and not self.mirrored and self.model.num_nextn_predict_layers > 0

    def schedule(self, num_micro_batches: int) -> Schedule:
        """What each rank of a pipeline does in a step of so many micro-batches. ValueError where that cannot be."""
        pipeline, pp = self.pipeline, self.parallel.pp
        if self.mirrored and num_micro_batches < 2 * pp and pipeline.short_steps == "1f1b":
            return registry.build_one_way(pp, num_micro_batches)
        return registry.build(pipeline.schedule, pp, num_micro_batches, pipeline.pairs, pipeline.stages_per_rank)

    def schedule_alone(self) -> Schedule:
        """One micro-batch forward and back."""
        return registry.build_alone(self.placement)

    def forward_schedule(self, num_micro_batches: int) -> Schedule:
        """What each rank of a pipeline does in an evaluation of so many micro-batches."""
        pipeline = self.pipeline
        return registry.build_forward(pipeline.schedule, self.parallel.pp, num_micro_batches, pipeline.stages_per_rank)

    def recipe(self) -> Recipe:
        """The recipe over tokens. ValueError for one that cannot be."""
        history = [each.stretch for each in self.ancestors]
        return Recipe(self.train, self.lr_scheduler, self.moe, self.mtp, history)

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """The runs that a branch goes on from, the first one first; none for a run that is no branch."""
        return ancestors(self.checkpoint.ancestry)

    @property
    def readings(self) -> list[Reading]:
        """What those runs have read."""
        recipe = self.recipe()
        return [each.reading(recipe.sequences_before(each.step)) for each in self.ancestors]

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that stay as they are. ValueError for a pattern of `train.freeze` that cannot be."""
        return frozen_names(self.train.freeze, parameters(self.model)) if self.train.freeze else frozenset()

    @property
    def attention_demand(self) -> choice.Demand:
        """What the run wants of the kernel that computes attention."""
        masks, repeats = self.data.document_mask, self.run.deterministic
        return choice.Demand.of(self.model.attention_sizes, self.precision.name, masks, repeats)

    @property
    def num_sequences(self) -> int:
        """Sequences of the whole run, with those of the runs that it goes on from."""
        recipe = self.recipe()
        return recipe.sequences_before(recipe.num_steps)

    def check(self) -> None:
        """Every rule of every room and between rooms; ValueError names field, value and rule.

        Pure: needs no process, device or data, so that everything illegal is refused before any is taken.
        """
        rooms = (
            self.run,
            self.model,
            self.pipeline,
            self.recompute,
            self.data,
            self.optimizer,
            self.zero,
            self.precision,
            self.checkpoint,
            self.evaluate,
            self.profile,
            self.track,
        )
        for room in rooms:
            room.check()
        _ = self.frozen
        mesh.check(self.parallel, self.mirrored)
        _ = self.slices
        num_steps = self.recipe().num_steps
        if self.profile.steps and max(self.profile.steps) > num_steps:
            raise ValueError(f"profile.steps={self.profile.steps}: the run ends after step {num_steps}")
        self._check_sequences()
        self._check_balance()
        self._check_layers()
        choice.check(self.run.attention_kernel, self.attention_demand, self.run.device)
        if self.zero.engine == "deepspeed" and self.precision.name == "fp64":
            raise ValueError("zero.engine=deepspeed keeps fp32 masters and cannot hold precision=fp64: use native")
        if self.data.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size={self.data.vocab_size} is above model.vocab_size={self.model.vocab_size}: "
                "the model has no row for the last tokens"
            )

    def _check_balance(self) -> None:
        moe, model = self.moe, self.model
        if moe.bias_update_rate > 0 and not model.has_router_bias:
            raise ValueError(
                f"moe.bias_update_rate={moe.bias_update_rate} needs model.topk_method=noaux_tc: under "
                f"model.topk_method={model.topk_method} no router has a bias, so it must be 0"
            )
        for name in ("device_aux_coeff", "comm_aux_coeff"):
            if getattr(moe, name) > 0 and (model.n_group or 1) == 1:
                raise ValueError(
                    f"moe.{name}={getattr(moe, name)} needs model.n_group above 1: devices are the routing groups, and "
                    "one alone is always balanced"
                )

    def _check_layers(self) -> None:
        model = self.model
        if model.n_routed_experts:
            placement.check(self.parallel, model.n_routed_experts, given(model.n_group))
        elif self.parallel.ep > 1:
            raise ValueError(
                f"parallel.ep={self.parallel.ep} shares experts, and model.n_routed_experts=0 has none: it must be 1"
            )
        self._check_recompute()

    def _check_recompute(self) -> None:
        model = self.model
        if self.recompute.mla_up_proj and not isinstance(model.attention_sizes, LatentSizes):
            raise ValueError(
                f"recompute.mla_up_proj=true needs model.attention={LatentSizes.name}: "
                f"model.attention={model.attention} projects queries, keys and values straight from the layer's input"
            )
        if self.recompute.experts_up_proj and not model.num_routers:
            raise ValueError("recompute.experts_up_proj=true needs a model with experts: model.n_routed_experts=0")
        absent = {"attention", "experts"} if not model.num_routers else set()
        absent |= {"dense"} if model.n_routed_experts and not model.first_k_dense_replace else set()
        for node in self.recompute.nodes:
            if node in absent:
                kind = "dense" if node == "dense" else "MoE"
                raise ValueError(f"recompute.nodes={self.recompute.nodes}: the model has no {kind} layer, so no {node}")

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
            self.schedule(size // per_round)
        if not self.data.validating and not self.data.valid_sources:
            raise ValueError(
                "data.valid_fraction=0 leaves nothing to evaluate on: it must be above 0, or data.valid_sources must "
                "name text to evaluate on"
            )
        for name, source in self.data.sources.items():
            if source.valid_fraction == 1:
                raise ValueError(f"data.valid_fraction=1 leaves nothing of {name} to train on: it must be below 1")
