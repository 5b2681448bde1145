"""Config + mesh -> job: the only place where the model meets the ranks that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from parallel import meeting, process
from parallel.expert.build import build as build_dispatch
from parallel.expert.dispatch import Dispatch, LocalDispatch
from parallel.host import Host
from parallel.meeting import Meeting
from parallel.pipeline.grouped_links import GroupedLinks, connect_column
from parallel.pipeline.links import Links, connect
from parallel.pipeline.overlap import overlap_of
from parallel.pipeline.record import Recorder
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.segments import Segments
from parallel.process import Groups
from parallel.shards import Piece
from parallel.warm_up import use_communicators
from parallel.watch import HangError, Need, PeerError, Watchdog
from parallel.zero.optimizer import ZeroOptimizer
from parallel.zero.optimizer import build as build_optimizer
from parallel.zero.sets import ReplicaGroups
from train import environment, flops
from train.checkpoint.saver import Checkpoints, Saved, read_pieces
from train.config import RunConfig
from train.data.rows.ahead import Ahead, AtOnce
from train.data.rows.blend import Stream, check_epochs, open_stream
from train.data.rows.valid import Validation, open_validation
from train.deterministic import check_variables
from train.device import uses_cuda
from train.job import Job, held
from train.model.attention.cores import Core
from train.model.attention.installed import build_core, check_library
from train.model.config import ModelConfig
from train.model.init import InitialValues, init_weights, materialise
from train.model.kernels import KERNELS, choose_kernels
from train.model.packing import ByDocument, OneText, Packing
from train.model.parts import Parts
from train.model.recompute import Recompute
from train.model.transformer import Transformer
from train.precision.build import build_engines, check_widths, choose_engine, fp8_weights, row_codec
from train.precision.config import PrecisionConfig
from train.precision.engine import Engine
from train.precision.grads import attach_main_grads
from train.precision.reference import QuantisedWeights
from train.precision.transformer_engine import LibraryWeights
from train.prompts import Prompts, read_prompts
from train.recipe.balance import freeze_routers
from train.recipe.ema import Ema
from train.recipe.optimizer import rules as update_rules
from train.stage import Reader, Record, Stage, WeightGradients
from train.track.events import Events
from train.track.metrics import METRICS, of_run
from train.track.patience import Patience
from train.track.vector import Metrics

__all__ = ["HangError", "Meeting", "PeerError", "assemble", "device_of", "join", "load_model", "meet"]

MakeEngines = Callable[..., Mapping[str, Engine]]
# After which process groups give up by themselves, at least; and how much earlier the watchdog speaks.
GROUP_TIMEOUT_S, WATCHDOG_LEAD_S = 600.0, 120.0
# Of weights and activations; fp8 is the format of products alone.
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def device_of(config: RunConfig) -> str:
    """The kind of device that this rank computes on. ValueError for what cannot be done there, or by so many ranks."""
    place = environment.read()
    process.check_size(config.parallel, place.world_size)
    cuda = uses_cuda("run.device", config.run.device, place.local_world_size or 1)
    if cuda and config.profile.steps:
        raise ValueError(f"profile.steps={config.profile.steps}: steps can be recorded with run.device=cpu only")
    if cuda and config.run.deterministic:
        check_variables()
    if cuda:
        check_library(config.run.attention_kernel)
    device = "cuda" if cuda else "cpu"
    if config.precision.name == "fp8":
        choose_engine(config.precision, device)
    choose_kernels(config.run.kernels, device)
    return device


def meet(
    config: RunConfig, say: Callable[[str], object], end_hung: Callable[[str], object]
) -> AbstractContextManager[Meeting]:
    """Where the ranks of a run come together before there are process groups; `parallel.meeting.meet` says more."""
    place = environment.read()
    return meeting.meet(place.rank, place.world_size, config.run.hang_timeout_s or GROUP_TIMEOUT_S, say, end_hung)


@contextmanager
def join(
    config: RunConfig,
    met: Meeting,
    end_hung: Callable[[str], object],
    note: Callable[[str | None], object] = lambda _: None,
) -> Iterator[Groups]:
    """This rank's process groups, for ranks that have met, until all leave.

    end_hung: called from another thread, with a sentence, when this rank has waited `run.hang_timeout_s` for others.
    note: is given the sentence of a long wait, and None when it is over; from there too.
    After an exception nobody waits for the others: the process is expected to end, which is how they hear of it.
    Whatever torch says of a lost rank is a PeerError.
    """
    limit_s = config.run.hang_timeout_s
    timeout_s = max(GROUP_TIMEOUT_S, (limit_s or 0) + WATCHDOG_LEAD_S)
    groups = met.watch.wait(
        Need("numbers", "the process groups of all ranks", None),
        lambda: process.start(
            config.parallel, device_of(config), config.mirrored, config.shared_ends, timeout_s, met.store
        ),
    )
    met.close()
    dog = Watchdog(groups.watch, limit_s, end_hung, note) if limit_s is not None else nullcontext()
    with dog, groups.watch.losses():
        if groups.kernels == "cuda":
            use_communicators(groups)
        yield groups
        process.stop(groups)


@dataclass(frozen=True)
class Files:
    """What a rank's part of a run reads and writes. reader: makes what reads `train_rows` for its steps."""

    train_rows: Stream
    validation: Validation
    prompts: Prompts | None
    checkpoints: Checkpoints
    reader: type[Ahead] | type[AtOnce] = Ahead


