"""What FP8 does to one step: the loss and the gradients of the same weights and text, beside FP32's.

    OMP_NUM_THREADS=1 python -m benchmarks.fp8_noise checkpoint=STEP_FOLDER [sequences=48]

checkpoint   of a run with precision=fp8, whose config says which modules multiply in FP8.
sequences    of the training text, in micro-batches of 8, in another order than the run read them,
             without masks between documents.

loss         of the main model, its relative distance from FP32's.
gradients    |g - g of FP32|² over |g of FP32|², in percent, by kind of matrix. Rounding is noise to an optimizer: Adam
             divides by the root of its running mean of g², so noise of 1 % makes steps half a percent shorter.

Columns: bf16; fp8; fp8 with one of its three products in FP8 alone, or with all scales powers of two.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._engines import MakeEngines, partly
from benchmarks.fp8_error import table
from train import compose
from train.assemble import load_model
from train.checkpoint.step_folders import CONFIG_FILE
from train.config import RunConfig
from train.data.rows.blend import open_stream
from train.job import EMBEDDING
from train.model.loss import LossTerms
from train.precision.build import build_engines
from train.precision.config import MODULE_KEYS, PrecisionConfig
from train.precision.grads import attach_main_grads

MICRO_BATCH = 8


def sides(fp8: PrecisionConfig) -> dict[str, tuple[PrecisionConfig, MakeEngines]]:
    """What is compared with fp32, by name."""
    return {
        "bf16": (PrecisionConfig("bf16"), build_engines),
        "fp8": (fp8, build_engines),
        **{f"{product} alone": (fp8, partly([product])) for product in ("fprop", "dgrad", "wgrad")},
        "2^n scales": (dataclasses.replace(fp8, power_of_two_scales=True), build_engines),
    }


def kind(name: str) -> str:
    """What a parameter is counted as: its key of `precision.modules`, or its own name."""
    *parents, module = name.removesuffix(".weight").split(".")
    if "experts" in parents:
        return "experts"
    if name == EMBEDDING or module == "gate":
        return module
    return MODULE_KEYS.get(module, "norms")


def step(
    folder: Path, config: RunConfig, precision: PrecisionConfig, make: MakeEngines, batches: list[Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """(loss in nats per token, gradients by name) of a checkpoint's weights in one arithmetic."""
    model = load_model(folder, config.model, precision, torch.device("cpu"), make_engines=make)
    attach_main_grads(model)
    num_targets = sum(batch[:, 1:].numel() for batch in batches)
    per_depth = config.mtp.loss_weight / max(1, config.model.num_nextn_predict_layers)
    terms = LossTerms(main=1 / num_targets, mtp=per_depth / num_targets, balance=0.0)
    loss = 0.0
    for batch in batches:
        output = model(batch, terms)
        output.total.backward()
        loss += float(output.metrics["train/loss"]) / num_targets
    return loss, {name: parameter.main_grad for name, parameter in model.named_parameters()}


def distances(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """|g - wanted|² / |wanted|² of every kind of parameter, and of "all"."""
    wrong: dict[str, float] = defaultdict(float)
    whole: dict[str, float] = defaultdict(float)
    for name, gradient in wanted.items():
        for each in (kind(name), "all"):
            wrong[each] += float((gradients[name].double() - gradient).square().sum())
            whole[each] += float(gradient.double().square().sum())
    return {each: wrong[each] / whole[each] for each in whole}


def measure(folder: Path, num_sequences: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """side -> relative distance of the loss, and side -> kind -> share of the squared gradient."""
    config = compose.load(folder / CONFIG_FILE)
    if config.precision.name != "fp8":
        raise SystemExit(f"checkpoint={folder} is of a run with precision={config.precision.name}: it must be fp8")
    rows = open_stream(config.data, "train", config.train.seq_len, config.train.seed + 1)
    starts = range(0, num_sequences, MICRO_BATCH)
    batches = [rows.rows(start, min(MICRO_BATCH, num_sequences - start)) for start in starts]
    base, wanted = step(folder, config, PrecisionConfig("fp32"), build_engines, batches)
    losses, noise = {}, {}
    for name, (precision, make) in sides(config.precision).items():
        loss, gradients = step(folder, config, precision, make, batches)
        losses[name], noise[name] = loss / base - 1, distances(gradients, wanted)
    return losses, noise


def main(arguments: list[str]) -> None:
    words = {"sequences": "48"} | dict(word.split("=", 1) for word in arguments if "=" in word)
    if words.keys() != {"checkpoint", "sequences"} or not all("=" in word for word in arguments):
        raise SystemExit(f"settings are checkpoint=STEP_FOLDER and sequences=INT, not {' '.join(arguments) or 'none'}")
    folder = Path(words["checkpoint"])
    if not (folder / CONFIG_FILE).exists():
        raise SystemExit(f"checkpoint={folder} is no step folder: it has no {CONFIG_FILE}")
    if not words["sequences"].isdigit() or not int(words["sequences"]):
        raise SystemExit(f"sequences={words['sequences']} must be a whole number above 0")
    losses, noise = measure(folder, int(words["sequences"]))
    kinds = next(iter(noise.values()))
    rows = [["loss", *(f"{loss:+.3%}" for loss in losses.values())]]
    rows += [[each, *(f"{100 * side[each]:.2f}" for side in noise.values())] for each in kinds]
    print(table(["", *noise], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
