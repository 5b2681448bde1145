"""What multi-token prediction does to the main model, and how many of its drafts hold.

    python -m benchmarks.mtp [steps=300 seeds=3 out=runs/mtp] [KEY=VALUE of the config, for all runs]

For every seed the same model is trained twice on the same tokens in the same order from the same initial values: with
one prediction depth and without. Then, for the one with it:

on text       share of the validation text's tokens for which the depth's draft, made one token ahead, is the token
              that the main model finds likeliest there. Both read the text itself.
on its own    share of the drafts that hold while the model goes on by itself, greedily, from beginnings of that text,
              and the tokens that a pass of the main model gives then.

A run takes some minutes on one core. Each leaves a file in `out` when it is done and is not run again; one that was
interrupted goes on from its last checkpoint. Table on standard output, picture in `out`/mtp.png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._sides import Neighbours
from launch.prepare import prepare_command
from train import compose
from train.assemble import load_model
from train.checkpoint.step_folders import find_checkpoint
from train.data.rows.blend import open_stream
from train.files import replace_durably
from train.generate import Transcript, generate
from train.model.decode import Decoder, Drafter
from train.model.transformer import Transformer
from train.track.metrics_file import read_metrics
from train.view.curves import COLORS, FAINT, INK, headline, paper, save

DEFAULTS = {"steps": "300", "seeds": "3", "out": "runs/mtp"}
DEPTHS = {"with": 1, "without": 0}
NUM_TEXTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 64
NUM_EVALUATIONS = 10


def settings(side: str, seed: int, steps: int, folder: Path, more: list[str]) -> list[str]:
    """One run's, all of them the same but for the depths."""
    return [
        *("zero.engine=native", "run.num_threads=1", "run.device=cpu", "track.wandb=disabled"),
        *(
            "checkpoint.interval=50",
            f"train.max_steps={steps}",
            f"evaluate.interval={max(1, steps // NUM_EVALUATIONS)}",
        ),
        *more,
        *(f"model.num_nextn_predict_layers={DEPTHS[side]}", f"train.seed={seed}", f"run.dir={folder}"),
    ]


def train(wanted: list[str], folder: Path) -> None:
    """SystemExit with the end of its log when the run fails."""
    prepare_command(compose.compose(wanted).data)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "train", *wanted]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text()[-2000:]}")


def result(side: str, seed: int, steps: int, out: Path, more: list[str]) -> dict[str, Any]:
    """A finished run's numbers, from its file or from running it."""
    folder, file = out / f"{side}-{seed}", out / f"{side}-{seed}.json"
    wanted = settings(side, seed, steps, folder, more)
    if file.exists():
        found = json.loads(file.read_text())
        if found["settings"] != wanted:
            raise SystemExit(f"{file} is of other settings ({' '.join(found['settings'])}): choose another out=")
        return found
    print(f"{side} prediction depth, seed {seed}", flush=True)
    train(wanted, folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "valid/loss" in row]
    found = {
        "settings": wanted,
        "tokens": [row["train/consumed_tokens"] for row in rows],
        "valid": [row["valid/loss"] for row in rows],
    }
    if DEPTHS[side]:
        found |= drafts(folder)
    replace_durably(file, json.dumps(found, indent=1).encode())
    return found


def drafts(folder: Path) -> dict[str, float]:
    """How many of a run's drafts hold."""
    config = compose.load(folder / "config.yaml")
    checkpoint = find_checkpoint(folder, "checkpoint")
    model = load_model(checkpoint, config.model, config.precision, torch.device("cpu"))
    rows = open_stream(config.data, "valid", config.train.seq_len, order="sequential")
    texts = rows.rows(0, min(NUM_TEXTS, rows.num_rows)).tolist()
    record = Transcript()
    for text in texts:
        once = Transcript()
        for _ in generate(model, text[:PROMPT_TOKENS], NEW_TOKENS, once, stop=rows.end_of_document, speculative=True):
            pass
        record.choices += once.choices[1:]  # the first one comes of the prompt's pass
        record.num_forwards += once.num_forwards
        record.num_tried.append(sum(once.num_tried))
        record.num_accepted.append(sum(once.num_accepted))
    return {
        "on_text": statistics.fmean(agreement(model, text) for text in texts),
        "on_its_own": sum(record.num_accepted) / max(1, sum(record.num_tried)),
        "tokens_per_pass": len(record.choices) / max(1, record.num_forwards),
    }


