"""How far training in FP8 ends from training in FP32, beside what re-associated FP32 sums alone do.

    OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 python -m benchmarks.fp8_gap [size=gap tokens=2048 jobs=1]

size     gap (a DeepSeek-V3 of 10 M parameters, whose products are 384 to 768 wide, some of them no multiple of 128)
         or tiny
steps    of each run, tokens of each step, and seeds: of weights and of the order of the text (the Python standard
         library).
lr       reached after a twentieth of the steps; in their second half it falls to a tenth. FP32 learns faster at the
         one that stands here than at its double or its half.
sides    fp32, reassociated, fp8 with every seed; control, bf16, block_gradients, per_tensor with the first `extra`.
jobs     runs at once. Every run keeps checkpoints: the same command goes on where it was ended.
dir      of the runs, of gap.png and gap.csv.

The gap of a side is (its loss - FP32's) / FP32's in every step, of losses smoothed by 0.9 (report, appendix B.1), both
runs having the same seed. The noise floor is the largest gap of any step and seed of FP32 with the sums of its products
taken in another order. FP8 passes if its own largest gap is at most 0.25 % (the report's bound) or twice the floor.
The control, gradients in E4M3 without scales, must not pass: it shows that the bench can tell. Steps of few tokens tell
less: of 256, a loss is mostly the noise that any rounding stirs up.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from benchmarks import _engines
from benchmarks._sides import Neighbours
from train import compose, run_folder
from train.assemble import assemble, join, meet
from train.config import RunConfig
from train.data.prepare.one_source import prepare
from train.flops import parameter_counts
from train.loop import run
from train.not_finite import NotFiniteError
from train.precision.build import build_engines
from train.resume import resume
from train.stopping import StopRequest
from train.track.metrics_file import JsonlSink, read_metrics
from train.track.sinks import Tracker
from train.view.curves import COLORS, FAINT, INK, headline, paper, save

BOUND, SMOOTHING, SEQ_LEN = 0.0025, 0.9, 128
DEFAULTS = {
    "size": "gap",
    "steps": "1000",
    "tokens": "2048",
    "lr": "1e-3",
    "seeds": "3",
    "extra": "1",
    "jobs": "1",
    "dir": "runs/fp8_gap",
    "sides": "",
}
# side -> (precision of everything but products, arithmetic of products)
SIDES: dict[str, tuple[str, _engines.MakeEngines]] = {
    "fp32": ("fp32", build_engines),
    "reassociated": ("fp32", _engines.reassociated),
    "fp8": ("fp8", build_engines),
    "control": ("fp8", _engines.instead(_engines.UnscaledGradients)),
    "bf16": ("bf16", build_engines),
    "block_gradients": ("fp8", _engines.instead(_engines.BlockGradients)),
    "per_tensor": ("fp8", _engines.instead(_engines.PerTensor)),
}
EVERY_SEED = ("fp32", "reassociated", "fp8")
GAP = {
    "hidden_size": 400,
    "intermediate_size": 448,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 384,
    "kv_lora_rank": 400,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 1.4,
}
SIZES = {"gap": GAP, "tiny": {"num_hidden_layers": 2}}


@dataclass(frozen=True)
class Bench:
    """The settings of one comparison."""

    size: str
    num_steps: int
    step_tokens: int
    lr: float
    num_seeds: int
    num_extra: int
    num_jobs: int
    folder: Path
    sides: tuple[str, ...]

    def runs(self) -> list[tuple[str, int]]:
        """(side, seed) of every run, seed by seed."""
        seeds = {side: self.num_seeds if side in EVERY_SEED else self.num_extra for side in self.sides}
        return [(side, seed) for seed in range(self.num_seeds) for side in self.sides if seed < seeds[side]]

    def config(self, side: str, seed: int) -> RunConfig:
        """The run of a side: one process, micro-batches of up to 16 sequences."""
        sequences = self.step_tokens // SEQ_LEN
        micro_batch = next(each for each in range(min(sequences, 16), 0, -1) if sequences % each == 0)
        model = [f"model.{key}={value}" for key, value in SIZES[self.size].items()]
        return compose.compose(
            [
                *("model=tiny", "parallel=one", "zero.engine=native", "track.wandb=disabled", "run.device=cpu", *model),
                *(f"train.seq_len={SEQ_LEN}", f"train.micro_batch_size={micro_batch}"),
                f"train.global_batch_size={sequences}",
                # V3's 0.001 would take a third of the run to even out the load.
                "moe.bias_update_rate=0.01",
                *(f"train.max_steps={self.num_steps}", f"train.seed={seed}", f"precision={SIDES[side][0]}"),
                *(f"lr_scheduler.lr={self.lr}", f"lr_scheduler.warmup_steps={max(1, self.num_steps // 20)}"),
                f"lr_scheduler.phases=[{{kind:constant,share:0.5}},{{kind:cosine,end_lr:{self.lr / 10}}}]",
                *("evaluate.interval=0", "evaluate.num_sequences=2"),
                f"checkpoint.interval={max(1, self.num_steps // 5)}",
                *("checkpoint.keep_latest_k=1", f"run.dir={self.folder / f'{side}-{seed}'}", "run.num_threads=1"),
            ]
        )

    def losses(self, side: str, seed: int) -> np.ndarray:
        """Loss of each step so far; NaN from where the run stopped because it was not finite."""
        path = self.folder / f"{side}-{seed}" / "metrics.jsonl"
        found = np.array([row["train/loss"] for row in read_metrics(path)] if path.exists() else [])
        if (path.parent / "not-finite").exists():
            found = np.append(found, np.full(self.num_steps - len(found), np.nan))
        return found


def read(arguments: list[str]) -> Bench:
    words = dict(word.split("=", 1) for word in arguments if "=" in word)
    unknown = [word for word in arguments if word.split("=", 1)[0] not in DEFAULTS or "=" not in word]
    if unknown:
        raise SystemExit(f"unknown settings: {' '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    words = DEFAULTS | words
    if words["size"] not in SIZES:
        raise SystemExit(f"size={words['size']} is not one of {', '.join(SIZES)}")
    sides = tuple(words["sides"].split(",")) if words["sides"] else tuple(SIDES)
    if not set(EVERY_SEED) <= set(sides) <= set(SIDES):
        raise SystemExit(f"sides={words['sides']} must have {', '.join(EVERY_SEED)}, and others of {', '.join(SIDES)}")
    numbers = {}
    for key in ("steps", "tokens", "seeds", "extra", "jobs"):
        if not words[key].isdigit() or int(words[key]) < (key != "extra"):
            raise SystemExit(f"{key}={words[key]} must be a whole number above 0")
        numbers[key] = int(words[key])
    if numbers["tokens"] % SEQ_LEN:
        raise SystemExit(f"tokens={words['tokens']} must be a multiple of {SEQ_LEN}, the length of a sequence")
    try:
        lr = float(words["lr"])
    except ValueError:
        raise SystemExit(f"lr={words['lr']} must be a number") from None
    return Bench(
        size=words["size"],
        num_steps=numbers["steps"],
        step_tokens=numbers["tokens"],
        lr=lr,
        num_seeds=numbers["seeds"],
        num_extra=numbers["extra"],
        num_jobs=numbers["jobs"],
        folder=Path(words["dir"]),
        sides=sides,
    )


def work(bench: Bench, side: str, seed: int) -> None:
    """One run, from where it is to its end."""
    config, engines = bench.config(side, seed), SIDES[side][1]
    torch.set_num_threads(1)
    folder = Path(config.run.dir)
    opened = run_folder.opened(folder, 0, (ValueError, NotFiniteError))
    with opened, meet(config, print, _end) as met, join(config, met, _end) as groups:
        job = assemble(config, groups, engines)
        resume(job)
        tracker = Tracker([JsonlSink(folder / "metrics.jsonl", job.step)])
        try:
            run(job, tracker, float("nan"), StopRequest())
        except NotFiniteError as error:
            (folder / "not-finite").write_text(f"{error}\n")
        tracker.close(False)


def _end(sentence: str) -> NoReturn:
    raise SystemExit(sentence)


def claim(bench: Bench) -> None:
    """Make the folder one of this comparison's runs alone; SystemExit if it has those of another."""
    recipe = compose.text(replace(bench, folder=Path("runs")).config("fp8", 0))
    settings = (
        f"size={bench.size} steps={bench.num_steps} tokens={bench.step_tokens} lr={bench.lr} "
        f"config={hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    )
    path = bench.folder / "settings"
    known = path.read_text() if path.exists() else "other settings"
    if known != settings and any(bench.folder.glob("*/metrics.jsonl")):
        raise SystemExit(f"dir={bench.folder} has runs of {known}, and not of {settings}: name another")
    bench.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(settings)


def run_all(bench: Bench, arguments: list[str]) -> None:
    """Every run that is not at its end yet, `jobs` at once, each in a process of its own."""
    prepare(bench.config("fp32", 0).data, print)
    todo = [(side, seed) for side, seed in bench.runs() if len(bench.losses(side, seed)) < bench.num_steps]
    print(f"{len(bench.runs())} runs of {bench.num_steps} steps, {len(todo)} to do", flush=True)

    def one(what: tuple[str, int]) -> None:
        command = [sys.executable, "-m", "benchmarks.fp8_gap", "--run", f"{what[0]}-{what[1]}", *arguments]
        with Neighbours() as around:
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{what[0]}-{what[1]} failed:\n{done.stderr[-2000:]}")
        losses = bench.losses(*what)
        print(f"{what[0]}-{what[1]}: last loss {losses[-1]:.4f}, {around.seconds:.0f} s", flush=True)

    with ThreadPoolExecutor(bench.num_jobs) as pool:
        for _ in pool.map(one, todo):
            pass


def smooth(losses: np.ndarray) -> np.ndarray:
    """Running average with weight 0.9 on the past, freed of its start at zero."""
    total, weight, out = 0.0, 0.0, np.empty_like(losses)
    for step, loss in enumerate(losses):
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        out[step] = total / weight
    return out


def gaps(bench: Bench) -> dict[str, list[np.ndarray]]:
    """side -> per seed, (smoothed loss - FP32's) / FP32's of each step."""
    base = [smooth(bench.losses("fp32", seed)) for seed in range(bench.num_seeds)]
    found: dict[str, list[np.ndarray]] = {side: [] for side in bench.sides if side != "fp32"}
    for side, seed in bench.runs():
        if side != "fp32":
            found[side].append(smooth(bench.losses(side, seed)) / base[seed] - 1)
    return {side: each for side, each in found.items() if each}


def largest(gap: np.ndarray) -> float:
    """The largest gap of any step, as a distance; infinite for a run that was not finite."""
    found = float(np.abs(gap).max())
    return found if math.isfinite(found) else math.inf


def worst(gaps_of_side: list[np.ndarray]) -> float:
    """The largest gap of every seed."""
    return max(largest(gap) for gap in gaps_of_side)


def allowed(found: Mapping[str, list[np.ndarray]]) -> float:
    """What a gap may be: the report's bound, or twice the noise floor."""
    return max(BOUND, 2 * worst(found["reassociated"]))


def report(found: dict[str, list[np.ndarray]]) -> Iterator[str]:
    """The table and the verdicts, line by line."""
    limit, width = allowed(found), max(28, 10 * max(map(len, found.values())))
    yield f"{'':16s}{'largest gap of each seed':>{width}s}{'mean gap':>{width}s}   within {limit:.2%}"
    for side, each in found.items():
        extremes = "  ".join(f"{largest(gap):.3%}" for gap in each)
        means = "  ".join(f"{gap.mean():+.3%}" for gap in each)
        yield f"{side:16s}{extremes:>{width}s}{means:>{width}s}   {'yes' if worst(each) <= limit else 'no'}"
    fp8 = worst(found["fp8"])
    yield f"noise floor: {worst(found['reassociated']):.3%}"
    yield f"fp8: {fp8:.3%} at most, {'passes' if fp8 <= limit else 'does not pass'} at {limit:.3%}"
    if "control" in found:
        least = min(largest(gap) for gap in found["control"])
        verdict = "fails, as it must" if least > limit else "PASSES: this bench cannot tell"
        yield f"control: {least:.3%} at least, {verdict}"


def draw(bench: Bench, found: dict[str, list[np.ndarray]], out: Path) -> None:
    """Smoothed losses of the first seed, and every seed's gap over the steps."""
    sheet, (above, below) = paper([2.6, 2.8])
    tokens = np.arange(1, bench.num_steps + 1) * bench.step_tokens
    colors = dict(zip(("fp32", *found), COLORS, strict=False))
    for side, color in colors.items():
        losses = smooth(bench.losses(side, 0))
        above.plot(tokens, losses, color=color, linewidth=1.4, label=side)
        for gap in found.get(side, []):
            below.plot(tokens, 100 * gap, color=color, linewidth=1.0)
    limit = 100 * allowed(found)
    reach = 1.3 * max(limit, 100 * worst(found["fp8"]))
    below.set_ylim(-reach, reach)
    below.axhspan(-limit, limit, color=FAINT, alpha=0.12, linewidth=0)
    above.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=4)
    headline(above, "loss, nats per token, smoothed by 0.9", "first seed")
    headline(below, "distance from FP32, %", f"every seed; the band is what it may be, ±{limit:.2f} %")
    save(sheet, out)


def write_csv(bench: Bench, out: Path) -> None:
    """side, seed, step, loss: every number that was compared."""
    lines = ["side,seed,step,loss"]
    for side, seed in bench.runs():
        lines += [f"{side},{seed},{step},{loss:.6f}" for step, loss in enumerate(bench.losses(side, seed), 1)]
    out.write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--run"]:
        side, _, seed = arguments[1].rpartition("-")
        work(read(arguments[2:]), side, int(seed))
        return
    bench = read(arguments)
    claim(bench)
    counts = parameter_counts(bench.config("fp32", 0).model)
    print(
        f"size={bench.size}: {counts.total / 1e6:.1f} M parameters and {counts.mtp / 1e6:.1f} M for MTP, "
        f"{counts.activated / 1e6:.1f} M activated; {bench.step_tokens} tokens a step"
    )
    run_all(bench, arguments)
    found = gaps(bench)
    print(*report(found), sep="\n")
    draw(bench, found, bench.folder / "gap.png")
    write_csv(bench, bench.folder / "gap.csv")
    print(f"{bench.folder / 'gap.png'}, {bench.folder / 'gap.csv'}")


if __name__ == "__main__":
    main(sys.argv[1:])
