"""`python -m launch evaluate checkpoint=FOLDER [data.source=PATH]`: loss and perplexity of a checkpoint, without a run.

    python -m launch evaluate checkpoint=runs/tiny
    python -m launch evaluate checkpoint=runs/tiny data.source=book.txt num_sequences=all out=book.json
    python -m launch evaluate checkpoint=runs/tiny 'data.valid_sources=[{name: web, source: web.jsonl}]' weights=ema

One process, whatever topology wrote the checkpoint. By default it reads what the run evaluates on, and finds what the
run has found: the same sequences one by one through the same layers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from launch.generate import STATES, check_average, device_of, find_tokenizer, precision_of
from launch.settings import EvaluateSettings
from parallel.host import host_of
from train import compose
from train.assemble import load_model, packing, run_metrics
from train.checkpoint.goes_on import read_state
from train.checkpoint.state import TrainState
from train.checkpoint.step_folders import CONFIG_FILE, find_checkpoint
from train.config import RunConfig
from train.data.config import DataConfig
from train.data.meta import META, TOKENIZER, Meta
from train.data.prepare.one_source import prepare
from train.data.rows.blend import prepared_fingerprint
from train.data.rows.valid import Portion, Validation, open_folder, open_validation
from train.data.tokenizer import Tokenizer
from train.evaluate import counts, metrics_of
from train.files import replace_durably
from train.model.attention.choice import AUTO
from train.model.attention.installed import build_core
from train.model.loss import NO_LOSS
from train.model.tape import Inline, drive
from train.model.transformer import Transformer
from train.settings import read
from train.track.vector import Metrics

# Keys of `data` that say which text is meant.
TEXTS = ("data.source", "data.blend", "data.valid_sources")


def evaluate_command(words: Sequence[str]) -> int:
    """Prints a table of losses, and writes them as JSON. ValueError, before anything is loaded, for what cannot be."""
    ours = [word for word in words if not word.startswith("data.")]
    request = read(EvaluateSettings, ours, "evaluate")
    device, folder = device_of(request.device), find_checkpoint(request.checkpoint, "checkpoint")
    state, config = read_state(folder), compose.load(folder / CONFIG_FILE)
    if request.weights == "ema":
        check_average(folder)
    tokenizer = find_tokenizer(config, state, request.tokenizer)
    config = _with_length(config, request)
    asked = [word for word in words if word.startswith("data.")]
    data, validation = _texts(asked, request, config, state, tokenizer)
    precision = precision_of(config, request.precision)
    asked_for = dataclasses.replace(config, data=data, precision=precision)
    core = build_core(AUTO, asked_for.attention_demand, device)
    model = load_model(
        folder, config.model, precision, device, STATES[request.weights],
        packing=packing(asked_for, tokenizer.eod, core, host_of(device)), with_depths=False,
    )  # fmt: skip
    metrics = run_metrics(dataclasses.replace(config, data=data), [each.name for each in validation.portions])
    values = losses(model, validation, metrics, device)
    print(f"{folder} (step {state.step}): {request.weights} weights in {precision.name} on {device}")
    print(table(validation, values), flush=True)
    if request.out is not None:
        about = {"checkpoint": str(folder), "step": state.step, "weights": request.weights}
        about |= {"precision": precision.name, "seq_len": config.train.seq_len}
        body = json.dumps({**about, **numbers(validation, values)}, indent=1)
        replace_durably(request.out, f"{body}\n".encode())
        print(f"written: {request.out}", flush=True)
    return 0


def losses(model: Transformer, validation: Validation, metrics: Metrics, device: torch.device) -> dict[str, float]:
    """The metrics of an evaluation, put together as a run of one process does it."""
    measured: dict[str, torch.Tensor] = {}
    # A bar that moves on a terminal, a line now and then in a log.
    often_s = 0.1 if sys.stderr.isatty() else 10.0
    for number in tqdm(range(validation.num_sequences), "evaluating", unit="seq", mininterval=often_s, leave=False):
        tokens = validation.sequence(number).to(device)
        with torch.no_grad():
            _, findings = drive(model.steps(tokens, None, NO_LOSS, Inline()))
        metrics.add(measured, dict.fromkeys(metrics_of(validation, number), findings.metrics["train/loss"]))
    row = metrics.pack(measured, lambda tensor: tensor.to(device))
    return metrics.unpack([row.tolist()], counts(validation))


def numbers(validation: Validation, values: dict[str, float]) -> dict[str, Any]:
    """What is known of each source and of their mean, as plain values."""

    def entry(num_sequences: int, num_targets: int, loss: float) -> dict[str, Any]:
        shown = {"loss": loss, "perplexity": perplexity(loss)}
        # Strict JSON has no word for what is not finite.
        plain = {name: value if math.isfinite(value) else str(value) for name, value in shown.items()}
        return {"num_sequences": num_sequences, "num_targets": num_targets, **plain}

    mean = [portion for portion in validation.portions if portion.in_mean]
    whole = entry(sum(each.num_sequences for each in mean), validation.num_targets, values["valid/loss"])
    each = {
        portion.name: entry(portion.num_sequences, portion.num_targets, _loss_of(portion, values))
        for portion in validation.portions
    }
    return {**whole, "sources": each}


def table(validation: Validation, values: dict[str, float]) -> str:
    """Source by source, and the mean where there are several in it."""
    found = numbers(validation, values)
    lines = [f"{'source':<24}{'sequences':>11}{'tokens':>14}{'loss, nats':>13}{'perplexity':>13}"]
    rows = dict(found["sources"])
    if sum(portion.in_mean for portion in validation.portions) > 1:
        rows["mean"] = found
    for name, row in rows.items():
        lines.append(
            f"{name:<24}{row['num_sequences']:>11,}{row['num_targets']:>14,}{float(row['loss']):>13.6f}"
            f"{float(row['perplexity']):>13.4f}"
        )
    return "\n".join(lines)


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that is no number of this machine's."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _loss_of(portion: Portion, values: dict[str, float]) -> float:
    return values[f"valid/{portion.name}/loss" if portion.is_reported else "valid/loss"]


def _with_length(config: RunConfig, request: EvaluateSettings) -> RunConfig:
    """With another length of sequences, where one is asked for. ValueError for one that the model cannot read."""
    if request.seq_len is None:
        return config
    most = config.model.max_position_embeddings
    if request.seq_len > most:
        raise ValueError(f"seq_len={request.seq_len} is above model.max_position_embeddings={most}")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=request.seq_len))


def _texts(
    asked: Sequence[str], request: EvaluateSettings, config: RunConfig, state: TrainState, tokenizer: Tokenizer
) -> tuple[DataConfig, Validation]:
    """What is evaluated on, prepared: the run's own validation text, or what the words of `data` name."""
    num_sequences, seq_len = request.num_sequences_of(config.evaluate.num_sequences), config.train.seq_len
    if not asked:
        data = config.data
        if prepared_fingerprint(data) not in state.fingerprints.get("data", ""):
            raise ValueError(
                f"{data.folder} was prepared anew since the run, with another validation split: name a text with "
                "data.source=PATH, or the folder of the run's tokens with data.dir=PATH"
            )
        validation = open_validation(data, seq_len, num_sequences)
    else:
        data = _data(asked, config, tokenizer, request.tokenizer)
        if (data.folder / META).exists() and not any(word.startswith(TEXTS) for word in asked):
            validation = open_folder(data, seq_len, num_sequences)
        else:
            if any(word.startswith(TEXTS) for word in asked):
                _prepare(data, tokenizer)
            validation = open_validation(data, seq_len, num_sequences)
    for portion in validation.portions:
        meta = portion.rows.tokens.meta
        if meta.tokenizer_digest != tokenizer.digest:
            raise ValueError(
                f"{portion.rows.tokens.folder} was prepared with another tokenizer than the run's: its tokens mean "
                "nothing to this model; name its text with data.source=PATH"
            )
    return data, validation