@dataclass(frozen=True)
class Tapes:
    """What a stage writes its passes on: makes the record of a micro-batch, and the sink of weight gradients."""

    record: Callable[[], Record] = Segments
    sink: Callable[[], WeightGradients] = WeightGradients


def assemble(config: RunConfig, groups: Groups, make_engines: MakeEngines = build_engines) -> Job:
    """Open this rank's files and build its part of the run, with its initial weights.

    make_engines: other arithmetics of matrix products, for comparisons; takes what `build_engines` takes.
    Raises ValueError for what needs ranks or data to be seen: missing or changed tokens, a split too short, or matrices
    that the engine of this device cannot multiply by.
    """
    torch.manual_seed(config.train.seed)  # nothing in a step draws from it; what ever will does so reproducibly
    return put_together(config, groups, open_files(config, groups), make_engines)


def open_files(config: RunConfig, groups: Groups) -> Files:
    """The tokens, texts and checkpoints of a run. Raises ValueError for missing or changed ones, or too few tokens."""
    train, data = config.train, config.data
    train_rows = open_stream(data, "train", train.seq_len, train.seed, past=config.readings)
    validation = open_validation(data, train.seq_len, config.evaluate.num_sequences)
    check_epochs(train_rows, config.num_sequences, data.max_epochs)
    root, told = config.checkpoint.folder(config.run.dir), partial(add_save, _events(config))
    checkpoints = Checkpoints(root, config.checkpoint, groups.checkpoint, told)
    return Files(train_rows, validation, read_prompts(config), checkpoints)


def _events(config: RunConfig) -> Events:
    return Events(Path(config.run.dir), alert=config.track.alert)


def add_save(events: Events, saved: Saved) -> None:
    """What became of a save, among the events of its run."""
    if saved.trouble:
        events.add("save_failed", step=saved.step, duration_s=round(saved.duration_s, 3), reason=saved.trouble)
        return
    times = {"stalled_s": round(saved.stalled_s, 3), "duration_s": round(saved.duration_s, 3)}
    events.add("save", step=saved.step, num_bytes=saved.num_bytes, **times)