def agreement(model: Transformer, text: list[int]) -> float:
    """For how many of a text's tokens the first depth, one token ahead, has the main model's choice."""
    decoder, depth = Decoder(model, len(text)), Drafter(model, len(text)).depths[0]
    states = decoder.read(text)
    # Position i of the depth joins token i + 1 and drafts what the main model says at i + 1.
    drafted = decoder.logits(depth.read(states[:, :-1], text[1:])).argmax(-1)
    return float((drafted == decoder.logits(states[:, 1:]).argmax(-1)).double().mean())


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row per seed, then the means with their standard errors."""
    head = ["seed", "valid with", "without", "difference", "on text", "on its own", "tokens per pass"]
    numbers = [
        [a["valid"][-1], b["valid"][-1], a["valid"][-1] - b["valid"][-1], *(a[key] for key in DRAFT_KEYS)]
        for a, b in zip(runs["with"], runs["without"], strict=True)
    ]
    forms = ["{:.4f}", "{:.4f}", "{:+.4f}", "{:.1%}", "{:.1%}", "{:.2f}"]
    rows = [[str(seed), *map(str.format, forms, row)] for seed, row in enumerate(numbers)]
    columns = list(zip(*numbers, strict=True))
    rows.append(["mean", *map(str.format, forms, map(statistics.fmean, columns))])
    if len(numbers) > 1:
        errors = [statistics.stdev(column) / len(column) ** 0.5 for column in columns]
        rows.append(
            ["error", *(form.replace("+", "").format(error) for form, error in zip(forms, errors, strict=True))]
        )
    return "\n".join("  ".join(cell.rjust(12) for cell in row) for row in [head, *rows])


DRAFT_KEYS = ("on_text", "on_its_own", "tokens_per_pass")


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Validation losses over tokens above, their differences below."""
    figure, (losses, differences) = paper((2.6, 1.6))
    tokens = runs["with"][0]["tokens"]
    curves = {side: np.array([each["valid"] for each in of]) for side, of in runs.items()}
    for (side, each), color in zip(curves.items(), COLORS, strict=False):
        losses.plot(tokens, each.T, color=color, linewidth=0.7, alpha=0.4)
        losses.plot(tokens, each.mean(0), color=color, linewidth=1.9, label=f"{side} prediction depth")
    losses.legend(frameon=False, fontsize=9, labelcolor=INK)
    headline(losses, "Validation loss of the main model, nats per token", f"{len(curves['with'])} seeds and their mean")
    difference = curves["with"] - curves["without"]
    differences.axhline(0, color=FAINT, linewidth=0.9)
    differences.plot(tokens, difference.T, color=COLORS[3], linewidth=0.7, alpha=0.4)
    differences.plot(tokens, difference.mean(0), color=COLORS[3], linewidth=1.9)
    held = statistics.fmean(each["on_its_own"] for each in runs["with"])
    on_text = statistics.fmean(each["on_text"] for each in runs["with"])
    note = f"drafts that hold: {on_text:.0%} on text, {held:.0%} on its own"
    headline(differences, "With minus without", note)
    save(figure, out)


def read(arguments: list[str]) -> tuple[int, int, Path, list[str]]:
    """Steps, seeds, folder and the settings for all runs, which have a dot in their key or name a group."""
    words = dict(argument.partition("=")[::2] for argument in arguments)
    own = DEFAULTS | {key: value for key, value in words.items() if key in DEFAULTS}
    more = [argument for argument in arguments if argument.partition("=")[0] not in DEFAULTS]
    for key in ("steps", "seeds"):
        if not own[key].isdigit() or not int(own[key]):
            raise SystemExit(f"{key}={own[key]} must be a whole number of at least 1")
    try:
        compose.compose(settings("with", 0, int(own["steps"]), Path(own["out"]), more))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return int(own["steps"]), int(own["seeds"]), Path(own["out"]), more


def main(arguments: list[str]) -> None:
    steps, seeds, out, more = read(arguments)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in DEPTHS}
    with Neighbours() as neighbours:
        for seed in range(seeds):
            for side, found in runs.items():
                found.append(result(side, seed, steps, out, more))
    print(f"{steps} steps, {runs['with'][0]['tokens'][-1]:,.0f} tokens; {neighbours}\n\n{table(runs)}")
    draw(runs, out / "mtp.png")
    print(f"\npicture: {out / 'mtp.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
