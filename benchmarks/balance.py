"""Three ways to balance experts, side by side on real text: the bias of DeepSeek-V3, the losses of V2, and neither.

    OMP_NUM_THREADS=1 python -m benchmarks.balance [steps=500 seeds=0,1,2 sides=none,losses,bias folder=runs/balance
                                                    rate=0.01 source=null size=small]

All sides train one model from the same weights on the same batches: sigmoid scores, 32 experts in 4 groups, 4 of them
from 2 groups per token. Only the recipe's `moe` differs:

none    nothing balances
losses  balance losses of experts, devices and communication with DeepSeek-V2's factors 0.003, 0.05 and 0.02
bias    the selection bias and nothing else, `rate` per step. V3's rate is 0.001, for more than 200 thousand steps; a
        run of some hundred would end before a bias had moved far, so the default is 0.01

MaxVio = (largest expert load - mean) / mean of every step's whole batch, per layer; the validation loss is the main
cross-entropy. Every finished run is a file in the folder, named after all that makes it: a benchmark that was ended
goes on with the runs that are missing. source: a file or folder of text, null the standard library's sources, as in
`data.source`. size=tiny is for tests. Prints a table and what it says of the claim "better
balance at no worse loss"; draws balance.png into the folder.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parallel.expert.dispatch import LocalDispatch
from train.compose import compose
from train.config import RunConfig
from train.data.prepare.one_source import prepare
from train.data.rows.epochs import Rows
from train.data.rows.tokens import Tokens
from train.files import replace_durably
from train.model.init import init_weights
from train.model.loss import LossTerms
from train.model.transformer import Transformer
from train.precision.build import everywhere
from train.precision.grads import attach_main_grads
from train.precision.torch_engine import TorchEngine
from train.recipe.adamw import AdamW
from train.recipe.balance import update_bias
from train.recipe.optimizer import decays
from train.view.curves import COLORS, INK, headline, paper, save, smooth

DEFAULTS = {
    "steps": "500",
    "seeds": "0,1,2",
    "sides": "none,losses,bias",
    "rate": "0.01",
    "folder": "runs/balance",
    "source": "null",
    "size": "small",
}
NOTHING = ("moe.bias_update_rate=0", "moe.seq_aux_coeff=0")
LOSSES = ("moe.seq_aux_coeff=0.003", "moe.device_aux_coeff=0.05", "moe.comm_aux_coeff=0.02")
SIDES = {
    "none": NOTHING,
    "losses": (*NOTHING, *LOSSES),
    "bias": (*NOTHING, "moe.bias_update_rate={rate}"),
}
SIZES = {
    "small": (
        *("model=tiny", "model.num_hidden_layers=6", "model.n_routed_experts=32", "model.num_nextn_predict_layers=0"),
        *("train.seq_len=128", "train.global_batch_size=16", "evaluate.num_sequences=256"),
    ),
    "tiny": (
        *("model=tiny", "model.num_hidden_layers=3", "model.hidden_size=32", "model.num_nextn_predict_layers=0"),
        "model.vocab_size=300",
        *("train.seq_len=32", "train.global_batch_size=4", "evaluate.num_sequences=4"),
    ),
}
# Of a run's end, over which MaxVio is averaged.
LAST_SHARE = 0.2


@dataclass(frozen=True)
class Run:
    """What a run leaves in its file."""

    max_vio: list[list[float]]  # [steps][layers]
    loss: list[float]  # [steps], nats per token
    valid_loss: float

    def last_max_vio(self) -> list[float]:
        """Mean MaxVio of each layer over the end of the run."""
        last = self.max_vio[-max(1, round(LAST_SHARE * len(self.max_vio))) :]
        return [statistics.fmean(layer) for layer in zip(*last, strict=True)]


class Training:
    """A plain loop over the product's parts, on one process."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.recipe = config, config.recipe()
        with torch.device("meta"):
            self.model = Transformer(
                config.model, LocalDispatch(config.model.n_routed_experts), everywhere(TorchEngine())
            )
        init_weights(self.model, config.train.seed, torch.float32, "cpu")
        attach_main_grads(self.model)
        params = list(self.model.parameters())
        groups = [
            {"params": [p for p in params if decays(p.shape) is decay], "weight_decay": weight_decay}
            for decay, weight_decay in ((True, config.optimizer.weight_decay), (False, 0.0))
        ]
        self.params, self.optimizer = params, AdamW(config.optimizer).make(groups)
        folder, seq_len = config.data.folder, config.train.seq_len
        self.train_rows = Rows(Tokens.open(folder, "train"), seq_len, config.train.seed)
        self.valid_rows = Rows(Tokens.open(folder, "valid"), seq_len, order="sequential")

    def step(self, number: int) -> tuple[float, list[float]]:
        """(loss in nats per token, MaxVio of each layer) of one step."""
        plan, moe = self.recipe.at(number), self.config.moe
        rows = self.train_rows.rows(plan.first_sequence, plan.num_sequences)
        num_tokens, per_sequence = plan.num_sequences * self.config.train.seq_len, 1 / plan.num_sequences
        coeffs = (moe.seq_aux_coeff, moe.device_aux_coeff, moe.comm_aux_coeff)
        output = self.model(rows, LossTerms(1 / num_tokens, 0.0, *(alpha * per_sequence for alpha in coeffs)))
        output.total.backward()
        for p in self.params:
            p.grad = p.main_grad  # type: ignore[attr-defined]
        torch.nn.utils.clip_grad_norm_(self.params, self.config.optimizer.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr
        self.optimizer.step()
        for p in self.params:
            p.main_grad.zero_()  # type: ignore[attr-defined]
            p.grad = None
        update_bias(self.model, output.load, plan.bias_update_rate)
        return float(output.metrics["train/loss"]) / num_tokens, max_vio(output.load)

    @torch.no_grad()
    def valid_loss(self) -> float:
        """Mean cross-entropy of the first sequences of the validation split, in nats per token."""
        total, count = 0.0, min(self.config.evaluate.num_sequences, self.valid_rows.num_rows)
        self.model.eval()
        for first in range(0, count, 16):
            rows = self.valid_rows.rows(first, min(16, count - first))
            total += float(self.model(rows, LossTerms(1.0, 0.0, 0.0)).metrics["train/loss"])
        self.model.train()
        return total / (count * self.config.train.seq_len)


def max_vio(load: Tensor) -> list[float]:
    """MaxVio of each router, from its experts' loads [num_routers, E]."""
    mean = load.double().mean(1)
    return ((load.amax(1) - mean) / mean).tolist()


def train(config: RunConfig, label: str) -> Run:
    training, losses, violations = Training(config), [], []
    start_s, num_steps = time.perf_counter(), training.recipe.num_steps
    for number in range(num_steps):
        loss, violation = training.step(number)
        losses.append(loss)
        violations.append(violation)
        if (number + 1) % max(1, num_steps // 5) == 0:
            now = statistics.fmean(violation)
            took_s = time.perf_counter() - start_s
            print(
                f"  {label}: step {number + 1}/{num_steps}, loss {loss:.3f}, MaxVio {now:.2f}, {took_s:.0f} s",
                flush=True,
            )
    return Run(violations, losses, training.valid_loss())


def config_of(settings: Mapping[str, str], side: str, seed: int) -> RunConfig:
    balance = [word.format(rate=settings["rate"]) for word in SIDES[side]]
    steps = int(settings["steps"])
    recipe = [f"train.max_steps={steps}", f"lr_scheduler.warmup_steps={min(20, steps)}", f"train.seed={seed}"]
    if settings["source"] != "null":
        recipe += [f"data.source={settings['source']}", f"data.dir={settings['folder']}/data"]
    return compose([*SIZES[settings["size"]], *balance, *recipe, "train.micro_batch_size=1"])


def finished(settings: Mapping[str, str], side: str, seed: int) -> Run:
    """The run from its file, or trained now."""
    config = config_of(settings, side, seed)
    identity = json.dumps([repr(config.model), config.recipe().fingerprint(), repr(config.optimizer)])
    identity += f"{config.data.folder} {config.train.max_steps} {config.evaluate.num_sequences}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    path = Path(settings["folder"]) / f"{side}-seed{seed}-{digest}.json"
    if not path.exists():
        run = train(config, f"{side}, seed {seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, json.dumps(vars(run)).encode())
    return Run(**json.loads(path.read_text()))


Runs = dict[str, dict[int, Run]]


def table(runs: Runs) -> str:
    """One line per side: MaxVio of each layer and losses, means over the seeds."""
    num_layers = len(next(iter(next(iter(runs.values())).values())).max_vio[0])
    layers = "".join(f"{f'layer {number}':>9s}" for number in range(1, num_layers + 1))
    lines = [f"{'side':8s}{layers}{'mean':>8s}{'worst':>8s}{'valid loss':>12s}   of each seed"]
    for side, by_seed in runs.items():
        ends = [run.last_max_vio() for run in by_seed.values()]
        means = [statistics.fmean(layer) for layer in zip(*ends, strict=True)]
        valid = [run.valid_loss for run in by_seed.values()]
        cells = "".join(f"{mean:9.2f}" for mean in means)
        each = " ".join(f"{loss:.4f}" for loss in valid)
        summary = f"{statistics.fmean(means):8.2f}{max(means):8.2f}{statistics.fmean(valid):12.4f}"
        lines.append(f"{side:8s}{cells}{summary}   {each}")
    return "\n".join(lines)


def verdict(runs: Runs) -> str:
    """What the runs say of "better balance at no worse loss" of the bias, seed by seed against the losses."""
    if not {"bias", "losses"} <= runs.keys():
        return "The claim is about bias and losses: one of them was left out."
    pairs = [(run, runs["losses"][seed]) for seed, run in runs["bias"].items()]
    balance = [statistics.fmean(a.last_max_vio()) - statistics.fmean(b.last_max_vio()) for a, b in pairs]
    loss = [a.valid_loss - b.valid_loss for a, b in pairs]
    said = (
        f"bias against losses over {len(pairs)} seeds: MaxVio {min(balance):+.2f} to {max(balance):+.2f}, validation "
        f"loss {min(loss):+.4f} to {max(loss):+.4f} nats per token"
    )
    if all(each < 0 for each in balance) and statistics.fmean(loss) <= 0:
        return f"Shown at this size: better balance in every seed, and the mean loss is not worse. {said}."
    if all(each >= 0 for each in balance) or all(each > 0 for each in loss):
        which = "balance is not better" if all(each >= 0 for each in balance) else "the loss is worse"
        return f"Refuted at this size: {which} in every seed. {said}."
    return f"Neither shown nor refuted at this size: the seeds differ. {said}."


def mean_loss(by_seed: dict[int, Run]) -> np.ndarray:
    """Training loss of every step, mean over the seeds."""
    return np.mean([run.loss for run in by_seed.values()], axis=0)


def draw(runs: Runs, tokens_per_step: int, out: Path) -> None:
    """MaxVio of every layer over time, a panel per side, then the losses."""
    figure, panels = paper([1.4] * len(runs) + [1.9])
    highest = max(max(max(step) for step in run.max_vio) for by_seed in runs.values() for run in by_seed.values())
    for panel, (side, by_seed) in zip(panels, runs.items(), strict=False):
        num_layers = len(next(iter(by_seed.values())).max_vio[0])
        for layer in range(num_layers):
            mean = smooth(np.mean([[step[layer] for step in run.max_vio] for run in by_seed.values()], axis=0))
            at = [tokens_per_step * (step + 1) for step in range(len(mean))]
            panel.plot(at, mean, color=COLORS[layer % len(COLORS)], linewidth=1.3, label=f"{layer + 1}")
        panel.set_ylim(0, highest)
        end = statistics.fmean(statistics.fmean(run.last_max_vio()) for run in by_seed.values())
        headline(panel, f"MaxVio: {side}", f"mean of layers and seeds at the end {end:.2f}")
    panels[len(runs) - 1].legend(
        title="MoE layer", loc="upper right", ncols=5, fontsize=8, title_fontsize=8, labelcolor=INK, edgecolor="none"
    )
    first = next(iter(runs))
    base = mean_loss(runs[first]) if len(runs) > 1 else 0.0
    for index, (side, by_seed) in enumerate(runs.items()):
        mean = smooth(mean_loss(by_seed) - base)
        at = [tokens_per_step * (step + 1) for step in range(len(mean))]
        valid = statistics.fmean(run.valid_loss for run in by_seed.values())
        panels[-1].plot(at, mean, color=COLORS[index], linewidth=1.5, label=f"{side}: validation {valid:.4f}")
    panels[-1].legend(fontsize=8.5, labelcolor=INK, edgecolor="none")
    title = f"Training loss above that of {first}" if len(runs) > 1 else "Training loss"
    headline(panels[-1], title, f"nats per token, mean of {len(next(iter(runs.values())))} seeds")
    panels[-1].set_xlim(left=0)
    save(figure, out)


def read(arguments: list[str]) -> dict[str, str]:
    """Settings; SystemExit in a sentence for those that cannot be."""
    settings = DEFAULTS | dict(word.split("=", 1) for word in arguments if "=" in word)
    if unknown := [word for word in arguments if word.split("=")[0] not in DEFAULTS or "=" not in word]:
        raise SystemExit(f"unknown settings: {', '.join(unknown)}; known: {', '.join(DEFAULTS)}")
    for side in settings["sides"].split(","):
        if side not in SIDES:
            raise SystemExit(f"sides={side} is not one of {', '.join(SIDES)}")
    if settings["size"] not in SIZES:
        raise SystemExit(f"size={settings['size']} is not one of {', '.join(SIZES)}")
    for key, numbers in (("steps", [settings["steps"]]), ("seeds", settings["seeds"].split(","))):
        if not all(number.isdigit() for number in numbers) or (key == "steps" and int(numbers[0]) < 1):
            raise SystemExit(f"{key}={settings[key]} is not made of whole numbers" + " above 0" * (key == "steps"))
    return settings


def main(arguments: list[str]) -> None:
    settings = read(arguments)
    torch.set_num_threads(1)
    sides, seeds = settings["sides"].split(","), [int(seed) for seed in settings["seeds"].split(",")]
    print("settings: " + " ".join(f"{key}={value}" for key, value in settings.items()), flush=True)
    config = config_of(settings, sides[0], seeds[0])
    prepare(config.data, say=lambda line: print(line, flush=True))
    # Seed by seed, so that a benchmark that was ended has whole comparisons.
    by_seed: dict[int, dict[str, Run]] = {}
    for seed in seeds:
        by_seed[seed] = {side: finished(settings, side, seed) for side in sides}
    runs: Runs = {side: {seed: by_seed[seed][side] for seed in seeds} for side in sides}
    share = f"the last {LAST_SHARE:.0%} of {settings['steps']} steps"
    print(f"\nMaxVio of each MoE layer over {share}, means over {len(seeds)} seeds; nats per token\n\n{table(runs)}\n")
    print(verdict(runs))
    out = Path(settings["folder"]) / "balance.png"
    draw(runs, config.train.global_batch_size * config.train.seq_len, out)
    print(f"picture: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
