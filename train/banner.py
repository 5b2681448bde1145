"""What a run says of itself before its first step: the few lines that show a mistake before it costs an hour."""

from __future__ import annotations

from train import flops
from train.config import RunConfig
from train.data.rows.blend import Exposure
from train.track.console import short


def banner(
    config: RunConfig, device: str, num_threads: int, engines: str, exposures: list[Exposure], finished_steps: int
) -> str:
    """Model, machine, recipe and data of a run, a line each, and one for what of the recipe is seldom meant.

    Args:
        device: where rank 0 computes, as "cpu" or "cuda:0 (NVIDIA H800)".
        num_threads: of each rank, where it computes on a CPU.
        engines: who multiplies matrices.
        exposures: what the whole run sees of each of its sources.
        finished_steps: 0 for a run that begins.
    """
    recipe = config.recipe()
    tokens = recipe.tokens_before(recipe.num_steps)
    sizes = sorted({recipe.at(step).num_sequences for step in (0, recipe.num_steps - 1)})
    per_step = " to ".join(short(size * config.train.seq_len) for size in sizes)
    begins = f"from step {finished_steps + 1} on, " if finished_steps else ""
    phases = len(config.lr_scheduler.phases)
    return "\n".join(
        [
            f"model   {_model(config)}",
            f"ranks   {_ranks(config)} on {device}{f', {num_threads} threads each' if device == 'cpu' else ''}; "
            f"{config.precision.name}, products by {engines}, optimizer {config.optimizer.name} sharded by "
            f"{config.zero.engine}",
            f"recipe  {begins}{recipe.num_steps:,} steps of {per_step} tokens, {short(tokens)} in all; learning rate "
            f"{config.lr_scheduler.lr:g} after {config.lr_scheduler.warmup_steps:,} steps of warm-up, then "
            f"{f'{phases} phases' if phases else 'constant'}",
            *(f"note    {remark}" for remark in recipe.remarks()),
            f"data    {', '.join(_source(each) for each in exposures)}; everything of the run lies in {config.run.dir}",
        ]
    )


def _model(config: RunConfig) -> str:
    model, counts = config.model, flops.parameter_counts(config.model)
    parts = [f"{short(counts.total)} parameters, {short(counts.activated)} activated per token"]
    if model.num_nextn_predict_layers:
        parts.append(f"{short(counts.mtp)} more for prediction depths")
    parts.append(f"{model.num_hidden_layers} layers of width {model.hidden_size}")
    if model.n_routed_experts:
        parts.append(f"{model.num_experts_per_tok} of {model.n_routed_experts} experts per token")
    return ", ".join(parts)


def _ranks(config: RunConfig) -> str:
    parallel = config.parallel
    total = parallel.pp * parallel.dp
    if total == 1:
        return "1"
    parts = [f"{total} = pp {parallel.pp} x dp {parallel.dp}"]
    if parallel.pp > 1:
        parts.append(config.pipeline.schedule)
    if parallel.ep > 1:
        parts.append(f"experts over {parallel.ep} ({parallel.dispatch})")
    if parallel.nodes > 1:
        parts.append(f"{parallel.nodes} nodes")
    return ", ".join(parts)


def _source(each: Exposure) -> str:
    share = "" if each.share == 1 else f" {each.share:.1%}"
    return f"{each.name}{share} {each.num_epochs:.2g} epochs"