def put_together(
    config: RunConfig,
    groups: Groups,
    files: Files,
    make_engines: MakeEngines = build_engines,
    tapes: Tapes | None = None,
    weights: QuantisedWeights | LibraryWeights | None = None,
    kernels: str | None = None,
    core: Core | None = None,
) -> Job:
    """This rank's part of the run over files that are open; `assemble` says more.

    weights: what holds quantised weights, and so who multiplies in FP8; core: who computes attention. None is what the
    device has. kernels: a key of `KERNELS`; None is what `run.kernels` means here. ValueError for a
    `run.attention_kernel` that the device has not.
    """
    place = environment.read()
    weights = weights or fp8_weights(config.precision, groups.kernels)
    engines = make_engines(config.precision, groups.kernels, weights)
    codec = row_codec(engines, config.model.hidden_size)
    kernels = kernels or choose_kernels(config.run.kernels, groups.kernels)
    dispatch = build_dispatch(config.model.n_routed_experts, groups, codec, fused=kernels == "triton")
    core = core or build_core(config.run.attention_kernel, config.attention_demand, groups.device)
    rows_seen = packing(config, files.train_rows.end_of_document, core, groups.host)
    stages = build_stages(config, dispatch, groups, engines, rows_seen, tapes, kernels)
    models = [stage.model for stage in stages.values()]
    if isinstance(weights, LibraryWeights):
        for model in models:
            check_widths(model, config.precision)
    optimizer = optimizer_of(config, groups, models, weights.changed)
    position = config.placement.position

    def fence(stage: int) -> None:
        optimizer.fence(position(stage))

    rank, links, recorder = groups.mesh.pp_rank, connected(config, groups), Recorder(groups.mesh.pp_rank, groups.watch)
    readers = {number: Reader(stage.model) for number, stage in stages.items()}
    overlap = overlap_of(groups.host.runs_ahead)
    return Job(
        config=config,
        groups=groups,
        recipe=config.recipe(),
        stages=stages,
        runtime=Runtime(rank, stages, links, recorder, overlap, fence),
        readers=readers,
        reading=Runtime(rank, readers, links, recorder, overlap, fence),
        recorder=recorder,
        dispatch=dispatch,
        optimizer=optimizer,
        ema=Ema(optimizer.state(), config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
        train_rows=files.train_rows,
        reader=files.reader(files.train_rows.rows, groups.host.pin),
        validation=files.validation,
        prompts=files.prompts,
        patience=Patience(config.evaluate.patience, config.evaluate.min_improvement),
        metrics=run_metrics(config),
        checkpoints=files.checkpoints,
        flops_per_token=flops.training_flops_per_token(config.model, config.train.seq_len),
        one_machine=(place.local_world_size or 1) == place.world_size,
    )


def optimizer_of(
    config: RunConfig, groups: Groups, models: Sequence[Transformer], on_new_weights: Callable[[], None]
) -> ZeroOptimizer:
    """What updates a rank's slices of the model, with masters as drawn; their parameters get a `main_grad` each."""
    placement = config.placement
    positions = [placement.position(stage) for stage in placement.stages_on(groups.mesh.pp_rank)]
    rule, frozen = update_rules(config.optimizer), config.frozen
    for model in models:
        freeze_routers(model, frozen)
    optimizer = build_optimizer(
        config.zero.engine,
        [
            (info, param, *rule(info.name, info.global_shape))
            for info, param in held(models, positions, placement.num_slices)
        ],
        ReplicaGroups(groups.dense, groups.expert, groups.embedding, groups.world),
        clip_grad_norm=config.optimizer.clip_grad_norm,
        frozen=frozen,
        host=groups.host,
        watch=groups.watch,
        kernels=groups.kernels,
        on_new_weights=on_new_weights,
    )
    for model in models:
        init_masters(model, config.train.seed, optimizer.state())
        attach_main_grads(model)
    return optimizer


def connected(config: RunConfig, groups: Groups) -> Links | GroupedLinks:
    """This rank's links to the stages before and behind its own, as the device's messages are."""
    rank, dtype = groups.mesh.pp_rank, DTYPES[config.precision.name]
    if groups.kernels == "cuda":
        column = connect_column(config.placement, groups.mesh, groups.device, groups.timeout)
        return GroupedLinks(rank, column, dtype, groups.device, groups.watch)
    link_groups = connect(config.placement, groups.mesh, groups.device, groups.timeout)
    return Links(rank, link_groups, dtype, groups.device, groups.watch)


def run_metrics(config: RunConfig, sources: Sequence[str] | None = None) -> Metrics:
    """What this run reports: the balance losses of devices and of communication only where they weigh something.

    sources: those that validate, where they are others than the run's.
    """
    weights = {
        "train/device_balance_loss": config.moe.device_aux_coeff,
        "train/comm_balance_loss": config.moe.comm_aux_coeff,
    }
    unreported = {name for name, weight in weights.items() if not weight}
    return Metrics(
        replace(each, is_reported=each.is_reported and each.name not in unreported)
        for each in of_run(METRICS, config.data.valid_names if sources is None else sources)
    )


def init_masters(model: Transformer, seed: int, state: Mapping[str, Sequence[Piece]]) -> None:
    """Give the masters in an optimizer's state the values that the weights of `model` were rounded from.

    Masters made of bfloat16 weights would all begin on its grid, and no weight would move before its master had gone
    half a step of the grid: at a warm-up's rates that is several updates, the same for all weights.
    """
    values = InitialValues(model, seed)
    for name, weight in model.named_parameters():
        for piece in state.get(f"master.{name}", ()):
            if piece.tensor.dtype != weight.dtype:
                values.copy_to(piece.tensor, name, piece.offset)


def packing(config: RunConfig, end_of_document: int, core: Core, host: Host) -> Packing:
    """What the documents of a row see of each other."""
    if not config.data.document_mask:
        return OneText(core)
    return ByDocument(end_of_document, core, lambda numbers: host.read("documents", numbers)[0])


def build_stages(
    config: RunConfig,
    dispatch: Dispatch,
    groups: Groups,
    engines: Mapping[str, Engine],
    packing: Packing | None = None,
    tapes: Tapes | None = None,
    kernels: str | None = None,
) -> dict[int, Stage]:
    """This rank's slices of the model: laid out without memory, then filled with (seed, name)'s values.

    Slices that both need the embedding share one tensor. kernels: a key of `KERNELS`; None is what `run.kernels` means
    here.
    """
    tapes = tapes or Tapes()
    placement, pp_rank = config.placement, groups.mesh.pp_rank
    slices = config.slices
    computes = KERNELS[kernels or choose_kernels(config.run.kernels, groups.kernels)](groups.kernels)
    stages: dict[int, Stage] = {}
    embedding: nn.Parameter | None = None
    for number in placement.stages_on(pp_rank):
        sink, parts = tapes.sink(), slices[placement.position(number)]
        with torch.device("meta"):
            recompute = Recompute(config.recompute)
            model = Transformer(config.model, dispatch, engines, computes, sink, parts, recompute, packing)
        init_weights(model, config.train.seed, DTYPES[config.precision.name], groups.device)
        if parts.embedding or parts.mtp:
            embedding = embedding if embedding is not None else model.embed_tokens.weight
            model.embed_tokens.weight = embedding
        stages[number] = Stage(model, sink, tapes.record)
    return stages


def load_model(
    checkpoint: Path,
    config: ModelConfig,
    precision: PrecisionConfig,
    device: torch.device,
    weights: str = "master",
    make_engines: MakeEngines = build_engines,
    packing: Packing | None = None,
    with_depths: bool = True,
) -> Transformer:
    """The whole model of a step folder in this process, whatever ranks saved it: for forward passes, without a run.

    weights: "master", or "ema" for the moving average. They are rounded to `precision`, which need not be the run's.
    make_engines: as `assemble` takes it. with_depths: whether prediction depths are needed, too.
    Raises ValueError as `read_pieces` and `fp8_weights` do, and for matrices that the engine cannot multiply by.
    """
    dtype, quantised = DTYPES[precision.name], fp8_weights(precision, device)
    engines = make_engines(precision, device, quantised)
    with torch.device("meta"):
        whole = Parts.all(config)
        parts = whole if with_depths else replace(whole, mtp=False)
        dispatch = LocalDispatch(config.n_routed_experts, codec=row_codec(engines, config.hidden_size))
        model = Transformer(config, dispatch, engines, parts=parts, packing=packing)
    if isinstance(quantised, LibraryWeights):
        check_widths(model, precision)
    materialise(model, dtype, device)
    named = {f"{weights}.{name}": parameter for name, parameter in model.named_parameters()}
    flat = {name: tensor.detach().view(-1) for name, tensor in (named | dict(model.named_buffers())).items()}
    read_pieces(
        checkpoint,
        {name: [Piece(0, tensor)] for name, tensor in flat.items()},
        {name: tensor.numel() for name, tensor in flat.items()},
    )
    return model.eval()