def _data(asked: Sequence[str], config: RunConfig, tokenizer: Tokenizer, given: Path | None) -> DataConfig:
    """`data` of the run, changed by words: of another text where one is named, else of its own in another folder.

    A text is taken whole; own sources alone stand for themselves, without the run's split.
    """
    keys = {word.partition("=")[0] for word in asked}
    if not keys & set(TEXTS):
        moved = compose.changed(config, asked).data
        if "data.dir" not in keys:
            raise ValueError(f"{asked[0]} says how a text is read, and there is none: name one with data.source=PATH")
        return dataclasses.replace(moved, valid_sources=())
    path = str(given or next(iter(config.data.sources.values())).folder / TOKENIZER)
    other = config.data.for_other_text(path)
    if not keys & {"data.source", "data.blend"}:
        # Beside the run's tokens, where the run has prepared the same source perhaps.
        other = dataclasses.replace(other, dir=str(config.data.folder))
    # Halves of a split that is not made: a run's rules want text for both.
    both = dataclasses.replace(config, data=dataclasses.replace(other, valid_fraction=0.5))
    changed = compose.changed(both, asked).data
    whole = 1.0 if keys & {"data.source", "data.blend"} else 0.0
    return changed if "data.valid_fraction" in keys else dataclasses.replace(changed, valid_fraction=whole)


def _prepare(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Meta]:
    """Prepare what is to be evaluated on, unless it is there."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return {name: prepare(source, say) for name, source in {**data.validating, **data.evaluated}.items()}
